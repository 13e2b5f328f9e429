"""``python -m star_trainer``, for launchers of many processes."""

from star_trainer.command import entry

entry()
