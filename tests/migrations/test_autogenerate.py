"""What an application's autogenerate proposes beside the tables of this package: nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import URL, text

from checkpoints import migrations
from tests.migrations.projects import Project, start_project
from tests.migrations.support import engine_of, upgrade

CLEAN = "No new upgrade operations detected.\n"
OURS = "target_metadata=[app.metadata, checkpoints.metadata]"
SCHEMAS = "include_schemas=True"
NAME = "include_name=migrations.include_name"
OBJECT = "include_object=migrations.include_object"
PARTIAL = "__import__('functools').partial(migrations.include_{0}, schema={1!r})"


def partial(kind: str, schema: str) -> str:
    return f"include_{kind}={PARTIAL.format(kind, schema)}"


@pytest.fixture
def project(tmp_path: Path, database_url: URL) -> Project:
    made = start_project(tmp_path, database_url)
    made.alembic("upgrade", "head")
    return made


def check(project: Project) -> str:
    """What `alembic check` says, be it good or bad."""
    done = project.run("alembic", "check")
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + "".join(
        line for line in done.stderr.splitlines(keepends=True) if "INFO" not in line
    )


def install(project: Project, schema: str) -> None:
    project.write("base", "--schema", schema)
    project.alembic("upgrade", "head")


@pytest.mark.parametrize("apart", [False, True], ids=["in_the_history", "apart"])
@pytest.mark.parametrize(
    ("schema", "options", "target"),
    [
        # Not to look into other schemas is Alembic's default.
        ("checkpoints", "", "app.metadata"),
        ("checkpoints", f"{SCHEMAS}, {NAME}", "app.metadata"),
        ("checkpoints", f"{SCHEMAS}, {OBJECT}", "app.metadata"),
        ("checkpoints", f"{SCHEMAS}, {NAME}, {OBJECT}", "app.metadata"),
        ("checkpoints", OBJECT, "[app.metadata, checkpoints.metadata]"),
        ("checkpoints", f"{SCHEMAS}, {OBJECT}", "[app.metadata, checkpoints.metadata]"),
        ("billing", f"{SCHEMAS}, {partial('name', 'billing')}", "app.metadata"),
        ("billing", f"{SCHEMAS}, {partial('object', 'billing')}", "app.metadata"),
        ("public", partial("name", "public"), "app.metadata"),
        ("public", partial("object", "public"), "app.metadata"),
        ("public", f"{SCHEMAS}, {partial('object', 'public')}", "app.metadata"),
    ],
)
def test_the_hooks_leave_the_tables_alone(
    *, project: Project, schema: str, options: str, target: str, apart: bool
) -> None:
    if apart and schema != "public":
        upgrade(project.url, schema=schema)
    else:
        install(project, schema)
    project.configure(options, target=target)
    assert check(project) == CLEAN
    # What is the application's own is seen all the same.
    project.change(project.folder / "app.py", "    name: Mapped[str]", "    mail: Mapped[str]")
    said = check(project)
    assert "'mail'" in said
    assert "checkpoint" not in said
    assert "subscription" not in said


@pytest.mark.parametrize(
    ("schema", "options", "target"),
    [
        ("checkpoints", SCHEMAS, "[app.metadata, checkpoints.metadata]"),
        ("checkpoints", SCHEMAS, "[app.metadata, migrations.target_metadata()]"),
        ("billing", SCHEMAS, "[app.metadata, migrations.target_metadata(schema='billing')]"),
        ("public", "", "[app.metadata, migrations.target_metadata(schema='public')]"),
        ("public", SCHEMAS, "[app.metadata, migrations.target_metadata(schema='public')]"),
    ],
)
def test_the_tables_can_be_compared_and_do_not_differ(
    project: Project, schema: str, options: str, target: str
) -> None:
    install(project, schema)
    project.configure(f"{options}{', ' if options else ''}compare_server_default=True")
    project.change(project.env, "= app.metadata", f"= {target}")
    assert check(project) == CLEAN
    with engine_of(project.url) as engine, engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE {schema}.checkpoints DROP COLUMN retries"))
    assert "'retries'" in check(project)


@pytest.mark.parametrize(
    ("schema", "options", "said"),
    [("checkpoints", SCHEMAS, "checkpoints.checkpoints"), ("public", "", "checkpoints_ready")],
)
def test_without_a_hook_autogenerate_would_drop_them(
    project: Project, schema: str, options: str, said: str
) -> None:
    install(project, schema)
    project.configure(options)
    assert "remove_table" in check(project)
    assert said in check(project)


def test_the_types_are_told_from_others(migrated_url: URL) -> None:
    with engine_of(migrated_url) as engine, engine.connect() as connection:
        types = connection.scalars(
            text(
                "SELECT typname FROM pg_type WHERE typtype = 'e' "
                "AND typnamespace = CAST('checkpoints' AS regnamespace)"
            )
        ).all()
    assert len(types) == 2
    assert [name for name in [*types, "mood"] if migrations.include_type(name)] == ["mood"]


def test_tables_of_the_same_names_in_another_schema_are_the_applications(
    project: Project,
) -> None:
    install(project, "checkpoints")
    project.configure(f"{SCHEMAS}, {NAME}, {OBJECT}")
    (project.folder / "app.py").write_text(
        (project.folder / "app.py")
        .read_text()
        .replace('"orders"', '"subscriptions"')
        .replace("class Order", "class Subscription")
    )
    said = check(project)
    assert "add_table" in said
    assert "'subscriptions'" in said
