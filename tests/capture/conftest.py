"""One thread for every test: the models are too tiny for more."""

from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)
