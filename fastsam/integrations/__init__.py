"""Code for other libraries, one module each, where their own hooks are not enough to train with SAM."""
