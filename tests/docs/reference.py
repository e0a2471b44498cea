"""The parts of the reference that are made from the code, its docstrings and its SQL."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Column, Computed, Enum, Index, Table, UniqueConstraint, make_url

import checkpoints
from checkpoints import embedded, errors, migrations, records, runtime, statements, testing
from checkpoints.runtime import telemetry
from checkpoints.runtime._recording import RecorderSettings
from checkpoints.tables import metadata
from tests.docs import diagram
from tests.docs.pages import ROOT

RENDERED = ROOT / "tests" / "rendered"
DIALECT = make_url("postgresql+psycopg://").get_dialect()()

BY_ACTOR: dict[str, list[str]] = {
    "The consumer": [
        "reserve_next_available_checkpoint",
        "get_next_process_at",
        "update_checkpoint_position",
        "update_checkpoint_positions",
        "record_checkpoint_error",
        "release_checkpoint_reservation",
        "extend_checkpoint_reservation",
        "recover_expired_checkpoint_reservations",
        "record_expired_checkpoint_reservations",
    ],
    "The recorder": [
        "record_checkpoints",
        "advance_lagging_subscription_checkpoints",
        "ensure_checkpoint_exists",
        "lock_checkpoint",
    ],
    "Subscriptions": [
        "get_subscription",
        "add_or_update_subscription",
        "set_subscription_status",
        "pause_subscription",
        "resume_subscription",
        "reset_subscription_checkpoints",
        "replay_subscription",
        "finish_replay",
        "rename_subscription",
        "move_subscription",
        "delete_subscription_checkpoints",
        "delete_subscription",
    ],
    "The operator": [
        "get_metrics",
        "list_reservations",
        "list_lagging",
        "list_retries",
        "list_failed",
        "get_checkpoint",
        "schedule_checkpoints",
        "skip_checkpoints",
        "audit_checkpoints",
        "repair_checkpoints",
    ],
}

# A function with two forms of SQL, and what tells them apart.
RENDERINGS: dict[str, dict[str, str]] = {
    "release_checkpoint_reservation": {
        "release_checkpoint_reservation": "With a token:",
        "release_checkpoint_reservation_by_operator": "Without a token:",
    }
}

# The names of `checkpoints.runtime`, by who needs them.
RUNTIME: dict[str, list[str]] = {
    "Consumers": ["Consumer", "AsyncConsumer", "ConsumerSettings", "RetryPolicy"],
    "Handlers": ["OutsideTransaction"],
    "Recorders": ["Recorder", "AsyncRecorder", "RecorderSettings", "Interest", "Start"],
    "Reading": ["MessageTable", "Message", "Position", "XID8", "ForeignTransactionIds"],
    "Telemetry": ["observe_lag"],
}

# What has no docstring of its own is described on the page by hand.
RUNTIME_BY_HAND = {"BEGINNING", "Handler", "AsyncHandler"}

# What the runtime does not export: the settings that are given as keywords, and the telemetry.
_ELSEWHERE: dict[str, Any] = {
    "RecorderSettings": RecorderSettings,
    "observe_lag": telemetry.observe_lag,
}

# Dataclasses with methods for the application.
_WITH_METHODS: tuple[type, ...] = (runtime.MessageTable, runtime.RetryPolicy)

# Their objects are answered by a function.
_MADE_ELSEWHERE: tuple[type, ...] = (embedded.EmbeddedServer,)


def _default(value: object) -> str:
    if isinstance(value, StrEnum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, timedelta):
        return repr(value).removeprefix("datetime.")
    if isinstance(value, Mapping):
        return repr(dict(value))
    if is_dataclass(value):
        return f"{type(value).__name__}()"
    return repr(value)


def signature(name: str, function: Callable[..., Any], answer: str | None = None) -> str:
    """A call, on one line if it is short."""
    parts: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        part = f"{stars}{parameter.name}: {parameter.annotation}"
        if parameter.default is not parameter.empty:
            part += f" = {_default(parameter.default)}"
        parts.append(part)
    arrow = f" -> {answer}" if answer else ""
    line = f"{name}({', '.join(parts)}){arrow}"
    if len(line) <= 92:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){arrow}"])


def prose(documented: object) -> str:
    """A docstring as Markdown: its section of errors becomes a list."""
    text = inspect.getdoc(documented) or ""
    text, _, raised = text.partition("\nRaises:\n")
    if raised:
        entries = re.findall(r"^    (\w[\w., ]*): (.*?)(?=^    \w|\Z)", raised, re.M | re.S)
        lines = [f"- `{name}`: {' '.join(what.split())}" for name, what in entries]
        text = "\n".join([text, "Raises:", "", *lines])
    return text.strip()


def on_the_site(directive: str, name: str, *parts: str) -> list[str]:
    """What a page says of an object, which the site replaces by a directive of autodoc."""
    return [f"<!-- site: {directive} {name} -->", *parts, "<!-- site: end -->"]


def of_statements() -> str:
    """Each statement: how it is called, what it does, its SQL."""
    parts: list[str] = []
    for actor, names in BY_ACTOR.items():
        parts.append(f"## {actor}")
        for name in names:
            function = getattr(statements, name)
            called = f"```text\n{signature(name, function)}\n```"
            described = on_the_site("autofunction", f"checkpoints.{name}", called, prose(function))
            parts += [f"### `{name}`", *described]
            for rendering, title in RENDERINGS.get(name, {name: ""}).items():
                parts += [title] if title else []
                parts.append(f"```sql\n{(RENDERED / f'{rendering}.sql').read_text().strip()}\n```")
    return "\n\n".join(parts)


def of_methods() -> str:
    """The classes of the executing layer, and each method."""
    parts: list[str] = ["## Classes"]
    for executing in (checkpoints.Checkpoints, checkpoints.AsyncCheckpoints):
        name = executing.__name__
        called = f"```text\n{signature(name, executing)}\n```"
        described = on_the_site("autoclass", f"checkpoints.{name}", called, prose(executing))
        parts += [f"### `{name}`", *described]
    for actor, names in BY_ACTOR.items():
        parts.append(f"## {actor}")
        for name in names:
            method = getattr(checkpoints.Checkpoints, name)
            answer = str(inspect.signature(method).return_annotation)
            called = f"```text\n{signature(name, method, answer)}\n```"
            described = on_the_site(
                "automethod", f"checkpoints.Checkpoints.{name}", called, prose(method)
            )
            parts += [f"### `{name}`", *described]
    return "\n\n".join(parts)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _default_of_field(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return f"`{_default(field.default)}`"
    if field.default_factory is not MISSING:
        return f"`{_default(field.default_factory())}`"
    return ""


def _members(enumeration: type[StrEnum]) -> str:
    return "\n".join(f"- `{member.name}`: `{member.value!r}`" for member in enumeration)


def _fields(described: Any) -> str:
    lines = [_row("field", "type", "default"), _row(*["---"] * 3)]
    for field in fields(described):
        type_ = f"`{field.type}`".replace("|", "\\|")
        lines.append(_row(f"`{field.name}`", type_, _default_of_field(field)))
    return "\n".join(lines)


def _methods(module: str, described: type) -> list[str]:
    heading = "####" if module == runtime.__name__ else "###"
    parts: list[str] = []
    for name, function in vars(described).items():
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        if is_dataclass(described) and described not in _WITH_METHODS:
            continue
        answer = str(inspect.signature(function).return_annotation)
        called = signature(name, function, answer)
        if inspect.iscoroutinefunction(function):
            called = f"await {called}"
        method = f"{described.__name__}.{name}"
        shown = [f"```text\n{called}\n```", prose(function)]
        parts += [f"{heading} `{method}`", *on_the_site("automethod", f"{module}.{method}", *shown)]
    return parts


def _described(module: str, name: str, described: Any) -> list[str]:
    """A public name of a module: how it is called, what it is, its fields or its methods."""
    full = f"{module}.{name}"
    if not isinstance(described, type):
        answer = str(inspect.signature(described).return_annotation)
        called = f"```text\n{signature(name, described, answer)}\n```"
        return on_the_site("autofunction", full, called, prose(described))
    if issubclass(described, Exception):
        return on_the_site("autoexception", full, prose(described))
    if issubclass(described, StrEnum):
        members = "\n".join(f"- `{member.name}`: `{member.value!r}`" for member in described)
        return [*on_the_site("autoclass", f"{full}()", prose(described)), members]
    shown = [prose(described)]
    if is_dataclass(described):
        shown.append(_fields(described))
    elif described in _MADE_ELSEWHERE:
        full += "()"
    elif "__init__" in vars(described):
        shown.insert(0, f"```text\n{signature(name, described)}\n```")
    if name not in sys.modules[module].__all__:
        # Autodoc would find it under a private name only.
        return [*shown, *_methods(module, described)]
    return [*on_the_site("autoclass", full, *shown), *_methods(module, described)]


def of_records() -> str:
    """The dataclasses and enumerations."""
    parts: list[str] = []
    for name in records.__all__:
        record = getattr(records, name)
        if isinstance(record, type):
            parts += [f"## `{name}`", *_described("checkpoints", name, record)]
    return "\n\n".join(parts)


def of_runtime() -> str:
    """The classes of `checkpoints.runtime`, with their settings and defaults."""
    parts: list[str] = []
    for heading, names in RUNTIME.items():
        parts.append(f"## {heading}")
        for name in names:
            described = _ELSEWHERE.get(name) or getattr(runtime, name)
            parts += [f"### `{name}`", *_described("checkpoints.runtime", name, described)]
    return "\n\n".join(parts)


def of_module(module: Any) -> str:
    """All public names of a small module."""
    parts: list[str] = []
    for name in module.__all__:
        described = _described(module.__name__, name, getattr(module, name))
        parts += [f"## `{name}`", *described]
    return "\n\n".join(parts)


def _shown(value: object) -> str:
    """A default, durations in the unit that they are said in."""
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
        for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
            if seconds >= size:
                return f"{seconds / size:g} {unit}"
        return f"{seconds * 1000:g} ms"
    return f"`{_default(value)}`"


# What the docstrings of the settings leave to those of the classes.
_MEANINGS = {
    "group": "The name of the group that it works for.",
    "interests": "What each subscription follows; see below.",
    "read": "What reads the messages, such as a `MessageTable`.",
}


def of_settings() -> str:
    """The arguments of consumers and recorders, with what the docstrings say of them."""
    parts: list[str] = []
    for heading, settings in (
        ("Of a consumer", runtime.ConsumerSettings),
        ("Of its retries", runtime.RetryPolicy),
        ("Of a recorder", RecorderSettings),
        ("Of a recorder's interest", runtime.Interest),
    ):
        described: Any = settings
        meanings = {
            name: " ".join(what.split())
            for name, what in re.findall(
                r"^- `(\w+)`: (.*?)(?=^- |\Z)", inspect.getdoc(settings) or "", re.M | re.S
            )
        }
        head = ["setting", "type", "default", *(["meaning"] if meanings else [])]
        lines = [_row(*head), _row(*["---"] * len(head))]
        for field in fields(described):
            if field.default is MISSING and field.default_factory is MISSING:
                default = "needed"
            elif field.default_factory is not MISSING:
                default = _shown(field.default_factory())
            else:
                default = _shown(field.default)
            cells = [f"`{field.name}`", f"`{field.type}`".replace("|", "\\|"), default]
            if meanings:
                meaning = meanings.get(field.name) or _MEANINGS[field.name]
                cells.append(f"{meaning[0].upper()}{meaning[1:]}")
            lines.append(_row(*cells))
        text = [] if meanings else [prose(settings)]
        parts += [f"## {heading}", *text, "\n".join(lines)]
    return "\n\n".join(parts)


def of_errors() -> str:
    """Each error, with its root."""
    parts: list[str] = []
    for name in errors.__all__:
        error = getattr(errors, name)
        described = _described("checkpoints", name, error)
        parts += [f"### `{name}`", *described, f"Base: `{error.__base__.__name__}`."]
    return "\n\n".join(parts)


def _type(column: Column[Any]) -> str:
    if isinstance(column.type, Enum):
        return f"{column.type.schema}.{column.type.name}"
    compiled: str = column.type.compile(DIALECT)
    return {"TIMESTAMP WITH TIME ZONE": "timestamptz"}.get(compiled, compiled.lower())


def _default_of(column: Column[Any]) -> str:
    if column.identity is not None:
        return "identity"
    if isinstance(column.computed, Computed):
        return f"generated: `{column.computed.sqltext}`"
    if column.server_default is not None:
        default: Any = column.server_default
        return f"`{default.arg}`"
    return "null" if column.nullable else ""


def _index(index: Index) -> str:
    where = index.dialect_options["postgresql"]["where"]
    columns = ", ".join(f"`{column.name}`" for column in index.columns)
    return f"- `{index.name}`: {columns}" + ("" if where is None else f", where `{where}`")


def _table(table: Table) -> str:
    lines = [_row("column", "type", "default", "meaning"), _row(*["---"] * 4)]
    lines += [
        _row(f"`{column.name}`", f"`{_type(column)}`", _default_of(column), column.comment or "")
        for column in table.columns
    ]
    keys = [f"- `{table.primary_key.name}`: primary key, `id`"]
    for constraint in sorted(table.constraints, key=lambda each: str(each.name)):
        if isinstance(constraint, UniqueConstraint):
            unique = ", ".join(f"`{column.name}`" for column in constraint.columns)
            keys.append(f"- `{constraint.name}`: unique, {unique}")
    for key in sorted(table.foreign_keys, key=lambda each: each.parent.name):
        deleted = f", on delete {key.ondelete.lower()}" if key.ondelete else ""
        keys.append(
            f"- `{key.constraint.name if key.constraint is not None else ''}`: "
            f"`{key.parent.name}` references `{key.column.table.name}`{deleted}"
        )
    keys += [_index(index) for index in sorted(table.indexes, key=lambda each: str(each.name))]
    return "\n\n".join(
        [f"## `{table.name}`", f"{table.comment}.", "\n".join(lines), "\n".join(keys)]
    )


def of_tables() -> str:
    """A diagram of the tables, and the columns, keys and indexes of each."""
    shown = "![A diagram of the tables: what they hold and what refers to what](tables.svg)"
    return "\n\n".join([shown, *(_table(table) for table in metadata.sorted_tables)])


def diagram_of_tables() -> str:
    """The same as a drawing."""
    return diagram.drawn(metadata, lambda column: _type(column).rpartition(".")[2])


def of_promises() -> str:
    """Which test shows what happens in a fault, from the table beside those tests."""
    lines = [_row("fault", "test"), _row("---", "---")]
    for line in (ROOT / "tests" / "faults" / "PROMISES.md").read_text().splitlines():
        if row := re.fullmatch(r"\| (.+?) \| .* \| `(\w+\.py)::(\w+)`( \*)? \|", line):
            fault, file, test, both = row.groups()
            lines.append(_row(fault, f"[`{test}`](../../tests/faults/{file}){both or ''}"))
    assert len(lines) > 2, "tests/faults/PROMISES.md has another form"
    return "\n".join(lines)


GENERATED: dict[str, Callable[[], str]] = {
    "docs/explanation/faults.md": of_promises,
    "docs/reference/statements.md": of_statements,
    "docs/reference/executing.md": of_methods,
    "docs/reference/records.md": of_records,
    "docs/reference/runtime.md": of_runtime,
    "docs/reference/errors.md": of_errors,
    "docs/reference/settings.md": of_settings,
    "docs/reference/tables.md": of_tables,
    "docs/reference/migrations.md": lambda: of_module(migrations),
    "docs/reference/embedded.md": lambda: of_module(embedded),
    "docs/reference/testing.md": lambda: of_module(testing),
}

# Files of which nothing is written by hand.
FILES: dict[str, Callable[[], str]] = {"docs/reference/tables.svg": diagram_of_tables}

BEGIN = "<!-- From here to the end of the mark, made by `pytest --update-rendered`. -->"
END = "<!-- The end of what is made. -->"


def renewed(page: str) -> str:
    """The text of a page with its generated part as the code has it today."""
    if page in FILES:
        return FILES[page]()
    before, found, rest = (ROOT / page).read_text().partition(BEGIN)
    _, ended, after = rest.partition(END)
    assert found, f"{page} lacks the line {BEGIN}"
    assert ended, f"{page} lacks the line {END}"
    return f"{before}{BEGIN}\n\n{GENERATED[page]()}\n\n{END}{after}"
