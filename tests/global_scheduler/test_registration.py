"""Registering a placement file's models."""

import asyncio
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from prism.cli.nats_server import nats_server
from prism.common import subjects
from prism.common.bus import Bus, connect_bus
from prism.common.messages.codec import encode
from prism.common.messages.models import ModelSpec
from prism.common.mirror import mirror_bucket
from prism.global_scheduler.registration import register, registered

pytestmark = pytest.mark.core


async def registry(bus: Bus) -> dict[str, ModelSpec]:
    async with mirror_bucket(bus, subjects.BUCKET_MODELS, ModelSpec, pattern="spec.*") as mirror:
        return dict(mirror.values)


async def test_specs_are_written_under_their_keys_and_again_only_when_they_change(bus: Bus) -> None:
    a, b = ModelSpec("a", "/a"), ModelSpec("meta-llama/Llama-3.2-1B", "/b")
    await register(bus, [a, b])
    assert await registry(bus) == {"spec.a": a, subjects.spec_key(b.model_name): b}
    bucket = await bus.bucket(subjects.BUCKET_MODELS)
    before = (await bucket.get("spec.a")).revision
    await register(bus, [a])
    assert (await bucket.get("spec.a")).revision == before
    await register(bus, [ModelSpec("a", "/a", priority=1)])
    assert (await registry(bus))["spec.a"].priority == 1


async def test_models_of_others_stay_unless_pruned(bus: Bus) -> None:
    bucket = await bus.bucket(subjects.BUCKET_MODELS)
    await bucket.put("facts.b", b"{}")
    await register(bus, [ModelSpec("b", "/b")])
    await register(bus, [ModelSpec("a", "/a")])
    assert set(await registry(bus)) == {"spec.a", "spec.b"}
    await register(bus, [ModelSpec("a", "/a")], prune=True)
    assert set(await registry(bus)) == {"spec.a"}
    assert (await bucket.get("facts.b")).value == b"{}", "facts belong to the model stores"


async def test_an_entry_that_nobody_can_read_is_replaced(bus: Bus) -> None:
    bucket = await bus.bucket(subjects.BUCKET_MODELS)
    await bucket.put("spec.a", b"not json")
    await register(bus, [ModelSpec("a", "/a")])
    assert (await bucket.get("spec.a")).value == encode(ModelSpec("a", "/a"))


async def test_pruning_an_empty_registry_is_fine(bus: Bus) -> None:
    await register(bus, [], prune=True)


async def test_a_bus_that_has_lost_its_state_gets_the_models_again(tmp_path: Path) -> None:
    here = asyncio.Event()
    with nats_server(tmp_path) as server:
        port = urlsplit(server.url).port
        assert port is not None
        async with connect_bus(server.url, name="test") as bus, registered(bus, [ModelSpec("a", "/a")]):
            server.stop()
            shutil.rmtree(tmp_path / "jetstream")
            with nats_server(tmp_path, port=port) as empty:
                async with (
                    connect_bus(empty.url, name="onlooker") as other,
                    mirror_bucket(
                        other, subjects.BUCKET_MODELS, ModelSpec, on_change=lambda key, spec: here.set()
                    ) as mirror,
                ):
                    await asyncio.wait_for(here.wait(), 20)
                    assert mirror.values == {"spec.a": ModelSpec("a", "/a")}
