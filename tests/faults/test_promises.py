"""The table of promises names tests that exist, and every test stands in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).parent

# Of the tools of these tests.
TOOLS = {"test_clocks.py::test_a_clock_that_is_shifted_is_shifted"}


def _named() -> set[str]:
    return set(re.findall(r"`(test_\w+\.py::test_\w+)`", (FOLDER / "PROMISES.md").read_text()))


def _defined() -> set[str]:
    return {
        f"{path.name}::{node.name}"
        for path in FOLDER.glob("test_*.py")
        if path != Path(__file__)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_promise_names_a_test_and_every_test_is_named() -> None:
    assert _named() | TOOLS == _defined()


def test_a_promise_for_both_consumers_is_shown_with_both() -> None:
    for line in (FOLDER / "PROMISES.md").read_text().splitlines():
        named = re.search(r"`(test_\w+\.py)::(test_\w+)`( \*)? \|", line)
        if named:
            file, test, both = named.groups()
            functions = [
                node
                for node in ast.parse((FOLDER / file).read_text()).body
                if isinstance(node, ast.FunctionDef) and node.name == test
            ]
            takes_kind = any(a.arg == "kind" for f in functions for a in f.args.args)
            assert takes_kind == bool(both), line
