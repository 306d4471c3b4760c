"""`prism up` as a person runs it: a process to start, talk to, and stop in several ways."""

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from prism.cli.demo import tiny_placement

pytestmark = pytest.mark.engine

PRISM = [sys.executable, "-m", "prism.cli.main"]
DEADLINE_S = 90


@pytest.fixture
def placement(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    file = tmp_path / "placement.json"
    file.write_bytes(msgspec.json.encode(tiny_placement([tiny_models["tiny-llama"]])))
    return file


@contextmanager
def prism_up(placement: Path, folder: Path) -> Iterator[tuple["subprocess.Popen[str]", list[str]]]:
    """A running `prism up` and the lines it printed when ready; killed at the end if it still runs."""
    arguments = ["up", str(placement), "--port", "0", "--worker-memory-gb", "0.1", "--store-memory-gb", "0.5"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*PRISM, *arguments, "--image-dir", str(folder / "images")],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            yield process, [process.stdout.readline().strip() for _ in range(3)]
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def test_it_prints_a_curl_line_that_works(placement: Path, tmp_path: Path) -> None:
    with prism_up(placement, tmp_path) as (process, lines):
        assert re.fullmatch(r"gateway ready at http://127\.0\.0\.1:\d+", lines[0])
        answer = subprocess.run(
            shlex.split(lines[2]), capture_output=True, text=True, timeout=DEADLINE_S, check=True
        )
        events = [line for line in answer.stdout.splitlines() if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[0].removeprefix("data: "))["model"] == "tiny-llama"
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("mode", ["static", "elastic"])
def test_a_policy_that_a_mode_leaves_nothing_to_decide_is_refused(placement: Path, mode: str) -> None:
    run = subprocess.run(
        [*PRISM, "up", str(placement), "--port", "0", "--mode", mode, "--policy", "lru"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert run.returncode != 0
    assert f"--policy lru decides nothing in --mode {mode}" in run.stderr


def test_a_bad_placement_file_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text('[{"model_name": "a", "model_path": "/a", "tp_size": "two", "pinned": true}]')
    run = subprocess.run([*PRISM, "up", str(file)], capture_output=True, text=True, timeout=DEADLINE_S)
    assert run.returncode == 1
    assert run.stderr.splitlines() == [
        f"prism: placement file {file} has 2 errors (see docs/placement-file.md):",
        "  [0].pinned: unknown field with value true; did you mean pin?",
        '  [0].tp_size: "two" is not allowed here; allowed: a whole number from 1 to 1024',
    ]
