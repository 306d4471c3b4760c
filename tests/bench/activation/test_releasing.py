"""What is read of the process that measures how GPU memory is given back; it runs where there is a GPU."""

import subprocess
import sys

import msgspec
import pytest

from prism.bench.activation.releasing import releasing_cell, rows_of

pytestmark = pytest.mark.core


def test_a_row_is_the_time_of_a_gigabyte() -> None:
    rows = rows_of(256 << 20, 4, {"unmap": 0.0687194767, "release": 0.0})
    assert [each.figure for each in rows] == [
        "unmap_256_mib_4_threads_ms_per_gb",
        "release_256_mib_4_threads_ms_per_gb",
    ]
    assert rows[0].value == pytest.approx(1.0)


async def test_rows_come_from_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    told = rows_of(1 << 30, 1, {"map": 1.0})
    asked: list[list[str]] = []

    def run(command: list[str], **options: object) -> "subprocess.CompletedProcess[bytes]":
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, b"a warning\n" + msgspec.json.encode(told) + b"\n")

    monkeypatch.setattr("subprocess.run", run)
    assert await releasing_cell() == told
    assert asked == [[sys.executable, "-m", "prism.bench.activation.releasing"]]
