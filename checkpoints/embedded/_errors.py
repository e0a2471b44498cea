"""The one error of the throw-away server."""

from __future__ import annotations

from checkpoints.errors import CheckpointsError

__all__ = ["ServerUnavailable"]


class ServerUnavailable(CheckpointsError):
    """No throw-away server can be had: no binaries, it did not start, or it is closed already.

    The message says what was looked for or what the server wrote, and what to do.
    """
