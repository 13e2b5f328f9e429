"""``python -m star_trainer``, for launchers of many processes."""

from star_trainer.start import train

train()
