"""The handler of the workers: it applies messages, and misbehaves where they say so."""

from __future__ import annotations

import os
import signal
import threading
import time
from asyncio import CancelledError, Event, sleep
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, Connection, Row, Text, bindparam, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.util import await_only

from checkpoints import Reservation
from tests.faults.tables import messages, shared, totals

__all__ = ["ASYNCHRONOUS", "BLOCKING", "SHARED_ROWS", "Handling", "Ways", "shared_row_of"]

SHARED_ROWS = 3


@dataclass(frozen=True)
class Ways:
    """How to wait in a handler."""

    sleep: Callable[[float], object]
    hang: Callable[[], object]
    hang_regardless: Callable[[], object]


def _hang() -> None:
    threading.Event().wait()


def _await_regardless() -> None:
    while True:
        with suppress(CancelledError):
            await_only(Event().wait())


BLOCKING = Ways(time.sleep, _hang, _hang)
# The asyncio handler runs the same function by `run_sync`, and awaits through greenlet.
ASYNCHRONOUS = Ways(
    lambda seconds: await_only(sleep(seconds)),
    lambda: await_only(Event().wait()),
    _await_regardless,
)


@dataclass(frozen=True)
class Handling:
    """Applies messages.

    `think`: seconds of Python after each reservation's writes. `gate`: a file that handlers of
    messages of the types "gate…" wait for; `<gate>-<stream>` says that one does.
    `share`: touch rows that other streams touch, too.
    """

    ways: Ways
    think: float = 0
    gate: str | None = None
    share: bool = False

    def __call__(self, connection: Connection, reservation: Reservation) -> None:
        for message in connection.execute(_SELECT, _place(reservation)).all():
            misbehaves = reservation.retry_attempts < message.times
            if misbehaves:
                self._before(message)
            _apply(connection, message)
            if self.share:
                _share(connection, message)
            if misbehaves:
                self._after(connection, message)
        if self.think:
            self.ways.sleep(self.think)

    def _before(self, message: Row[*tuple[Any, ...]]) -> None:
        if message.type == "raise":
            raise ValueError("on purpose")
        if message.type == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if message.type == "gate":
            self._wait_at_gate(message)

    def _after(self, connection: Connection, message: Row[*tuple[Any, ...]]) -> None:
        match message.type:
            case "raise-late":
                raise ValueError("on purpose")
            case "hang":
                self.ways.hang()
            case "hang-regardless":
                self.ways.hang_regardless()
            case "gate-regardless":
                self._wait_at_gate(message, CancelledError)
            case "hang-in-sql":
                connection.execute(select(func.pg_sleep(600)))
            case "exit":
                os._exit(3)
            case "gate-late":
                self._wait_at_gate(message)

    def _wait_at_gate(
        self, message: Row[*tuple[Any, ...]], *suppressed: type[BaseException]
    ) -> None:
        if self.gate is None:
            return
        gate = Path(self.gate)
        gate.with_name(f"{gate.name}-{message.stream_name}").touch()
        while not gate.exists():
            with suppress(*suppressed):
                self.ways.sleep(0.01)


_SELECT = (
    select(
        messages.c.stream_name,
        messages.c.stream_position,
        messages.c.type,
        messages.c.times,
        messages.c.amount,
    )
    .where(
        messages.c.stream_name == bindparam("stream"),
        messages.c.stream_position > bindparam("after"),
        messages.c.stream_position <= bindparam("until"),
    )
    .order_by(messages.c.stream_position)
)


def _place(reservation: Reservation) -> dict[str, object]:
    return {
        "stream": reservation.stream_name,
        "after": reservation.stream_position,
        "until": reservation.stream_version,
    }


_LINK = bindparam("link", type_=Text())
_insertion = insert(totals).values(
    stream_name=bindparam("stream"),
    messages=1,
    amount=bindparam("some", type_=BigInteger()),
    chain=func.md5(_LINK),
)
_APPLY = _insertion.on_conflict_do_update(
    index_elements=[totals.c.stream_name],
    set_={
        "messages": totals.c.messages + 1,
        "amount": totals.c.amount + _insertion.excluded.amount,
        "chain": func.md5(totals.c.chain + _LINK),
    },
)
_SHARE = (
    update(shared)
    .where(shared.c.key == bindparam("shared_key"))
    .values(messages=shared.c.messages + 1)
)


def _apply(connection: Connection, message: Row[*tuple[Any, ...]]) -> None:
    connection.execute(
        _APPLY,
        {
            "stream": message.stream_name,
            "some": message.amount,
            "link": str(message.stream_position),
        },
    )


def shared_row_of(stream: str) -> int:
    """The row that a stream touches: one, for in many the handlers would deadlock."""
    return int(stream.rpartition("-")[2]) % SHARED_ROWS


def _share(connection: Connection, message: Row[*tuple[Any, ...]]) -> None:
    connection.execute(_SHARE, {"shared_key": shared_row_of(message.stream_name)})
