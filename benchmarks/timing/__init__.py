"""Clocks, peak memory, interleaved rounds and progress bars."""
