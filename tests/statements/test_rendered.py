"""The SQL text of every statement, in `tests/rendered/`: a difference is something to review."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from psycopg._queries import MAX_CACHED_STATEMENT_LENGTH
from sqlalchemy import Dialect, Select, make_url

import checkpoints
from checkpoints import statements
from checkpoints.statements import _template as template
from checkpoints.tables import metadata
from tests.statements.test_plans import ON_THE_HOT_PATH
from tests.support.samples import SAMPLES

DIALECT: Dialect = make_url("postgresql+psycopg://").get_dialect()()
RENDERED = Path(__file__).parents[1] / "rendered"


@pytest.mark.parametrize("name", SAMPLES)
def test_sql_is_as_reviewed(name: str, request: pytest.FixtureRequest) -> None:
    compiled = SAMPLES[name].compile(dialect=DIALECT)
    text = "\n".join(line.rstrip() for line in f"{compiled}".splitlines()) + "\n"
    golden = RENDERED / f"{name}.sql"
    if request.config.getoption("--update-rendered"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_every_statement_has_a_sample() -> None:
    names = {name for name in statements.__all__ if name.islower()}
    assert names <= SAMPLES.keys()
    assert names <= set(checkpoints.__all__)


def test_no_rendering_is_left_of_a_statement_that_went() -> None:
    assert {file.stem for file in RENDERED.glob("*.sql")} == SAMPLES.keys()


@pytest.mark.parametrize("name", SAMPLES)
def test_statement_can_be_cached(name: str) -> None:
    assert SAMPLES[name]._generate_cache_key() is not None


def test_one_record_and_ten_thousand_have_one_sql_text() -> None:
    one, many = (
        checkpoints.record_checkpoints(
            [checkpoints.CheckpointRecord(1, f"account-{n}", 1) for n in range(count)]
        )
        for count in (1, 10_000)
    )
    assert str(one.compile(dialect=DIALECT)) == str(many.compile(dialect=DIALECT))
    key, other_key = one._generate_cache_key(), many._generate_cache_key()
    assert key is not None
    assert other_key is not None
    assert key.key == other_key.key


@pytest.mark.parametrize("name", SAMPLES)
def test_the_id_comes_first_and_is_an_integer(name: str) -> None:
    first = SAMPLES[name].selected_columns[0]
    assert first.name == "id"
    assert first.type.python_type is int


def test_parameters_of_all_statements_differ_so_that_they_can_stand_in_one() -> None:
    owner: dict[str, str] = {}
    for name, sample in SAMPLES.items():
        for parameter in sample.compile(dialect=DIALECT).params:
            assert owner.setdefault(parameter, name) == name


def test_no_parameter_is_named_as_a_column() -> None:
    """Else a value that is given to `execute` would get into an update within the statement."""
    columns = {column.name for table in metadata.tables.values() for column in table.columns}
    for sample in SAMPLES.values():
        assert not columns & sample.compile(dialect=DIALECT).params.keys()


@pytest.mark.parametrize("name", SAMPLES)
def test_its_template_and_values_apart_are_the_same_statement(name: str) -> None:
    statement, values = template.parts(SAMPLES[name])
    assert f"{statement.compile(dialect=DIALECT)}" == f"{SAMPLES[name].compile(dialect=DIALECT)}"
    assert statement.params(**values).compile(dialect=DIALECT).params == (
        SAMPLES[name].compile(dialect=DIALECT).params
    )


LONG_SCHEMA = "s" * 30


SHORT: dict[str, Select[*tuple[Any, ...]]] = {
    **{name: SAMPLES[name] for name in ON_THE_HOT_PATH},
    "of a consumer": checkpoints.reserve_next_available_checkpoint(
        "accounts", timedelta(seconds=30), synchronous_commit=False
    ),
}


@pytest.mark.parametrize("name", SHORT)
def test_is_short_enough_for_psycopg_to_remember(name: str) -> None:
    """A longer text is looked through for its parameters each time it is executed."""
    sql = SHORT[name].compile(dialect=DIALECT, schema_translate_map={"checkpoints": LONG_SCHEMA})
    assert len(f"{sql}") <= MAX_CACHED_STATEMENT_LENGTH
