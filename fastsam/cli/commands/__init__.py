"""The commands, one module each: its ``command(arguments)`` returns a dataclass with a ``run`` method."""
