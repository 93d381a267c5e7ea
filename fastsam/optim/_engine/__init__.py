"""Private: the native step and what an optimizer around another one needs."""
