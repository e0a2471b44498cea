"""The history of a git repository, read whole whatever it holds and however git is configured."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from checkpoints.demo import DemoError
from checkpoints.demo.history import Change, Commit, Repository, read_commits, text_of
from checkpoints.demo.verdict import recounted, unquoted
from tests.support.histories import (
    AUTHOR,
    ODD_NAMES,
    build_odd_repository,
    commit,
    git,
    import_commits,
    write,
)


@pytest.fixture(scope="module")
def odd_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_odd_repository(tmp_path_factory.mktemp("history") / "odd")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q", "-b", "main", "repository")
    return tmp_path / "repository"


def commits(path: Path) -> list[Commit]:
    return list(read_commits(Repository.at(path)))


def changes(path: Path) -> set[tuple[str, str, int | None, int | None]]:
    return {
        (each.id, change.path, change.added, change.deleted)
        for each in commits(path)
        for change in each.changes
    }


def test_every_odd_name_is_read_as_it_is(odd_repository: Path) -> None:
    first = commits(odd_repository)[0]
    expected = {text_of(name): Change(text_of(name), 2, 0) for name in ODD_NAMES}
    assert {change.path: change for change in first.changes if not change.binary} == expected
    assert first.author == AUTHOR


def test_the_recount_by_lines_finds_the_same_changes(odd_repository: Path) -> None:
    read = changes(odd_repository)
    counted = list(recounted(Repository.at(odd_repository)))
    assert {(row[1], row[3], row[4], row[5]) for row in counted} == read
    assert len(counted) == len(read)
    assert [row[0] for row in counted] == list(range(1, len(read) + 1))


def test_commits_come_in_order_from_the_first_to_the_head(odd_repository: Path) -> None:
    read = commits(odd_repository)
    assert read[0].parents == 0
    assert read[-1].id == Repository.at(odd_repository).head
    assert len(read) == Repository.at(odd_repository).commits == 7
    ids = git(odd_repository, "rev-list", "--reverse", "HEAD").split()
    assert [each.id for each in read] == ids


def test_a_rename_is_a_deletion_and_a_creation(odd_repository: Path) -> None:
    assert commits(odd_repository)[2].changes == [
        Change("back\\\\slash", 0, 2),
        Change("renamed", 3, 0),
    ]


def test_a_binary_file_has_no_line_counts(odd_repository: Path) -> None:
    binaries = [change for each in commits(odd_repository) for change in each.changes]
    assert [change.path for change in binaries if change.binary] == ["binary", "binary"]


def test_a_merge_and_an_empty_commit_have_no_changes(odd_repository: Path) -> None:
    assert [each.parents for each in commits(odd_repository) if not each.changes] == [1, 2]


def test_a_submodule_is_one_line_of_its_path(odd_repository: Path) -> None:
    assert Change("module", 1, 0) in commits(odd_repository)[-1].changes


def test_an_author_that_is_not_utf_8_is_kept(repository: Path) -> None:
    write(repository, "file", b"a\n")
    git(repository, "-c", "i18n.commitEncoding=utf-8", "commit", "-q", "-m", "x")
    raw = git(repository, "cat-file", "commit", "HEAD").encode("utf-8", "surrogateescape")
    made = subprocess.run(
        ["git", "hash-object", "-t", "commit", "-w", "--stdin"],
        cwd=repository,
        input=raw.replace(b"Ann", b"Ann\xe9"),
        stdout=subprocess.PIPE,
        check=True,
    )
    git(repository, "reset", "-q", "--hard", made.stdout.decode().strip())
    author = AUTHOR.replace("Ann ", "Ann\\xe9 ")
    assert [each.author for each in commits(repository)] == [author]
    assert [row[2] for row in recounted(Repository.at(repository))] == [author]


@pytest.mark.parametrize(
    "setting",
    [
        "color.ui=always",
        "core.attributesFile={attributes}",
        "core.bigFileThreshold=1",
        "core.pager=false",
        "core.quotePath=false",
        "diff.algorithm=patience",
        "diff.external=false",
        "diff.ignoreSubmodules=all",
        "diff.noprefix=true",
        "diff.orderFile={attributes}",
        "diff.relative=true",
        "diff.renames=copies",
        "diff.submodule=log",
        "format.pretty=fuller",
        "i18n.logOutputEncoding=latin1",
        "log.diffMerges=first-parent",
        "log.follow=true",
        "log.mailmap=true",
        "log.showRoot=false",
        "log.showSignature=true",
    ],
)
def test_the_configuration_of_the_user_changes_nothing(
    odd_repository: Path, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = changes(odd_repository)
    attributes = tmp_path / "attributes"
    attributes.write_text("* -diff\nside binary\n")
    key, _, value = setting.partition("=")
    config = tmp_path / "config"
    git(tmp_path, "config", "--file", str(config), key, value.format(attributes=attributes))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    assert changes(odd_repository) == expected
    recount = {(row[1], row[3], row[4], row[5]) for row in recounted(Repository.at(odd_repository))}
    assert recount == expected


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GIT_DIR", "/nowhere"),
        ("GIT_WORK_TREE", "/nowhere"),
        ("GIT_EXTERNAL_DIFF", "false"),
        ("GIT_LITERAL_PATHSPECS", "1"),
        ("GIT_TRACE", "1"),
        ("GIT_ATTR_SOURCE", "nothing"),
        ("GIT_OBJECT_DIRECTORY", "/nowhere"),
        ("LC_ALL", "de_DE.UTF-8"),
    ],
)
def test_the_environment_changes_nothing(
    odd_repository: Path, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = changes(odd_repository)
    monkeypatch.setenv(variable, value)
    assert changes(odd_repository) == expected


def test_a_directory_inside_a_clone_and_a_bare_clone_give_all_of_the_history(
    odd_repository: Path, tmp_path: Path
) -> None:
    git(tmp_path, "clone", "-q", "--bare", str(odd_repository), "bare.git")
    assert changes(tmp_path / "bare.git") == changes(odd_repository)
    inside = odd_repository / os.fsdecode(ODD_NAMES[11]).rpartition("/")[0]
    assert changes(inside) == changes(odd_repository)


def test_a_shallow_clone_begins_at_its_boundary(odd_repository: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{odd_repository}", "shallow")
    repository = Repository.at(tmp_path / "shallow")
    assert repository.shallow
    assert repository.commits == len(list(read_commits(repository))) == 1


def test_commits_made_during_a_run_change_nothing(repository: Path) -> None:
    write(repository, "file", b"a\n")
    first = commit(repository, "first")
    seen = Repository.at(repository)
    commit(repository, "second", "--allow-empty")
    assert [each.id for each in read_commits(seen)] == [first]


def test_a_reader_that_stops_early_leaves_no_git_process(odd_repository: Path) -> None:
    reading: Iterator[Commit] = read_commits(Repository.at(odd_repository))
    next(reading)
    del reading
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    if not children.exists():
        pytest.skip("needs /proc")
    names = [Path(f"/proc/{child}/comm").read_text() for child in children.read_text().split()]
    assert "git\n" not in names


def test_a_commit_with_thousands_of_files_is_read_whole(repository: Path) -> None:
    import_commits(repository, [{f"d/{number}": "x\n" for number in range(5000)}])
    assert len(commits(repository)[0].changes) == 5000


def test_names_stay_apart_as_text() -> None:
    names = [b"\xe9", b"\\xe9", "é".encode(), b"\\\\xe9", b"a" * 5000, b"a" * 5001, b"a" * 300]
    texts = [text_of(name) for name in names]
    assert len(set(texts)) == len(names)
    assert all(one != other for one, other in pairwise(sorted(texts)))
    assert max(len(text.encode()) for text in texts) <= 1300


@pytest.mark.parametrize(
    ("shown", "name"),
    [
        (b"plain", b"plain"),
        (b'"\\303\\251"', "é".encode()),
        (b'"\\\\303"', b"\\303"),
        (b'"a\\tb\\nc\\"d\\a\\b\\v\\f\\r"', b'a\tb\nc"d\a\b\v\f\r'),
    ],
)
def test_a_quoted_name_is_decoded(shown: bytes, name: bytes) -> None:
    assert unquoted(shown) == name


def test_an_empty_repository_is_refused(repository: Path) -> None:
    with pytest.raises(DemoError, match="has no commits at HEAD"):
        Repository.at(repository)


def test_what_is_not_a_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="not in a git repository; name a git repository with"):
        Repository.at(tmp_path)
    with pytest.raises(DemoError, match="is not a directory"):
        Repository.at(tmp_path / "missing")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_repository_of_another_user_is_refused_in_the_words_of_git(odd_repository: Path) -> None:
    os.chown(odd_repository, 65534, 65534)
    try:
        with pytest.raises(DemoError, match=r"dubious ownership.*safe\.directory") as caught:
            Repository.at(odd_repository)
    finally:
        os.chown(odd_repository, 0, 0)
    assert "\n" not in str(caught.value)


def test_without_git_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DemoError, match=r"git, which .* cannot be run"):
        Repository.at(tmp_path)


def test_a_history_with_a_missing_object_is_refused(repository: Path) -> None:
    write(repository, "file", b"a\n")
    commit(repository, "first")
    write(repository, "file", b"b\n")
    commit(repository, "second")
    blob = git(repository, "rev-parse", "HEAD~1:file")
    (repository / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    with pytest.raises(DemoError, match=r"^git: "):
        commits(repository)
