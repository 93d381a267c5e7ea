"""Products with the curvature of a model: matrices, strategies, and the choice between them."""
