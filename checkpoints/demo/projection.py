"""The handlers of the two subscriptions: how messages change the projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Table, bindparam, select
from sqlalchemy.dialects.postgresql import Insert, insert

from checkpoints import Reservation
from checkpoints.demo.tables import authors, lines, messages
from checkpoints.runtime import Handler

__all__ = ["HANDLERS", "LIMIT", "Message", "apply_to_authors", "apply_to_lines", "read_messages"]

# In one transaction, at most.
LIMIT = 500


class Message(NamedTuple):
    """What a commit did to the path that is the stream."""

    version: int
    type: str
    commit: str
    author: str
    added: int | None
    deleted: int | None


def apply_to_lines(connection: Connection, reservation: Reservation) -> int:
    """Add the next messages to the line counts of the path; the new position."""
    received = read_messages(connection, reservation)
    total = {"stream_name": reservation.stream_name, **_counts(received)}
    connection.execute(_add_to_lines, {**total, "last_commit": received[-1].commit})
    return received[-1].version


def apply_to_authors(connection: Connection, reservation: Reservation) -> int:
    """Add the next messages to what each author did to the path; the new position."""
    received = read_messages(connection, reservation)
    by_author: dict[str, list[Message]] = {}
    for message in received:
        by_author.setdefault(message.author, []).append(message)
    connection.execute(
        _add_to_authors,
        [
            {"author": author, "stream_name": reservation.stream_name, **_counts(theirs)}
            for author, theirs in by_author.items()
        ],
    )
    return received[-1].version


HANDLERS: Mapping[str, Handler] = {"lines": apply_to_lines, "authors": apply_to_authors}


def read_messages(connection: Connection, reservation: Reservation) -> list[Message]:
    """The first messages that the checkpoint has not seen, in order, at most `LIMIT`."""
    rows = connection.execute(
        _unseen,
        {
            "stream_name": reservation.stream_name,
            "stream_position": reservation.stream_position,
            "stream_version": reservation.stream_version,
            "limit": LIMIT,
        },
    )
    return [Message(*row) for row in rows]


def _counts(received: Sequence[Message]) -> dict[str, Any]:
    return {
        "changes": len(received),
        "added": sum(message.added or 0 for message in received),
        "deleted": sum(message.deleted or 0 for message in received),
        "binaries": sum(message.type == "binary" for message in received),
    }


def _adding_to(table: Table) -> Insert:
    """An upsert that adds to the counts: not idempotent, so each message must count once."""
    insertion = insert(table)
    added = {
        name: table.c[name] + insertion.excluded[name]
        for name in ("changes", "added", "deleted", "binaries")
    }
    if "last_commit" in table.c:
        added["last_commit"] = insertion.excluded.last_commit
    return insertion.on_conflict_do_update(index_elements=list(table.primary_key), set_=added)


# Built once: to build a statement takes as long as to execute it.
_unseen = (
    select(*(messages.c[name] for name in Message._fields))
    .where(
        messages.c.stream_name == bindparam("stream_name"),
        messages.c.version > bindparam("stream_position"),
        messages.c.version <= bindparam("stream_version"),
    )
    .order_by(messages.c.version)
    .limit(bindparam("limit"))
)
_add_to_lines = _adding_to(lines)
_add_to_authors = _adding_to(authors)
