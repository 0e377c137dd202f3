"""Captions of videos, and long prompts from short ones."""
