"""MPS for the length of a measurement; a script stands in for NVIDIA's control program."""

from pathlib import Path

import pytest

from prism.bench.decode.mps import CONTROL, MpsUnavailable, mps_daemon

SCRIPT = """#!/bin/sh
[ "$1" = -d ] && echo started >> "$CUDA_MPS_LOG_DIRECTORY/said" && exit $MPS_STATUS
cat >> "$CUDA_MPS_LOG_DIRECTORY/said"
"""


def control_program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the script where the program is looked for."""
    script = folder / CONTROL
    script.write_text(SCRIPT)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_clients_are_told_where_its_pipes_are_and_it_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control_program(tmp_path, monkeypatch)
    with mps_daemon(tmp_path / "mps", {"MPS_STATUS": "0", "PATH": "/usr/bin:/bin"}) as clients:
        assert Path(clients["CUDA_MPS_PIPE_DIRECTORY"]).is_dir()
        said = Path(clients["CUDA_MPS_LOG_DIRECTORY"]) / "said"
        assert said.read_text() == "started\n"
    assert said.read_text() == "started\nquit\n"


def test_where_it_cannot_be_started_it_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MpsUnavailable, match="there is no"), mps_daemon(tmp_path / "one", {}):
        pass
    control_program(tmp_path, monkeypatch)
    environment = {"MPS_STATUS": "1", "PATH": "/usr/bin:/bin"}
    with pytest.raises(MpsUnavailable, match="exit status 1"), mps_daemon(tmp_path / "two", environment):
        pass
