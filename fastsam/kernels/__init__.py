"""Typed, validating Python face of every native kernel, and a readable PyTorch reference of each."""
