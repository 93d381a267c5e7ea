"""Integrations of SAM with libraries whose hooks do not suffice, one module per library."""
