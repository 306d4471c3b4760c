"""`make setup` knows which profile is installed: it installs another when asked, and never by itself."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
]

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make setup` looks at, with the CPU's packages installed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    parts = [*(ROOT / "libs").iterdir(), *(ROOT / "services").iterdir()]
    for file in [*(ROOT / "requirements").glob("*.lock"), *(part / "pyproject.toml" for part in parts)]:
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    (tmp_path / ".venv").mkdir()
    mark(tmp_path, "cpu")
    return tmp_path


def mark(checkout: Path, profile: str) -> Path:
    """As a finished setup leaves it."""
    file = checkout / ".venv" / f".ready-{profile}"
    file.touch()
    newest = max(path.stat().st_mtime for path in checkout.rglob("*"))
    os.utime(file, (newest + 1, newest + 1))
    return file


def installs(checkout: Path, *arguments: str) -> set[str]:
    """The lock files that make would install from."""
    run = subprocess.run(
        ["make", "--dry-run", *arguments],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env={name: value for name, value in os.environ.items() if name not in ("PROFILE", "MAKEFLAGS")},
    )
    return {word for word in run.stdout.split() if word.startswith("requirements/")}


def test_what_is_installed_is_not_installed_again(checkout: Path) -> None:
    assert installs(checkout, "setup") == set()
    assert installs(checkout, "setup", "PROFILE=cpu") == set()


def test_another_profile_is_installed_over_it(checkout: Path) -> None:
    assert installs(checkout, "setup", "PROFILE=gpu") == {"requirements/gpu.lock"}


def test_other_targets_leave_the_profile_as_it_is(checkout: Path) -> None:
    mark(checkout, "cpu").unlink()
    mark(checkout, "gpu")
    assert installs(checkout, "test") == set()
    assert installs(checkout, "setup", "PROFILE=cpu") == {"requirements/cpu.lock"}


def test_the_first_setup_is_for_a_cpu(checkout: Path) -> None:
    mark(checkout, "cpu").unlink()
    assert installs(checkout, "setup") == {"requirements/cpu.lock"}
