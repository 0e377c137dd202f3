"""Recipes: from settings to a trained checkpoint, one for each thing that can be trained.

>>> from sora_model.training.config import TrainConfig
>>> from sora_model.training.recipes.common import RunSettings
>>> from sora_model.training.recipes.dit import DiTRecipe, train_dit
>>> run = RunSettings(data="world:simple", tokens=512, config=TrainConfig(steps=2))
>>> trainer = train_dit("runs/shapes", DiTRecipe(model="tiny"), run)
>>> trainer.step
2

A recipe refuses whatever can be refused before it loads a model.
"""
