"""Recipes: from settings to a trained checkpoint, one for each thing that can be trained.

    from sora_model.training.recipes.dit import DiTRecipe, train_dit

    train_dit("runs/shapes", DiTRecipe(model="XS"), RunSettings(data="clips", config=TrainConfig(minutes=60)))

A recipe refuses whatever can be refused before it loads a model.
"""
