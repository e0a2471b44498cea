"""The verdict: what the workers made of the history, against what git says of it by another way.

The recorder reads `git log -z`, the oldest first. Here the log is read the newest first, line by
line, its quoted names decoded, and summed up by the database. Only `text_of` is shared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Connection,
    Engine,
    Select,
    Table,
    and_,
    cast,
    func,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by

from checkpoints import Checkpoints
from checkpoints.demo import DemoError
from checkpoints.demo.history import Repository, log_lines, text_of
from checkpoints.demo.tables import authors, copy_rows, lines, recount

__all__ = ["Check", "recounted", "unquoted", "verdict"]

_SHOWN = 5
_MARK = b"\x02"
_ESCAPED = re.compile(rb'\\([abtnvfr"\\]|[0-7]{3})')
_LETTERS = dict(zip(b'abtnvfr"\\', b'\a\b\t\n\v\f\r"\\', strict=True))


@dataclass(frozen=True)
class Check:
    """One thing that must hold: what was found, and the first things that are not as expected."""

    name: str
    found: str
    differences: Sequence[str] = ()

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return not self.differences


def verdict(engine: Engine, repository: Repository) -> list[Check]:
    """Everything that must hold when all is done."""
    with engine.connect() as connection:
        copy_rows(connection, recount, recount.c, recounted(repository))
        checks = [_compare(connection, lines), _compare(connection, authors)]
        # Not committed: the recount is of no further use.
        connection.rollback()
        return [*checks, _audit(connection), _nothing_left(connection)]


def recounted(repository: Repository) -> Iterator[tuple[Any, ...]]:
    """The rows of `recount`: every change in the history, the newest first."""
    commit = author = ""
    number = 0
    with closing(log_lines(repository, f"{_MARK.decode()}%H %an <%ae>")) as log:
        for ended_line in log:
            line = ended_line.removesuffix(b"\n")
            if line.startswith(_MARK):
                given, _, name = line[1:].partition(b" ")
                commit, author = given.decode(), text_of(name)
            elif line:
                counts = re.fullmatch(rb"(?:(\d+)\t(\d+)|-\t-)\t(.+)", line)
                if counts is None:
                    raise DemoError(f"git log said {line[:80]!r} where line counts were expected")
                added, deleted, name = counts.groups()
                number += 1
                yield (
                    number,
                    commit,
                    author,
                    text_of(unquoted(name)),
                    None if added is None else int(added),
                    None if deleted is None else int(deleted),
                )


def unquoted(name: bytes) -> bytes:
    """A path as it is, from the form in which git shows it to people."""
    if not name.startswith(b'"'):
        return name
    return _ESCAPED.sub(_unescaped, name[1:-1])


def _unescaped(match: re.Match[bytes]) -> bytes:
    escape = match[1]
    return bytes([int(escape, 8) if len(escape) == 3 else _LETTERS[escape[0]]])


def _expected(projection: Table) -> Select[*tuple[Any, ...]]:
    """The projection as it should be."""

    def total(column: Any) -> Any:
        return cast(func.coalesce(func.sum(column), 0), BigInteger)

    values = {
        "changes": func.count(),
        "added": total(recount.c.added),
        "deleted": total(recount.c.deleted),
        "binaries": func.count().filter(recount.c.added.is_(None)),
        "last_commit": func.array_agg(aggregate_order_by(recount.c.commit, recount.c.number))[1],
    }
    keys = [recount.c[key.name] for key in projection.primary_key]
    counted = [values[column.name].label(column.name) for column in _values(projection)]
    return select(*keys, *counted).group_by(*keys)


def _values(projection: Table) -> list[Any]:
    return [column for column in projection.c if not column.primary_key]


def _compare(connection: Connection, projection: Table) -> Check:
    expected = _expected(projection).subquery("expected")
    keys = [key.name for key in projection.primary_key]
    values = [column.name for column in _values(projection)]
    different = (
        select(
            func.count().over().label("total"),
            *(func.coalesce(projection.c[key], expected.c[key]) for key in keys),
            *(projection.c[value] for value in values),
            *(expected.c[value] for value in values),
        )
        .select_from(
            projection.join(
                expected, and_(*(projection.c[key] == expected.c[key] for key in keys)), full=True
            )
        )
        .where(or_(*(projection.c[name].is_distinct_from(expected.c[name]) for name in values)))
        .limit(_SHOWN)
    )
    differences = []
    total = 0
    for row in connection.execute(different):
        total, *rest = row
        key, rest = rest[: len(keys)], rest[len(keys) :]
        pairs = zip(values, rest[: len(values)], rest[len(values) :], strict=True)
        wrong = ", ".join(
            f"{name} {is_!r}, git says {says!r}" for name, is_, says in pairs if is_ != says
        )
        differences.append(f"{' in '.join(map(repr, key))}: {wrong}")
    count = connection.execute(select(func.count()).select_from(projection)).scalar_one()
    found = f"{count:,} rows equal to git log --numstat"
    if total:
        found = f"{total:,} of {count:,} rows differ from git log --numstat"
        differences += [f"and {total - _SHOWN:,} more"] if total > _SHOWN else []
    return Check(f"projection {projection.name}", found, differences)


def _audit(connection: Connection) -> Check:
    violations = Checkpoints(connection).audit_checkpoints()
    return Check(
        "audit_checkpoints()",
        f"{len(violations):,} violations",
        [f"checkpoint {found.id}: {found.violation}" for found in violations[:_SHOWN]],
    )


def _nothing_left(connection: Connection) -> Check:
    left = []
    for metrics in Checkpoints(connection).get_metrics():
        counts = {
            name: getattr(metrics, name) for name in ("ready", "reserved", "retry", "failed", "lag")
        }
        left += [f"{metrics.name}: {count:,} {name}" for name, count in counts.items() if count]
    return Check(
        "work left", "something is left" if left else "none ready, reserved or failed", left
    )
