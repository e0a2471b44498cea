"""The recorder: follows the messages and raises the checkpoints of the two subscriptions."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import Connection, Engine

from checkpoints.demo.importer import Importer
from checkpoints.demo.projection import HANDLERS
from checkpoints.demo.tables import GROUP, messages
from checkpoints.runtime import Interest, Message, MessageTable, Position, Recorder

__all__ = ["Recording"]

_in_order = MessageTable(
    global_position=messages.c.global_position,
    transaction_id=messages.c.transaction_id,
    stream_name=messages.c.stream_name,
    stream_position=messages.c.version,
    type=messages.c.type,
)


class Recording:
    """A recorder, and how many messages are recorded; chaos puts another one in its place."""

    def __init__(self, engine: Engine) -> None:
        self.messages = 0
        self.restarts = 0
        self._engine = engine
        self._recorder = self._new()

    def run(self) -> None:
        """Record until stopped."""
        recorder = None
        while recorder is not self._recorder:
            recorder = self._recorder
            recorder.run()

    def has_all(self, importer: Importer) -> bool:
        """Whether all that was appended is recorded."""
        return self.messages >= importer.imported.changes

    def restart(self) -> None:
        """Put another recorder in place; it goes on where this one stops."""
        before, self._recorder = self._recorder, self._new()
        before.stop()
        self.restarts += 1

    def stop(self) -> None:
        """Let `run()` end after the batch at hand."""
        self._recorder.stop()

    def _new(self) -> Recorder:
        return Recorder(
            self._engine,
            GROUP,
            self._read,
            [Interest(name) for name in HANDLERS],
            batch=2000,
            poll_interval=timedelta(milliseconds=100),
        )

    def _read(self, connection: Connection, after: Position, limit: int) -> list[Message]:
        # What is before the position is committed; one transaction after the other appends, so
        # that the positions have no gaps.
        self.messages = after.global_position
        return _in_order(connection, after, limit)
