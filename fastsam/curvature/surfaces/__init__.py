"""Losses along directions in the space of parameters, and between two checkpoints."""
