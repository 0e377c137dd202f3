"""Noising, loss, guidance and sampling."""
