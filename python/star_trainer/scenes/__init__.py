"""Drawn scenes: prompts with exact pictures, and a checker that sees whether a picture fulfils its prompt.

A scene is one to three shapes of plain colours, or a short printed word, on a board of 4 by 4 cells. Prompts carry
GenEval's metadata (or the text to be read), so that whatever serves GenEval's and OCR prompts serves these too.
"""

from star_trainer.scenes.check import SceneReward, check
from star_trainer.scenes.describe import COLORS, COUNTS, RELATIONS, TASKS, WORDS, describe, vocabulary
from star_trainer.scenes.draw import CANVAS, Item, Scene, Word, draw, masks
from star_trainer.scenes.place import sample_scene

__all__ = [
    "CANVAS",
    "COLORS",
    "COUNTS",
    "RELATIONS",
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
