"""A procedural world with ground truth, and all that needs it."""
