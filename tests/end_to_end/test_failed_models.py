"""Models that cannot be served fail alone, with their reason, and come back when they are mended: the whole
system with real engines, one model in order and one of each kind of failure."""

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from prism.cli.system import RunningSystem, SystemSettings, running_system

pytestmark = pytest.mark.engine

DEADLINE_S = 90.0
BROKEN = ("no-weights", "cut-off", "no-header", "no-last-layer", "unknown-architecture")
HUB_ID = "nobody/nothing-of-this-name"


def break_folder(name: str, folder: Path) -> None:
    """Take from a whole folder what its name says."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    settings = json.loads(config.read_text())
    match name:
        case "no-weights":
            weights.unlink()
        case "cut-off":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "no-header":
            weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
        case "no-last-layer":
            last = f"model.layers.{settings['num_hidden_layers'] - 1}."
            kept = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith(last)}
            save_file(kept, weights)
        case "unknown-architecture":
            config.write_text(json.dumps({**settings, "architectures": ["NobodysForCausalLM"]}))


def mend_folder(folder: Path, whole: Path) -> None:
    """Make a folder what `whole` is."""
    shutil.copytree(whole, folder, dirs_exist_ok=True)


class FailingSystem:
    """A running system, its model folders, and the one that they were all copied from."""

    def __init__(self, system: RunningSystem, folder: Path, whole: Path, http: httpx.AsyncClient) -> None:
        self.system = system
        self.folder = folder
        self.whole = whole
        self.http = http

    async def status(self, model: str) -> dict[str, str]:
        """What /v1/models says of `model`."""
        listed = (await self.http.get("/v1/models")).json()["data"]
        return next(entry for entry in listed if entry["id"] == model)

    async def until_state(self, model: str, state: str) -> dict[str, str]:
        """Wait until /v1/models has `model` in `state`."""
        async with asyncio.timeout(DEADLINE_S):
            while (status := await self.status(model))["state"] != state:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return status

    async def complete(self, model: str) -> httpx.Response:
        """A short completion."""
        body = {"model": model, "prompt": "Hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        return await self.http.post("/v1/completions", json=body)

    async def retry(self, model: str) -> tuple[int, str]:
        """`prism models retry`: its exit status and what it printed."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "prism.cli.main", "models", "retry", model),
            *("--nats", self.system.nats_url),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(DEADLINE_S):
            printed, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, printed.decode()


@pytest.fixture(scope="module")
async def failing(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]
) -> AsyncIterator[FailingSystem]:
    folder, whole = tmp_path_factory.mktemp("failing"), tiny_models["tiny-llama"]
    models = [{"model_name": "in-order", "model_path": str(whole)}]
    for name in BROKEN:
        break_folder(name, Path(shutil.copytree(whole, folder / name)))
        models.append({"model_name": name, "model_path": str(folder / name)})
    models.append({"model_name": "not-there", "model_path": str(folder / "not-there")})
    models.append({"model_name": "on-the-hub", "model_path": HUB_ID})
    for model in models:
        model["init_placements"] = [{"gpu_ids": [0], "on": False, "max_memory_pool_size": 0.01}]  # type: ignore[assignment]
    (folder / "placement.json").write_text(json.dumps(models))
    settings = SystemSettings(
        placement=folder / "placement.json",
        worker_memory_gb=0.1,
        store_memory_gb=0.5,
        image_dir=folder / "images",
        drain_s=5.0,
        # Where nobody listens.
        environment={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder / "hf")},
    )
    log = (folder / "services.log").open("w", buffering=1)
    with log:
        async with (
            running_system(settings, lambda name, line: print(name, line, file=log)) as system,
            httpx.AsyncClient(base_url=system.gateway_url, timeout=DEADLINE_S) as http,
        ):
            yield FailingSystem(system, folder, whole, http)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("no-weights", "holds no .safetensors file"),
        ("cut-off", "model.safetensors is not a whole safetensors file"),
        ("no-header", "do not begin with a safetensors header"),
        ("not-there", "does not exist on this node"),
        ("on-the-hub", "the hub cannot be reached"),
    ],
)
async def test_a_model_whose_folder_is_no_good_says_so_and_the_others_serve(
    failing: FailingSystem, model: str, reason: str
) -> None:
    status = await failing.until_state(model, "failed")
    assert reason in status["reason"]
    refused = await failing.complete(model)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "model_failed"
    assert reason in refused.json()["error"]["message"]
    still, told = await failing.retry(model)
    assert still == 1
    assert reason in told
    assert (await failing.complete("in-order")).status_code == 200


@pytest.mark.parametrize(
    ("model", "reason"),
    [("no-last-layer", "the checkpoint holds nothing for"), ("unknown-architecture", "NobodysForCausalLM")],
)
async def test_a_model_that_its_engine_cannot_run_says_so_and_the_others_serve(
    failing: FailingSystem, model: str, reason: str
) -> None:
    refused = await failing.complete(model)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "model_failed"
    assert reason in refused.json()["error"]["message"]
    status = await failing.until_state(model, "failed")
    assert reason in status["reason"]
    assert (await failing.complete("in-order")).status_code == 200


@pytest.mark.parametrize("model", ["cut-off", "no-weights", "no-last-layer"])
async def test_a_mended_model_is_taken_up_without_a_restart(failing: FailingSystem, model: str) -> None:
    await failing.complete(model)
    await failing.until_state(model, "failed")
    processes = {name: service.process for name, service in failing.system.services.items()}
    mend_folder(failing.folder / model, failing.whole)
    status, told = await failing.retry(model)
    assert status == 0, told
    assert told.startswith(f"{model} is cold; its folder is in order (LlamaForCausalLM, ")
    assert (await failing.until_state(model, "sleeping"))["reason"] == "the next request wakes it"
    expected = (await failing.complete("in-order")).json()["choices"][0]["text"]
    answer = await failing.complete(model)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == expected
    assert {name: service.process for name, service in failing.system.services.items()} == processes


async def test_a_retry_of_a_model_that_nobody_registered_says_so(failing: FailingSystem) -> None:
    status, told = await failing.retry("nameless")
    assert status == 1
    assert "no model 'nameless' is registered" in told
