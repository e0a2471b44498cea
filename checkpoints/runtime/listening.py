"""Wake-up by LISTEN, on a connection of its own; polling goes on beside it, and instead of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sqlalchemy import Engine

from checkpoints.runtime._outage import Backoff
from checkpoints.runtime.telemetry import logger
from checkpoints.tables import DEFAULT_SCHEMA

__all__ = ["Listener", "channel_of", "listen_sql", "open_connection"]

# How long it waits for a notification before it looks whether it was stopped.
_TURN = 0.5


def channel_of(engine: Engine) -> str:
    """The channel that the triggers notify: the name of the schema that the engine uses."""
    translated = engine.get_execution_options().get("schema_translate_map") or {}
    return translated.get(DEFAULT_SCHEMA) or DEFAULT_SCHEMA


def listen_sql(engine: Engine) -> str:
    """The LISTEN of the channel, quoted always: a channel is case-sensitive."""
    return "LISTEN " + engine.dialect.identifier_preparer.quote_identifier(channel_of(engine))


def open_connection(engine: Engine) -> Any:
    """A driver's connection, made as the engine's are, but of no pool: that may be exhausted.

    Not before the engine has connected once: SQLAlchemy then readies the dialect, and lets others
    wait for that within one pool only; one that does not wait finds it half done.
    """
    pooled = engine.pool.recreate().connect()
    connection = pooled.driver_connection
    pooled.detach()
    return connection


class Listener(threading.Thread):
    """Calls `wake` when work of the group may have become ready, and after each reconnection."""

    def __init__(self, engine: Engine, group: str, wake: Callable[[], None]) -> None:
        super().__init__(name=f"checkpoints-listener-{group}", daemon=True)
        self._engine = engine
        self._group = group
        self._wake = wake
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End within a moment."""
        self._stopped.set()

    def run(self) -> None:
        """Listen until stopped; without a connection, polling serves meanwhile."""
        backoff = Backoff()
        while not self._stopped.is_set():
            try:
                self._listen(backoff)
            except Exception as error:
                with suppress(Exception):
                    logger.debug(
                        "listening was interrupted: %s", error, extra={"group": self._group}
                    )
                self._stopped.wait(backoff.next())

    def _listen(self, backoff: Backoff) -> None:
        connection = open_connection(self._engine)
        try:
            connection.rollback()
            connection.autocommit = True
            connection.execute(listen_sql(self._engine))
            backoff.reset()
            # What was notified before LISTEN took effect is not told again.
            self._wake()
            while not self._stopped.is_set():
                for notification in connection.notifies(timeout=_TURN, stop_after=1):
                    if notification.payload == self._group:
                        self._wake()
        finally:
            # As it was taken: an application's creator may have taken it from a pool of its own,
            # and in autocommit the next handler's writes and position would commit apart.
            with suppress(Exception):
                connection.execute("UNLISTEN *")
            with suppress(Exception):
                connection.autocommit = False
            with suppress(Exception):
                connection.close()
