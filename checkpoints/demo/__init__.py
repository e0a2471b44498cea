"""The demonstration: a git history processed by worker processes, exactly once, and verified."""

__all__ = ["DemoError"]


class DemoError(Exception):
    """What stops the demonstration; its message is one line for the user."""
