"""The SQL texts that a client runs: the toolkit's, of earlier revisions, of two bare tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import Select, make_url

import checkpoints
from checkpoints import CheckpointRecord, PositionUpdate

__all__ = ["GROUP", "SQL", "TIMEOUT", "Text", "Texts", "texts"]

GROUP = "benchmark"
TIMEOUT = timedelta(minutes=10)
SQL = Path(__file__).with_name("sql")

# Values that are looked for, to know which parameter of a statement is which.
_ID, _POSITION, _VERSION = 987_654_321, 123_456_789, 223_456_789
_TOKEN = datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC)


@dataclass(frozen=True)
class Text:
    """A statement for psycopg, the parameters that stay, and those that change by what they are."""

    sql: str
    fixed: Mapping[str, Any]
    names: Mapping[str, str]

    def bound(self, **values: Any) -> dict[str, Any]:
        """The parameters of one execution."""
        return {**self.fixed, **{self.names[key]: value for key, value in values.items()}}


@dataclass(frozen=True)
class Texts:
    """The statements of a design; None: it has none."""

    reserve: Text
    update: Text
    update_many: Text | None
    record: Text | None


@cache
def texts(design: str, limit: int = 1) -> Texts:
    """The statements of "head" (the toolkit's own), "0.22.0", "0.23.0" or "two tables"."""
    if design == "head":
        update = PositionUpdate(_ID, _TOKEN, _POSITION)
        return Texts(
            _compiled(checkpoints.reserve_next_available_checkpoint(GROUP, TIMEOUT, limit=limit)),
            _compiled(checkpoints.update_checkpoint_position(_ID, _TOKEN, _POSITION)),
            _compiled(checkpoints.update_checkpoint_positions([update])),
            _compiled(
                checkpoints.record_checkpoints([CheckpointRecord(_ID, "s", _VERSION, _POSITION)])
            ),
        )
    folder = SQL / design.replace(".", "_").replace(" ", "_")
    reserve = {
        "reserve_group_name": GROUP,
        "reserve_timeout": TIMEOUT,
        "reserve_limit": limit,
        "reserve_subscription_statuses": ["active", "replay"],
        "reserve_subscription_names": None,
    }
    one = {
        "id": "update_id",
        "token": "update_reserved_until",
        "position": "update_stream_position",
    }
    record = {
        key: f"record_{name}"
        for key, name in {
            "ids": "subscription_ids",
            "streams": "stream_names",
            "versions": "stream_versions",
            "positions": "stream_positions",
        }.items()
    }
    return Texts(
        Text((folder / "reserve.sql").read_text(), reserve, {}),
        Text(
            (folder / "update.sql").read_text(),
            {"update_process_at": None, "update_process_in": None},
            one,
        ),
        _frozen_many(folder / "update_many.sql"),
        _optional(folder / "record.sql", record),
    )


def _optional(file: Path, names: Mapping[str, str]) -> Text | None:
    return Text(file.read_text(), {}, names) if file.exists() else None


def _frozen_many(file: Path) -> Text | None:
    names = {
        "ids": "update_ids",
        "tokens": "update_reserved_untils",
        "positions": "update_stream_positions",
    }
    return _optional(file, names)


def _compiled(statement: Select[*tuple[Any, ...]]) -> Text:
    """A statement of the toolkit as SQLAlchemy gives it to psycopg."""
    dialect = make_url("postgresql+psycopg://").get_dialect()()
    compiled = statement.compile(dialect=dialect)
    kinds: list[tuple[str, Any]] = [
        ("id", _ID),
        ("token", _TOKEN),
        ("position", _POSITION),
        ("ids", [_ID]),
        ("tokens", [_TOKEN]),
        ("positions", [_POSITION]),
        ("versions", [_VERSION]),
        ("streams", ["s"]),
    ]
    names, fixed = {}, {}
    for name, value in compiled.params.items():
        kind = next((kind for kind, wanted in kinds if value == wanted), None)
        if kind is None:
            fixed[name] = value
        else:
            names[kind] = name
    return Text(str(compiled), fixed, names)
