"""Private: the native SAM step and the base classes of optimizers that wrap another one."""
