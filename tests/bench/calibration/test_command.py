"""What `prism calibrate` refuses before it measures anything."""

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from prism.bench.calibration.command import calibrate_command
from prism.common.messages.models import ModelSpec

pytestmark = pytest.mark.core


def refused(folder: Path, out: Path, *options: str) -> str:
    file = folder / "placement.json"
    models = [ModelSpec("small", "/none"), ModelSpec("wide", "/none", tp_size=2)]
    file.write_bytes(msgspec.json.encode(models))
    result = CliRunner().invoke(calibrate_command, ["--models", str(file), "--out", str(out), *options])
    assert result.exit_code != 0
    return result.output


def test_a_profile_that_could_not_be_written(tmp_path: Path) -> None:
    out = tmp_path / "nowhere" / "profile.json"
    assert f"{out} cannot be written: choose another --out" in refused(tmp_path, out)


def test_a_model_on_several_gpus(tmp_path: Path) -> None:
    assert "wide: on several GPUs each (tp_size)" in refused(tmp_path, tmp_path / "profile.json")


def test_a_model_that_the_file_does_not_have(tmp_path: Path) -> None:
    assert "has no model other" in refused(tmp_path, tmp_path / "profile.json", "--model", "other")
