"""What an application's `alembic revision --autogenerate` sees of the tables of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import BLANK_SCHEMA, Enum, MetaData, Table

from checkpoints.migrations import revisions
from checkpoints.tables import DEFAULT_SCHEMA, metadata

__all__ = ["include_name", "include_object", "include_type", "target_metadata"]

_TABLES = frozenset(table.name for table in metadata.sorted_tables)
_TYPES = frozenset(
    column.type.name
    for table in metadata.sorted_tables
    for column in table.columns
    if isinstance(column.type, Enum)
)
# Its schema is None where tables are reflected without naming it.
_PUBLIC = "public"


def include_object(
    object: Any,
    name: str | None,
    type_: str,
    reflected: bool,
    compare_to: Any,
    *,
    schema: str = DEFAULT_SCHEMA,
) -> bool:
    """For `context.configure(include_object=…)`: False for the tables of this package.

    Then autogenerate neither drops nor creates them, nor their columns, indexes and constraints;
    Alembic itself never looks at types, functions and triggers. `schema` is where they lie, by
    `functools.partial(include_object, schema=…)` if it is another one; `public` may be the
    application's too. Call it with `and` in a hook of your own.
    """
    del reflected, compare_to
    return not (type_ == "table" and isinstance(object, Table)) or not _is_ours(
        name, object.schema, schema
    )


def include_name(
    name: str | None,
    type_: str,
    parent_names: Mapping[str, str | None],
    *,
    schema: str = DEFAULT_SCHEMA,
) -> bool:
    """For `context.configure(include_name=…)`: False for the tables of this package.

    As `include_object`, but before the database is asked about them, and only for what is in the
    database: it must not be used where `target_metadata` has these tables, since they would all be
    created again.
    """
    return type_ != "table" or not _is_ours(name, parent_names.get("schema_name"), schema)


def include_type(name: str) -> bool:
    """False for the enumerated types of this package, in any schema.

    Alembic itself looks at no types. This is for plugins that do: of alembic-postgresql-enum it is
    `set_configuration(Config(include_name=include_type))`.
    """
    return name not in _TYPES


def target_metadata(*, schema: str = DEFAULT_SCHEMA) -> MetaData:
    """The tables as this code needs them in a schema, to be compared with those in the database.

    For `context.configure(target_metadata=[app.metadata, target_metadata()], include_schemas=True)`
    and without the hooks above. In the schema `checkpoints` it is a copy of
    `checkpoints.metadata`. For `public`, `include_schemas` is not needed.
    """
    revisions.schema_name("schema", schema)
    target = MetaData(naming_convention=metadata.naming_convention)
    for table in metadata.sorted_tables:
        if schema == _PUBLIC:
            # As they are reflected; a key or a type with a schema would differ.
            table.to_metadata(
                target,
                schema=None,  # type: ignore[arg-type]
                referred_schema_fn=lambda *_: BLANK_SCHEMA,  # type: ignore[arg-type]
            )
        else:
            table.to_metadata(target, schema=schema)
    return target


def _is_ours(name: str | None, found_in: str | None, schema: str) -> bool:
    if (found_in or _PUBLIC) != schema:
        return False
    # The version table of migrations that are run apart; in `public` it is the application's.
    return name in _TABLES or (name == "alembic_version" and schema != _PUBLIC)
