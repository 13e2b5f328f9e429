"""The tensors are small: more threads only wait for each other."""

from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)
