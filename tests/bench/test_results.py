"""What a result file says, and when a target counts as met."""

import json
import subprocess
from pathlib import Path

import pytest

from prism.bench.results import commit, missed, row, table, write_results

pytestmark = pytest.mark.core


def git(root: Path, *arguments: str) -> str:
    author = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    run = subprocess.run(
        ["git", "-C", str(root), *author, *arguments], capture_output=True, text=True, timeout=30, check=True
    )
    return run.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one committed file."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "source.py").write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_a_file_says_what_made_it_and_where(repository: Path) -> None:
    path = write_results(
        "chaos",
        [row("requests_lost", 0, "requests", target=0, better="equal")],
        command="make chaos",
        root=repository,
        packages=["msgspec"],
        details={"seed": 7},
    )
    assert path == repository / "docs" / "results" / "chaos.json"
    content = json.loads(path.read_text())
    assert content["command"] == "make chaos"
    assert content["commit"] == git(repository, "rev-parse", "HEAD")
    assert content["machine"]["cores"] >= 1
    assert content["versions"]["msgspec"][0].isdigit()
    assert content["details"] == {"seed": 7}
    assert content["rows"] == [
        {"figure": "requests_lost", "value": 0, "unit": "requests", "target": 0, "met": True, "note": ""}
    ]


def test_a_changed_tree_is_marked_but_results_do_not_change_it(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    write_results("one", [], command="make one", root=repository)
    assert commit(repository) == head
    (repository / "source.py").write_text("a = 2\n")
    assert commit(repository) == f"{head}-dirty"


def test_a_new_file_marks_the_tree_as_well(repository: Path) -> None:
    (repository / "other.py").write_text("b = 1\n")
    assert commit(repository).endswith("-dirty")


def test_a_copy_without_history_is_told_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("PRISM_COMMIT", raising=False)
    assert commit(tmp_path) == "unknown"
    monkeypatch.setenv("PRISM_COMMIT", "abc123")
    assert commit(tmp_path) == "abc123"


def test_a_copy_with_an_older_history_is_told_its_commit(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "source.py").write_text("a = 2\n")
    monkeypatch.setenv("PRISM_COMMIT", "abc123")
    assert commit(repository) == "abc123"


def test_targets_are_judged_and_a_missing_value_meets_none() -> None:
    rows = [
        row("added_p50_ms_64", 1.4, "ms", target=2.0),
        row("tokens_per_s", 40_000, "tokens/s", target=50_000, better="higher", note="the parser"),
        row("requests_lost", 1, "requests", target=0, better="equal"),
        row("exact_ms", 2.0, "ms", target=2.0),
        row("absent_ms", None, "ms", target=2.0, note="not installable here"),
        row("free_ms", 3.0, "ms"),
    ]
    assert [each.met for each in rows] == [True, False, False, True, False, None]
    assert [each.figure for each in missed(rows)] == ["tokens_per_s", "requests_lost", "absent_ms"]
    assert "MISSES 50000" in table(rows)


def test_ids_that_programs_cannot_rely_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Added p50"):
        row("Added p50", 1, "ms")
    with pytest.raises(ValueError, match="twice: a_ms"):
        write_results("x", [row("a_ms", 1, "ms"), row("a_ms", 2, "ms")], command="x", root=tmp_path)
