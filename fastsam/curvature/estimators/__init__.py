"""Stochastic estimates of numbers of a matrix that is known by its products only."""
