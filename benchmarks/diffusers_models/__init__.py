"""Models of diffusers as published, but for their depth: random weights, one layer, about 3,000 tokens. A file per family."""
