"""Formats that a trained run is exported in: one file for each, with its registration."""
