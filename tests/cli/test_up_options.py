"""What `prism up` makes of its options: the command lines of the services that it starts."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from prism.cli import up
from prism.cli.system import SystemSettings, service_arguments
from prism.common.modes import policy_in

pytestmark = pytest.mark.core


@pytest.fixture
def placement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "PRISM_MODE",
        "PRISM_PLACEMENT_POLICY",
        "PRISM_DEVICE",
        "PRISM_GPU",
        "PRISM_WORKER_MEMORY_GB",
        "PRISM_STORE_MEMORY_GB",
        "PRISM_IMAGE_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "placement.json"
    file.write_text(json.dumps([{"model_name": "a", "model_path": "/a"}]))
    return file


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[SystemSettings]:
    """The settings of each system that would have been run."""
    found: list[SystemSettings] = []

    async def note(settings: SystemSettings) -> int:
        found.append(settings)
        return 0

    monkeypatch.setattr(up, "run_until_stopped", note)
    return found


def run(placement: Path, *options: str, **environment: str) -> Result:
    return CliRunner().invoke(up.up_command, [str(placement), *options], env=environment)


def worker_options(settings: SystemSettings, number: int = 1) -> dict[str, str]:
    """The options of worker `number`, with their values."""
    line = service_arguments(settings, "nats://n", Path("/run"), "gpu_worker", number, ["model_store"])
    return dict(zip(line[::2], line[1::2], strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_worker_decides_by_its_device_what_memory_it_uses_unless_it_is_told(
    placement: Path, chosen: list[SystemSettings], device: str
) -> None:
    assert run(placement, "--device", device).exit_code == 0
    assert run(placement, "--device", device, "--worker-memory-gb", "60").exit_code == 0
    assert "--worker-memory-gb" not in worker_options(chosen[0])
    assert worker_options(chosen[1])["--worker-memory-gb"] == "60.0"


def test_each_of_several_workers_on_cuda_has_a_gpu_of_its_own(
    placement: Path, chosen: list[SystemSettings]
) -> None:
    assert run(placement, "--device", "cuda", "--workers", "3").exit_code == 0
    options = [worker_options(chosen[0], number) for number in (1, 2, 3)]
    assert [each["--gpu"] for each in options] == ["0", "1", "2"]
    assert [each["--first-gpu-id"] for each in options] == ["0", "1", "2"]


def test_the_only_worker_on_cuda_takes_the_gpus_that_its_environment_names(
    placement: Path, chosen: list[SystemSettings]
) -> None:
    assert run(placement, "--device", "cuda", PRISM_GPU="2,3").exit_code == 0
    assert "--gpu" not in worker_options(chosen[0])


def test_gpus_that_are_named_for_one_worker_are_refused_for_several(
    placement: Path, chosen: list[SystemSettings]
) -> None:
    refused = run(placement, "--device", "cuda", "--workers", "2", PRISM_GPU="1")
    assert refused.exit_code == 2
    assert "PRISM_GPU is for one worker; with --workers 2 worker i uses GPU i - 1: unset it" in refused.output
    assert not chosen
    assert run(placement, "--workers", "2", PRISM_GPU="1").exit_code == 0, "a CPU has none"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PRISM_PLACEMENT_POLICY": "lru"}, ("full", "lru", "cpu")),
        ({"PRISM_MODE": "elastic"}, ("elastic", None, "cpu")),
        ({"PRISM_DEVICE": "cuda"}, ("full", None, "cuda")),
    ],
)
def test_the_environment_chooses_as_options_do(
    placement: Path, chosen: list[SystemSettings], environment: dict[str, str], expected: tuple[Any, ...]
) -> None:
    assert run(placement, **environment).exit_code == 0
    assert (chosen[0].mode, chosen[0].policy, chosen[0].device) == expected


def test_a_policy_of_the_environment_is_refused_as_one_on_the_command_line_is(placement: Path) -> None:
    refused = run(placement, "--mode", "elastic", PRISM_PLACEMENT_POLICY="lru")
    assert refused.exit_code == 1
    assert "--policy lru decides nothing in --mode elastic" in refused.output
    assert "PRISM_PLACEMENT_POLICY" in refused.output


def test_a_policy_that_there_is_not_is_refused_before_anything_starts(placement: Path) -> None:
    refused = run(placement, "--policy", "fastest")
    assert refused.exit_code == 2
    assert "balanced" in refused.output


def test_modes_name_the_variables_that_a_choice_may_have_come_from() -> None:
    with pytest.raises(Exception, match="PRISM_MODE"):
        policy_in("static", "kvpr", "balanced")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--worker-memory-gb", "-1"),
        ("--worker-memory-gb", "0"),
        ("--store-memory-gb", "0"),
        ("--port", "65536"),
        ("--port", "-1"),
        ("--log-level", "foo"),
    ],
)
def test_a_value_that_no_service_would_take_is_refused_before_anything_starts(
    placement: Path, chosen: list[SystemSettings], option: str, value: str
) -> None:
    refused = run(placement, f"{option}={value}")
    assert refused.exit_code == 2
    assert f"Invalid value for '{option}'" in refused.output
    assert not chosen


@pytest.mark.parametrize("service", ["gateway", "global_scheduler", "gpu_worker", "model_store"])
def test_a_log_level_is_a_level_in_any_case_for_every_service(service: str) -> None:
    command: click.Command = import_module(f"prism.{service}.__main__").main
    needed = ["--store-socket", "/s"] if service == "gpu_worker" else []
    context = command.make_context(service, [*needed, "--log-level", "warning"])
    assert context.params["log_level"] == "WARNING"
    with pytest.raises(click.BadParameter, match="'foo' is not one of"):
        command.make_context(service, [*needed, "--log-level", "foo"])


def test_what_stores_take_comes_from_the_environment_as_from_options(
    placement: Path, chosen: list[SystemSettings]
) -> None:
    assert run(placement, PRISM_STORE_MEMORY_GB="2", PRISM_IMAGE_DIR="/images").exit_code == 0
    line = service_arguments(chosen[0], "nats://n", Path("/run"), "model_store", 1, [])
    options = dict(zip(line[::2], line[1::2], strict=True))
    assert (options["--memory-gb"], options["--image-dir"]) == ("2.0", "/images")
