"""`alembic` as an operator runs it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import URL, text

from checkpoints import alembic_config
from tests.migrations.catalogue import fingerprint
from tests.migrations.support import HEAD, ROOT, alembic, downgrade, engine_of, fill, psql, upgrade
from tests.support.factories import violations

REVISIONS = sorted((ROOT / "alembic" / "versions").glob("*.py"))


def shown(url: URL) -> str:
    return url.render_as_string(hide_password=False)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "no database: set DATABASE_URL, or pass -x url="),
        ("nonsense", "the database URL cannot be read: expected postgresql+psycopg://"),
        ("postgresql://user@host:port/name", "the database URL cannot be read"),
        ("sqlite:///some.db", "the database must be PostgreSQL, not 'sqlite'"),
        ("postgresql+none://user@host/name", "the database's driver is missing: "),
        ("postgresql+pg8000://user@host/name", "the database's driver is missing: "),
        ("postgresql+psycopg_async://user@host/name", "is for asyncio only"),
        (
            "postgresql://user:secret@127.0.0.1:1/name?password=secret",
            "the database at postgresql+psycopg://user:***@127.0.0.1:1/name cannot be reached: ",
        ),
        ("postgresql://user@/name?host=/nowhere", "host=%2Fnowhere cannot be reached: "),
        ("postgresql://user@127.0.0.1/name?nonsense=1", "nonsense"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line(url: str, message: str) -> None:
    done = alembic("upgrade", "head", DATABASE_URL=url)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("INFO")]
    assert len(lines) == 1, done.stderr
    assert message in lines[0]
    assert "secret" not in done.stderr + done.stdout
    assert done.returncode != 0


def test_a_percent_sign_in_the_ini_is_one_line(tmp_path: Path) -> None:
    ini = (ROOT / "alembic.ini").read_text().replace("%(here)s", str(ROOT).replace("%", "%%"))
    path = tmp_path / "alembic.ini"
    line = "sqlalchemy.url = postgresql+psycopg://user:a%2Fb@127.0.0.1:1/name"
    path.write_text(ini.replace("# sqlalchemy.url = postgresql+psycopg://user@host/database", line))
    done = alembic("current", ini=path)
    assert "write each % in it as %%" in done.stderr
    assert "Traceback" not in done.stderr
    path.write_text(path.read_text().replace("%2F", "%%2F"))
    done = alembic("current", ini=path)
    assert "user:***@127.0.0.1:1/name cannot be reached" in done.stderr


@pytest.mark.parametrize(
    "option", ["shema=other", "other", "schema=", "url=", f"schema={'s' * 64}"]
)
def test_an_option_that_is_not_understood_is_one_line(database_url: URL, option: str) -> None:
    done = alembic("-x", option, "upgrade", "head", DATABASE_URL=shown(database_url))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "-x " in done.stderr or "at most 63 bytes" in done.stderr


@pytest.mark.parametrize(
    ("url", "schema", "error"),
    [
        ("", "a", ValueError),
        (None, "a", TypeError),
        ("postgresql://", "", ValueError),
        ("postgresql://", 3, TypeError),
    ],
)
def test_a_config_is_of_a_url_and_a_schema(url: Any, schema: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"url must|schema must"):
        alembic_config(url, schema=schema)


def test_an_ini_of_one_section_is_enough(database_url: URL, tmp_path: Path) -> None:
    ini = tmp_path / "alembic.ini"
    ini.write_text(f"[alembic]\nscript_location = {ROOT / 'alembic'}\npath_separator = os\n")
    done = alembic("upgrade", "head", ini=ini, DATABASE_URL=shown(database_url))
    assert done.returncode == 0, done.stderr
    current = alembic("current", ini=ini, DATABASE_URL=shown(database_url))
    assert f"{HEAD} (head)" in current.stdout


def test_the_url_on_the_command_line_comes_before_the_variable(database_url: URL) -> None:
    done = alembic("-x", f"url={shown(database_url)}", "upgrade", "head", DATABASE_URL="nonsense")
    assert done.returncode == 0, done.stderr
    assert alembic("current", DATABASE_URL=shown(database_url)).stdout.split() == [
        HEAD,
        "(head)",
    ]


def test_the_version_table_lies_in_the_schema(database_url: URL) -> None:
    url = f"url={shown(database_url)}"
    done = alembic("-x", url, "-x", "schema=my Schema", "upgrade", "head")
    assert done.returncode == 0, done.stderr
    with engine_of(database_url) as engine, engine.connect() as connection:
        tables = text(
            "SELECT nspname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace "
            "WHERE relname = 'alembic_version'"
        )
        assert connection.scalars(tables).all() == ["my Schema"]
    assert alembic("-x", url, "current").stdout == ""


def test_current_and_history_change_nothing(database_url: URL) -> None:
    for command in ("current", "history"):
        done = alembic("-x", f"url={shown(database_url)}", command)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    with engine_of(database_url) as engine, engine.connect() as connection:
        assert not connection.dialect.has_schema(connection, "checkpoints")


@pytest.mark.parametrize("schema", ["checkpoints", "per%cent"])
def test_check_compares_the_tables_of_the_package(database_url: URL, schema: str) -> None:
    options = ("-x", f"url={shown(database_url)}", "-x", f"schema={schema}")
    upgrade(database_url, schema=schema)
    # Another schema is nothing to compare.
    upgrade(database_url, schema="other")
    done = alembic(*options, "check")
    assert (done.returncode, done.stdout) == (0, "No new upgrade operations detected.\n")
    with engine_of(database_url) as engine, engine.begin() as connection:
        connection.execute(text(f'ALTER TABLE "{schema}".checkpoints DROP COLUMN retries'))
    done = alembic(*options, "check")
    assert done.returncode != 0
    assert "add_column" in done.stderr


@pytest.mark.parametrize("schema", ["checkpoints", "My per%cent", "quo\"te's"])
def test_the_printed_script_does_what_the_migration_does(
    database_url: URL, migrated_url: URL, schema: str
) -> None:
    def run(*arguments: str) -> None:
        printed = alembic("-x", f"schema={schema}", *arguments, "--sql")
        assert printed.returncode == 0, printed.stderr
        done = psql(database_url, printed.stdout)
        assert (done.returncode, done.stderr) == (0, "")

    with engine_of(migrated_url) as other, other.connect() as connection:
        head = fingerprint(connection)
        downgrade(migrated_url, "0.22.0")
        single = fingerprint(connection)

    with engine_of(database_url) as engine, engine.connect() as connection:
        run("upgrade", "head")
        assert fingerprint(connection, schema) == head
        run("downgrade", f"{HEAD}:0.22.0")
        assert fingerprint(connection, schema) == single
        fill(connection, 12_000, schema=schema.replace('"', '""'))
        run("upgrade", "0.22.0:head")
        assert fingerprint(connection, schema) == head
        translated = connection.execution_options(schema_translate_map={"checkpoints": schema})
        assert violations(translated) == []
        connection.rollback()
        done = alembic("-x", f"url={shown(database_url)}", "-x", f"schema={schema}", "current")
        assert done.stdout == f"{HEAD} (head)\n"
        run("downgrade", f"{HEAD}:base")
        assert fingerprint(connection, schema) == []


def test_a_printed_script_stops_at_the_first_error(migrated_url: URL) -> None:
    done = psql(migrated_url, alembic("upgrade", "head", "--sql").stdout)
    assert done.returncode == 3
    assert done.stderr.count("ERROR") == 1


def test_the_printed_script_has_the_lock_timeouts() -> None:
    script = alembic("upgrade", "head", "--sql").stdout
    assert script.index("'lock_timeout'") < script.index("CREATE TABLE")
    assert "SET LOCAL lock_timeout" in script


def test_there_is_one_head_and_a_straight_line() -> None:
    scripts = ScriptDirectory.from_config(alembic_config("postgresql://"))
    revisions = [revision.revision for revision in scripts.walk_revisions()]
    assert scripts.get_heads() == revisions[:1]
    assert revisions[-2:] == ["0.23.0", "0.22.0"]
    assert len(revisions) == len(REVISIONS)


@pytest.mark.parametrize("path", REVISIONS, ids=lambda path: path.stem)
def test_a_revision_imports_nothing_from_the_package(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").partition(".")[0])
    assert imported <= {"sqlalchemy", "alembic"}


def test_migrating_does_not_import_the_package(database_url: URL) -> None:
    """The application's code may be of another version than the revisions that are run."""
    done = alembic(
        "-x", f"url={shown(database_url)}", "upgrade", "head", PYTHONPROFILEIMPORTTIME="1"
    )
    assert done.returncode == 0
    assert "sqlalchemy" in done.stderr
    assert "checkpoints.tables" not in done.stderr
