"""The implementations that the benchmarks compare, and the models and prompts that they use."""
