"""pgbench on the same SQL: what the server does when no Python is in the way."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from tests.benchmarks.load import ClientFailed
from tests.benchmarks.texts import Text, texts

__all__ = ["rate", "script"]

_VARIABLES = {"host": "PGHOST", "port": "PGPORT", "sslmode": "PGSSLMODE"}


def script(design: str, batch: int) -> str | None:
    """A cycle as a script of pgbench; None, where it cannot be one.

    `\\gset` fails the client unless exactly one row comes back: what is counted was done.
    """
    made = texts(design, batch)
    if batch == 1:
        reserve = _rendered(made.reserve, {})
        changing = {"id": ":id", "token": ":reserved_until", "position": ":position"}
        names = {key: value for key, value in changing.items() if key in made.update.names}
        update = _rendered(made.update, names)
        return f"{reserve} \\gset\n\\set position :stream_position + 1\n{update} \\gset done_\n"
    if design != "two tables" or made.update_many is None:
        return None
    head, _, moved = _rendered(made.reserve, {}).rpartition("\nINSERT")
    reserve = f"{head}, moved AS (\nINSERT{moved})\nSELECT array_agg(id) AS ids FROM moved"
    head, _, moved = _rendered(made.update_many, {"ids": ":ids"}).rpartition("\nINSERT")
    update = f"{head}, moved AS (\nINSERT{moved})\nSELECT count(*) AS many FROM moved"
    # Of fewer than a batch it divides by zero, and so fails.
    check = f"\\set whole 1 / (case when :done_many = {batch} then 1 else 0 end)"
    return f"{reserve} \\gset\n{update} \\gset done_\n{check}\n"


def rate(program: str, url: str, text: str, clients: int, seconds: float, batch: int = 1) -> float:
    """Checkpoints/s that pgbench moved with prepared statements; its time is in whole seconds.

    A short run before warms the server up, not the connections: those of a run are its own.

    Raises:
        ClientFailed: It did not run, or a client failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cycle.sql"
        file.write_text(text)
        common = [program, "-n", "-M", "prepared", "-c", str(clients), "-f", str(file)]
        common += ["-j", str(min(clients, os.cpu_count() or 1))]
        _run([*common, "-t", "10"], url)
        said = _run([*common, "-T", str(max(1, round(seconds)))], url)
    found = re.search(r"^tps = ([\d.]+) \(without initial", said, re.MULTILINE)
    failed = re.search(r"^number of failed transactions: ([1-9]\d*)", said, re.MULTILINE)
    if found is None or failed is not None:
        raise ClientFailed(f"pgbench: {said}")
    return float(found[1]) * batch


def _run(command: list[str], url: str) -> str:
    done = subprocess.run(
        command, env=_environment(url), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ClientFailed(f"pgbench ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def _environment(url: str) -> Mapping[str, str]:
    parsed = make_url(url)
    given: dict[str, Any] = {
        "PGHOST": parsed.host,
        "PGPORT": parsed.port,
        "PGUSER": parsed.username,
        "PGPASSWORD": parsed.password,
        "PGDATABASE": parsed.database,
    } | {_VARIABLES[key]: value for key, value in parsed.query.items() if key in _VARIABLES}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    return kept | {key: str(value) for key, value in given.items() if value is not None}


def _rendered(text: Text, changing: Mapping[str, str]) -> str:
    """The text with what stays as literals, and what changes as pgbench's variables."""
    values = {name: _literal(value) for name, value in text.fixed.items()}
    values |= {text.names[key]: variable for key, variable in changing.items()}
    without_comments = re.sub(r"^--.*\n", "", text.sql, flags=re.MULTILINE).strip()
    return re.sub(
        r"%\((\w+)\)s|%%", lambda match: values[match[1]] if match[1] else "%", without_comments
    )


def _literal(value: Any) -> str:
    match value:
        case None:
            return "NULL"
        case int():
            return str(value)
        case timedelta():
            return f"'{value.total_seconds():g} seconds'"
        case list():
            return "'{" + ",".join(str(item) for item in value) + "}'"
    quoted = str(value).replace("'", "''")
    return f"'{quoted}'"
