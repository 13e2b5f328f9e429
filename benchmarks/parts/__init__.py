"""The parts of the overhead benchmark, one for each ``--only``."""
