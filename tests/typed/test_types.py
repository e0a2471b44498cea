"""The code of an application has the types that it is to have, by mypy and by pyright."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

USER_CODE = Path(__file__).with_name("user_code.py")


def mypy(file: Path, folder: Path) -> str:
    """What mypy says of a file, and of the package as it is installed."""
    options = ["--strict", "--config-file", os.devnull, "--cache-dir", str(folder / "cache")]
    return said(folder, sys.executable, "-m", "mypy", *options, str(file))


def pyright(file: Path, folder: Path) -> str:
    """What pyright says of a file; what is unknown to it is an error."""
    settings = folder / "pyright.json"
    settings.write_text(json.dumps({"include": [str(file)], "typeCheckingMode": "strict"}))
    program = str(Path(sys.executable).with_name("basedpyright"))
    return said(folder, program, "-p", str(settings), "--pythonpath", sys.executable)


def said(folder: Path, *command: str) -> str:
    """What a command says, in an empty folder."""
    done = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


CHECKERS = pytest.mark.parametrize("check", [mypy, pyright])
NOTHING = re.compile(r"^Success: no issues|^0 errors, 0 warnings", re.M)


@CHECKERS
def test_user_code_has_its_types(check: Callable[[Path, Path], str], tmp_path: Path) -> None:
    output = check(USER_CODE, tmp_path)
    assert NOTHING.search(output), output


WRONG = """
from typing import Any, assert_type

from sqlalchemy import Connection

from checkpoints import Checkpoints, audit_checkpoints, update_checkpoint_position


def wrong(connection: Connection) -> None:
    assert_type(Checkpoints(connection).get_metrics(), list[Any])
    assert_type(connection.execute(audit_checkpoints()).one()[1], Any)
    update_checkpoint_position(1, None, 3)
"""


@CHECKERS
def test_what_is_wrong_is_an_error(check: Callable[[Path, Path], str], tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(WRONG)
    lines = {int(line) for line in re.findall(r"wrong\.py:(\d+).*error", check(file, tmp_path))}
    assert lines == {10, 11, 12}


def test_every_statement_and_method_is_used() -> None:
    import checkpoints

    text = USER_CODE.read_text()
    used = set(re.findall(r"\bc\.([a-z]\w+)", text))
    assert {name for name in checkpoints.statements.__all__ if name.islower()} <= used
    methods = {name for name in vars(checkpoints.Checkpoints) if not name.startswith("_")}
    assert methods <= set(re.findall(r"checkpoints\.([a-z]\w+)\(", text))
    assert (ROOT / "checkpoints" / "py.typed").is_file()
