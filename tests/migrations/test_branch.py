"""The packaged revisions as a labelled branch, with what there is to fall over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, Connection, text

from checkpoints import migrations
from checkpoints.migrations.revisions import known
from tests.migrations.catalogue import fingerprint
from tests.migrations.projects import Project, install, start_project
from tests.migrations.support import engine_of, psql

HEAD = migrations.head()
LOCATIONS = (
    "# version_locations = %(here)s/bar:%(here)s/bat:%(here)s/alembic/versions\n",
    "version_locations =\n  %(here)s/migrations/versions\n  checkpoints:alembic/versions\n",
)
NEWLINE = ("\npath_separator = os\n", "\npath_separator = newline\n")
CONFIGURED = (
    "        with context.begin_transaction():\n            context.run_migrations()\n\n\nif",
    "        migrations.configure_branch(context, schema={!r})\n"
    "        with context.begin_transaction():\n            context.run_migrations()\n\n\nif",
)


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as a wheel has it: the migrations inside."""
    return install(tmp_path_factory.mktemp("installation"))


@pytest.fixture
def project(tmp_path: Path, database_url: URL, installation: Path) -> Project:
    made = start_project(tmp_path, database_url)
    made.alembic("upgrade", "head")
    made.environment["PYTHONPATH"] = os.pathsep.join([str(installation), str(tmp_path)])
    made.change(made.ini, *LOCATIONS)
    made.change(made.ini, *NEWLINE)
    return made


@pytest.fixture
def connection(project: Project) -> Iterator[Connection]:
    with engine_of(project.url) as engine, engine.connect() as made:
        yield made


def configure(project: Project, schema: str = "checkpoints") -> None:
    project.change(project.env, CONFIGURED[0], CONFIGURED[1].format(schema))


@pytest.mark.parametrize("schema", ["checkpoints", "billing", "public"])
def test_heads_upgrades_both(
    project: Project, connection: Connection, migrated_url: URL, schema: str
) -> None:
    configure(project, schema)
    project.alembic("upgrade", "heads")
    with engine_of(migrated_url) as engine, engine.connect() as other:
        assert set(fingerprint(other)) <= set(fingerprint(connection, schema))
    migrations.verify(connection, schema=schema)
    connection.rollback()
    project.alembic("current", "--check-heads")
    versions = connection.scalars(text("SELECT version_num FROM public.alembic_version")).all()
    connection.rollback()
    assert len(versions) == 2
    assert HEAD in versions

    project.alembic("downgrade", "checkpoints@base")
    assert migrations.installed_revision(connection, schema=schema) is None
    connection.rollback()
    project.alembic("upgrade", f"checkpoints@{known()[1]}")
    assert migrations.installed_revision(connection, schema=schema) == known()[1]
    connection.rollback()
    project.alembic("upgrade", "checkpoints@head")
    assert migrations.installed_revision(connection, schema=schema) == HEAD


@pytest.mark.parametrize("schema", ["checkpoints", "public"])
def test_the_script_of_the_branch(project: Project, connection: Connection, schema: str) -> None:
    run = "with context.begin_transaction():\n"
    call = f"migrations.configure_branch(context, schema={schema!r})\n"
    text = project.env.read_text()
    for indent in (" " * 4, " " * 8):
        assert text.count(f"\n{indent}{run}") == 1
        text = text.replace(f"\n{indent}{run}", f"\n{indent}{call}{indent}{run}")
    project.env.write_text(text)
    (first,) = project.folder.glob("migrations/versions/*_first.py")
    script = project.alembic("upgrade", f"{first.name.partition('_')[0]}:heads", "--sql")
    done = psql(project.url, "\\set ON_ERROR_STOP on\n" + script)
    assert (done.returncode, done.stderr) == (0, "")
    migrations.verify(connection, schema=schema)


def test_head_alone_is_ambiguous(project: Project) -> None:
    configure(project)
    assert "Multiple head revisions are present" in project.refused("upgrade", "head")
    assert "Multiple heads" in project.refused("revision", "-m", "second")


