"""A small Stable Diffusion 3 for drawn scenes: a real diffusers pipeline that trains on a laptop, and ships."""

from star_trainer.small.recipe import LARGE, SMALL, Recipe

__all__ = ["LARGE", "SMALL", "Recipe"]
