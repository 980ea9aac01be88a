"""Recipes: typed schema, files laid over each other, overrides, and a check that reports every mistake at once."""

from __future__ import annotations

from linearize.config.compose import compose, list_recipes, outline, to_yaml
from linearize.config.schema import DataConfig, EvalConfig, LoraConfig, Recipe, RunConfig, StageConfig

__all__ = [
    "DataConfig",
    "EvalConfig",
    "LoraConfig",
    "Recipe",
    "RunConfig",
    "StageConfig",
    "compose",
    "list_recipes",
    "outline",
    "to_yaml",
]
