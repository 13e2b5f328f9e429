"""Drawn scenes: prompts with exact images, and a checker of whether an image fulfils its prompt.

A scene is one to three shapes of plain colours, or a short printed word, on a board of 4 by 4 cells. Prompts have
GenEval's metadata, or the text to be read, so that code for GenEval's and OCR prompts also works with these.
"""

from star_trainer.scenes.check import RULES, SceneReward, check
from star_trainer.scenes.describe import COLORS, COUNTS, RELATIONS, TASKS, WORDS, describe, vocabulary
from star_trainer.scenes.draw import CANVAS, Item, Scene, Word, draw, masks
from star_trainer.scenes.place import sample_scene

__all__ = [
    "CANVAS",
    "COLORS",
    "COUNTS",
    "RELATIONS",
    "RULES",
    "TASKS",
    "WORDS",
    "Item",
    "Scene",
    "SceneReward",
    "Word",
    "check",
    "describe",
    "draw",
    "masks",
    "sample_scene",
    "vocabulary",
]
