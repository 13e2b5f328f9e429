"""The parts of the overhead benchmark, one module for each value of ``--only``."""
