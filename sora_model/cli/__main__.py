"""`python -m sora_model.cli`, which is what `accelerate launch -m` runs."""

from . import app

app()
