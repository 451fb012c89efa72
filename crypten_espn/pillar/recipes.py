"""What a user of training imports: recipes, the loop, and networks as files."""

from .recipe import RECIPES, Recipe, channel_tuning, find_recipe, fine_tuning
from .result import SELECTION_RULE, Result, accuracy
from .storage import bundled, load_network, load_weights, save_network
from .training import train

__all__ = [
    "RECIPES",
    "SELECTION_RULE",
    "Recipe",
    "Result",
    "accuracy",
    "bundled",
    "channel_tuning",
    "find_recipe",
    "fine_tuning",
    "load_network",
    "load_weights",
    "save_network",
    "train",
]
