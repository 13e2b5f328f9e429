"""A thin driver for reinforcement-learning post-training of text-to-image flow models, on star_kernels."""
