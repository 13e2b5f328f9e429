"""What star-kernels costs: overhead.py is the command, the packages are its parts."""
