"""Which errors pass by themselves, as when the database is away, and how long to wait for it."""

from __future__ import annotations

import random
import threading
from contextlib import suppress

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from checkpoints.runtime.telemetry import logger

# Classes: connection exceptions, too few resources (connections, memory, disk), the operator's
# (shutdown, crash, starting up, statement timeout), system errors. Code: read-only after a
# failover.
_AWAY_CLASSES = ("08", "53", "57", "58")
_AWAY_CODES = {"25006"}
# Serialization failure and deadlock: the same transaction may succeed when it is tried again.
_CONFLICTS = {"40001", "40P01"}
_LOCKED = "55P03"


def _sqlstate(error: BaseException) -> str | None:
    original = error.orig if isinstance(error, DBAPIError) else error
    code: object = getattr(original, "sqlstate", None)
    return code if isinstance(code, str) else None


def is_outage(error: BaseException) -> bool:
    """Whether the database, or a connection to it, cannot be had for now."""
    if isinstance(error, PoolTimeoutError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    code = _sqlstate(error)
    if code is None:
        # Without an answer of the server: it could not be reached, or the connection broke.
        return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
    return error.connection_invalidated or code.startswith(_AWAY_CLASSES) or code in _AWAY_CODES


def is_conflict(error: BaseException) -> bool:
    """Whether another transaction was in the way: the whole transaction may be run again."""
    return _sqlstate(error) in _CONFLICTS


def is_passing(error: BaseException) -> bool:
    """Whether the same transaction may succeed later: an outage, a conflict or a lock."""
    return is_outage(error) or is_conflict(error) or _sqlstate(error) == _LOCKED


class Backoff:
    """Waits that double, with jitter, so that many processes do not come back at once."""

    def __init__(self, first: float = 0.1, longest: float = 5.0) -> None:
        self._first = first
        self._longest = longest
        self._next = first

    def next(self) -> float:
        """How many seconds to wait now: half of it is chance."""
        wait = self._next
        self._next = min(self._longest, wait * 2)
        return wait * random.uniform(0.5, 1.0)  # noqa: S311  # not a secret

    def reset(self) -> None:
        """Begin with the first wait again."""
        self._next = self._first


class OutageLog:
    """Says once that the database is away, and once that it is back; from any thread."""

    def __init__(self, group: str) -> None:
        self._group = group
        self._away = False
        self._lock = threading.Lock()

    def away(self, error: BaseException) -> None:
        """The database could not be reached."""
        with self._lock:
            if self._away:
                return
            self._away = True
        # Logging of the application's that raises must not stop the work.
        with suppress(Exception):
            reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            logger.warning(
                "the database is away or too busy, waiting for it: %s",
                reason,
                extra={"group": self._group},
            )

    def back(self) -> None:
        """The database answered."""
        if self._away and self._returns():
            with suppress(Exception):
                logger.info("the database is back", extra={"group": self._group})

    def _returns(self) -> bool:
        with self._lock:
            was_away, self._away = self._away, False
        return was_away
