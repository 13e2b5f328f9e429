"""The implementations that the benchmark compares, and the models and prompts that it runs them on."""
