"""The compose files and their images: every setting can be set, nothing differs from what is tested."""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from prism.cli.nats_server import nats_server
from prism.common.placement_file import read_placement_file
from prism.gpu_worker.kernel_caches import kernel_caches

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose"
SERVICES = ("gateway", "global_scheduler", "gpu_worker", "model_store")
IMAGES = (*SERVICES, "nats")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The services of compose.yaml."""
    services: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
    return services


@pytest.fixture(scope="module")
def settings() -> set[str]:
    """What .env.example names, commented out or not."""
    return set(re.findall(r"^#?([A-Z][A-Z0-9_]*)=", (COMPOSE / ".env.example").read_text(), re.MULTILINE))


def pins(lock: Path) -> set[str]:
    """The lines of a lock file."""
    return set(lock.read_text().split())


def options_of(service: str) -> Iterator[str]:
    """The environment variables that a service reads."""
    command: click.Command = import_module(f"prism.{service}.__main__").main
    for option in command.params:
        if isinstance(option.envvar, str):
            yield option.envvar


@pytest.mark.parametrize("service", SERVICES)
def test_every_setting_of_a_service_reaches_its_container(service: str, compose: dict[str, Any]) -> None:
    given = {entry.partition("=")[0] for entry in compose[service]["environment"]}
    assert set(options_of(service)) <= given


def test_the_example_names_every_setting_and_no_other(settings: set[str]) -> None:
    used: set[str] = set()
    for file in ("compose.yaml", "compose.gpu.yaml"):
        text = (COMPOSE / file).read_text()
        used |= set(re.findall(r"\$\{([A-Z0-9_]+)", text))
        used |= set(re.findall(r"^ +- ([A-Z0-9_]+)$", text, re.MULTILINE))
    assert settings - used == {"COMPOSE_PROJECT_NAME"}, "which compose itself reads"
    assert used - settings == set()


@pytest.mark.parametrize("service", SERVICES)
def test_what_the_example_shows_of_a_service_is_its_default(
    service: str, compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    command: click.Command = import_module(f"prism.{service}.__main__").main
    needed = ["--store-socket", "/s"] if service == "gpu_worker" else []
    text = (COMPOSE / ".env.example").read_text()
    shown = dict(re.findall(r"^#([A-Z][A-Z0-9_]*)=(.+)$", text, re.MULTILINE))
    # The others have a default of compose.yaml's own.
    passed_on = shown.keys() & set(compose[service]["environment"]) & set(options_of(service))
    for name in options_of(service):
        monkeypatch.delenv(name, raising=False)
    usual = command.make_context(service, [*needed]).params
    for name in passed_on:
        monkeypatch.setenv(name, shown[name])
    given = command.make_context(service, [*needed]).params
    # What a device decides has no default of the option's.
    assert {name: given[name] for name in usual if usual[name] is not None} == {
        name: value for name, value in usual.items() if value is not None
    }
    assert passed_on


@pytest.mark.parametrize("service", IMAGES)
def test_every_service_is_checked_limited_and_started_again(service: str, compose: dict[str, Any]) -> None:
    container = compose[service]
    assert container["restart"] == "unless-stopped"
    assert container["mem_limit"]
    assert container["healthcheck"]["test"]
    assert container["build"]["dockerfile"] == f"deploy/compose/{service}.Dockerfile"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_built_in_stages_and_runs_as_nobody_special(image: str) -> None:
    text = (COMPOSE / f"{image}.Dockerfile").read_text()
    assert text.count("\nFROM ${BASE_IMAGE}") == 2
    final = text.rpartition("\nFROM ")[2]
    assert "\nUSER prism\n" in final
    assert "--mount" not in final, "what the building host needs stays in the builder's stage"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_holds_the_versions_that_are_tested(image: str) -> None:
    lock = pins(ROOT / "requirements" / "images" / f"{image}.lock")
    assert lock <= pins(ROOT / "requirements" / "cpu.lock")
    assert image == "gpu_worker" or not any(line.startswith("torch==") for line in lock)


def test_a_worker_on_a_gpu_is_not_held_to_the_memory_of_the_tiny_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = yaml.safe_load((COMPOSE / "compose.gpu.yaml").read_text())["services"]["gpu_worker"]
    given = dict(entry.partition("=")[::2] for entry in gpu["environment"])
    assert given["PRISM_WORKER_MEMORY_GB"] == "${PRISM_WORKER_MEMORY_GB:-}"
    monkeypatch.setenv("PRISM_WORKER_MEMORY_GB", "")
    command: click.Command = import_module("prism.gpu_worker.__main__").main
    context = command.make_context("gpu_worker", ["--store-socket", "/s"])
    assert context.params["worker_memory_gb"] is None, "and nothing stands for what the device says"


def test_a_new_container_finds_the_kernels_that_engines_compiled() -> None:
    file = yaml.safe_load((COMPOSE / "compose.gpu.yaml").read_text())
    gpu = file["services"]["gpu_worker"]
    (kept,) = [
        entry.partition(":")[2] for entry in gpu["volumes"] if entry.partition(":")[0] in file["volumes"]
    ]
    given = dict(entry.partition("=")[::2] for entry in gpu["environment"])
    home = Path("/home/prism")
    assert all(folder.is_relative_to(kept) for folder in kernel_caches(home, given).values())
    dockerfile = (COMPOSE / "gpu_worker.Dockerfile").read_text()
    assert f"--home-dir {home} " in dockerfile
    assert f" {kept}\n" in dockerfile, "else the volume would be root's"


def test_the_tiny_models_placement_is_sound() -> None:
    models = read_placement_file(COMPOSE / "placement.json")
    assert [model.model_name for model in models] == ["tiny-llama", "tiny-qwen3", "tiny-llama-big"]


def test_the_bus_takes_the_messages_that_prism_up_takes() -> None:
    limit = inspect.signature(nats_server).parameters["max_payload"].default
    assert f"max_payload: {limit}\n" in (COMPOSE / "nats.conf").read_text()
