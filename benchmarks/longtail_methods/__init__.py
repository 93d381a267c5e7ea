"""Comparison of long-tail methods: mixing, second stages and calibrators, with SGD and with late SAM."""
