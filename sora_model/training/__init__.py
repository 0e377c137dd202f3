"""Training on packed batches: the trainer, and what it trains."""
