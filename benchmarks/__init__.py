"""Benchmarks of star-kernels. ``overhead.py`` is the command; the subpackages implement it."""
