"""Clocks, interleaved rounds and the progress line."""
