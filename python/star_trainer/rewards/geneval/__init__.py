"""GenEval (Ghosh et al., 2023, arXiv 2310.11513) as a reward: tasks, detector, colour classifier and rules."""
