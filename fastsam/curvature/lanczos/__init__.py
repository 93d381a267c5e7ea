"""Lanczos runs on symmetric operators: plain ones for spectra, restarted ones for eigenpairs."""
