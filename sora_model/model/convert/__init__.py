"""Weights of other diffusion transformers for ours."""
