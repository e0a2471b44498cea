"""Real applications with migrations of their own, made by `alembic init` in a test's folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import URL

import checkpoints
from checkpoints import migrations

APP = """
from sqlalchemy import BigInteger, ForeignKey, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customers"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    name: Mapped[str] = mapped_column(Text, index=True)


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    customer_id: Mapped[int] = mapped_column(ForeignKey(Customer.id))


metadata = Base.metadata
"""

_URL = """
import os

import app
import checkpoints
from checkpoints import migrations

config.set_main_option("sqlalchemy.url", os.environ["DATABASE_URL"].replace("%", "%%"))
"""
_CONFIGURE = "connection=connection, target_metadata=target_metadata"
_METADATA = "target_metadata = None"

# The files of an application that has just begun, by template: they are the same each time.
_STARTED: dict[str, dict[Path, str]] = {}


@dataclass
class Project:
    """An application in a folder, with the database that it migrates."""

    folder: Path
    url: URL
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def env(self) -> Path:
        return self.folder / "migrations" / "env.py"

    @property
    def ini(self) -> Path:
        return self.folder / "alembic.ini"

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a Python module as a command in the folder."""
        return subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env=os.environ
            | {"DATABASE_URL": self.url.render_as_string(hide_password=False)}
            | self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def alembic(self, *arguments: str) -> str:
        """Run `alembic`, which must succeed; its output."""
        done = self.run("alembic", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def refused(self, *arguments: str) -> str:
        """Run `alembic`, which must fail in one line; that line."""
        done = self.run("alembic", *arguments)
        assert done.returncode != 0, done.stdout
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout.splitlines()[-1] if done.stdout.strip() else done.stderr

    def checkpoints(self, *arguments: str) -> str:
        """Run `checkpoints`, which must succeed; its output."""
        done = self.run("checkpoints", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def change(self, file: Path, before: str, after: str) -> None:
        """Replace a text that is in a file once."""
        text = file.read_text()
        assert text.count(before) == 1, f"{before!r} is {text.count(before)} times in {file}"
        file.write_text(text.replace(before, after))

    def configure(self, options: str, *, target: str = "app.metadata") -> None:
        """Give `context.configure()` of the online migrations some more options."""
        pattern = r"connection=connection,\s+target_metadata=target_metadata"
        text, count = re.subn(pattern, f"{_CONFIGURE}, {options}", self.env.read_text())
        assert count == 1
        self.env.write_text(text)
        self.change(self.env, "target_metadata = app.metadata", f"target_metadata = {target}")

    def revise(self, message: str, *calls: str) -> None:
        """Write a revision by hand: the calls of its upgrade, then those of its downgrade."""
        self.alembic("revision", "-m", message)
        (written,) = self.folder.glob(f"migrations/versions/*_{message}.py")
        text = written.read_text()
        text = text.replace("import sqlalchemy as sa", "from checkpoints import migrations")
        for call in calls:
            text = text.replace("    pass\n", f"    {call}\n", 1)
        written.write_text(text)

    def write(self, from_: str = "base", *options: str) -> Path:
        """Have `checkpoints revision` write a revision; its file."""
        written = self.checkpoints("revision", "--from", from_, "--write", *options)
        return Path(written.splitlines()[-1])


def install(folder: Path, *revisions: str) -> Path:
    """Copy the package as a wheel has it, the migrations inside, with more revisions after them."""
    package = Path(checkpoints.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", "alembic")
    shutil.copytree(package, folder / "checkpoints", ignore=ignored)
    shutil.copytree(migrations.script_location(), folder / "checkpoints" / "alembic")
    for number, text in enumerate(revisions, 99):
        file = folder / "checkpoints" / "alembic" / "versions" / f"{number}_0_0_next.py"
        file.write_text(text)
    return folder


def start_project(folder: Path, url: URL, *, template: str = "generic") -> Project:
    """An application with two models, `alembic init`, and a first revision by autogenerate."""
    project = Project(folder, url)
    if template not in _STARTED:
        (folder / "app.py").write_text(APP)
        project.alembic("init", "-t", template, "migrations")
        project.change(project.env, _METADATA, f"{_URL}\ntarget_metadata = app.metadata")
        project.alembic("revision", "--autogenerate", "-m", "first")
        made = (file for file in folder.rglob("*") if file.suffix in {".py", ".ini", ".mako"})
        _STARTED[template] = {file.relative_to(folder): file.read_text() for file in made}
    for path, content in _STARTED[template].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    return project
