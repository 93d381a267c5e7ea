"""Export formats of trained runs. Each file defines and registers one format."""
