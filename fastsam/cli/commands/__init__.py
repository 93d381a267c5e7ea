"""The commands, one file each: ``command(arguments)`` returns its dataclass, which has a ``run``."""
