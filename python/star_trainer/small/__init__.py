"""A small Stable Diffusion 3 for drawn scenes: a diffusers pipeline that can be trained on a laptop."""

from star_trainer.small.recipe import LARGE, SMALL, Recipe

__all__ = ["LARGE", "SMALL", "Recipe"]
