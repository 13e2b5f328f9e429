"""One thread for every test: the tensors are too small for more."""

from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)
