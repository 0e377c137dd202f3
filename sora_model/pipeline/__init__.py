"""Requests -> videos."""