def test_a_revision_of_the_application_names_its_branch(project: Project) -> None:
    configure(project)
    project.alembic("upgrade", "heads")
    (first,) = project.folder.glob("migrations/versions/*_first.py")
    mine = first.name.partition("_")[0]
    project.alembic("revision", "-m", "second", "--head", f"{mine}@head")
    (second,) = project.folder.glob("migrations/versions/*_second.py")
    assert f"down_revision: Union[str, Sequence[str], None] = {mine!r}" in second.read_text()
    project.alembic("upgrade", "heads")


def test_merged_heads_last_until_the_next_revision_of_the_package(
    project: Project, tmp_path: Path
) -> None:
    configure(project)
    (first,) = project.folder.glob("migrations/versions/*_first.py")
    mine = first.name.partition("_")[0]
    # Into the folder of the first that is named: not into the package.
    project.alembic("merge", "-m", "merged", mine, HEAD)
    project.alembic("upgrade", "head")

    newer = install(
        tmp_path / "newer",
        f'revision = "99.0.0"\ndown_revision = {HEAD!r}\n\n\n'
        "def upgrade() -> None:\n    pass\n\n\ndef downgrade() -> None:\n    pass\n",
    )
    project.environment["PYTHONPATH"] = os.pathsep.join([str(newer), str(tmp_path)])
    assert "Multiple head revisions are present" in project.refused("upgrade", "head")
    assert mine in project.alembic("history")


def test_depends_on_does_not_make_one_head_of_two(project: Project) -> None:
    configure(project)
    (first,) = project.folder.glob("migrations/versions/*_first.py")
    mine = first.name.partition("_")[0]
    project.alembic("revision", "-m", "second", "--head", f"{mine}@head", "--depends-on", HEAD)
    project.alembic("upgrade", f"{mine}@head")
    assert "Multiple head revisions are present" in project.refused("upgrade", "head")


def test_the_base_is_that_of_both(project: Project, connection: Connection) -> None:
    configure(project)
    project.alembic("upgrade", "heads")
    project.alembic("downgrade", "base")
    assert migrations.installed_revision(connection) is None
    assert not connection.dialect.has_table(connection, "customers")


def test_a_colon_that_splits_is_said(project: Project) -> None:
    """`path_separator = os` is what `alembic init` writes: the revisions are silently not there."""
    configure(project)
    project.change(project.ini, *reversed(NEWLINE))
    project.change(
        project.ini,
        LOCATIONS[1],
        "version_locations = %(here)s/migrations/versions:checkpoints:alembic/versions\n",
    )
    line = project.refused("upgrade", "heads")
    assert "is not among the revisions of this environment" in line
    assert "path_separator = newline" in line


def test_without_the_hook_the_tables_go_to_no_schema(project: Project) -> None:
    """The revisions take the schema of the version table, which here is none."""
    done = project.run("alembic", "upgrade", "heads")
    assert done.returncode != 0


def test_the_environment_of_the_packaged_revisions_refuses_what_the_branch_made(
    project: Project,
) -> None:
    configure(project)
    project.alembic("upgrade", "heads")
    done = project.run("checkpoints", "migrate")
    assert done.returncode == 2
    assert "were not made by this environment" in done.stderr


def test_the_first_way_can_follow_the_branch(project: Project, connection: Connection) -> None:
    """The branch is taken out of the settings, and its row out of the version table."""
    configure(project)
    project.alembic("upgrade", "heads")
    project.change(project.ini, *reversed(LOCATIONS))
    project.change(project.env, CONFIGURED[1].format("checkpoints"), CONFIGURED[0])
    connection.execute(
        text("DELETE FROM public.alembic_version WHERE version_num = :head"), {"head": HEAD}
    )
    connection.commit()
    project.write("base")
    project.alembic("upgrade", "head")
    project.alembic("current", "--check-heads")
    migrations.verify(connection)
