"""The store as a process on the bus: facts, tokenizers, endpoints, its socket's life."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.model_store.conftest import engine_manifest
from tests.model_store.model_folders import write_model

from prism.cli.nats_server import NatsServer
from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.memfd import memfd_of, read_memfd
from prism.common.messages.codec import decode, encode
from prism.common.messages.events import Event
from prism.common.messages.models import ModelFacts, ModelSpec, TokenizerBundle
from prism.common.messages.store import (
    ImageKind,
    LeaseRequest,
    StoreInspection,
    StoreModelOutcome,
    StoreModelRequest,
    StoreReport,
)
from prism.common.mirror import BucketMirror, mirror_bucket
from prism.common.store_client import deposit, lease
from prism.model_store.inspection import Inspector
from prism.model_store.service import StoreSettings, serve

LAYOUT = "test-engine 1"


@contextlib.contextmanager
def store_process(
    nats_server: NatsServer, directory: Path, *, socket: str = "store.sock", node: str = "here"
) -> Iterator[subprocess.Popen[bytes]]:
    """A store of its own process, killed at the end if it still runs."""
    command = [sys.executable, "-m", "prism.model_store", "--nats", nats_server.url, "--node", node]
    command += ["--socket", str(directory / socket), "--image-dir", str(directory / "images")]
    command += ["--memory-gb", "1", "--threads", "2"]
    # Hub ids in these tests lead to a port where nobody listens.
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(directory / "hf")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, cwd=directory) as process:
        try:
            yield process
        finally:
            process.kill()


async def until_ready(bus: Bus, node: str = "here") -> StoreReport:
    """Wait until the store answers on the bus."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await bus.request(
                    subjects.store(node, "list"), StoreModelRequest(""), StoreReport, timeout_s=2
                )
            except PrismError:
                await asyncio.sleep(0.02)


async def register(bus: Bus, *specs: ModelSpec) -> None:
    bucket = await bus.bucket(subjects.BUCKET_MODELS)
    for spec in specs:
        await bucket.put(subjects.spec_key(spec.model_name), encode(spec))


class FactsWatch:
    """The facts in the bucket, with waiting."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.mirror: BucketMirror[ModelFacts] | None = None

    async def of(self, model: str) -> ModelFacts:
        assert self.mirror is not None
        async with asyncio.timeout(30):
            while (facts := self.mirror.values.get(subjects.facts_key(model))) is None:
                self.changed.clear()
                await self.changed.wait()
        return facts

    async def gone(self, model: str) -> None:
        assert self.mirror is not None
        async with asyncio.timeout(30):
            while subjects.facts_key(model) in self.mirror.values:
                self.changed.clear()
                await self.changed.wait()


@contextlib.asynccontextmanager
async def watch_facts(bus: Bus):  # type: ignore[no-untyped-def]
    watch = FactsWatch()
    async with mirror_bucket(
        bus,
        subjects.BUCKET_MODELS,
        ModelFacts,
        pattern="facts.*",
        on_change=lambda *_: watch.changed.set(),
    ) as watch.mirror:
        yield watch


async def test_registered_models_get_facts_and_their_tokenizers_are_on_the_bus(
    fresh_nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m")
    other = write_model(tmp_path / "other")
    (other / "tokenizer.json").unlink()
    cut = write_model(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-4])
    await register(
        bus,
        ModelSpec("Org/Model-1.5", str(folder)),
        ModelSpec("borrower", str(other), tokenizer_path=str(folder)),
        ModelSpec("no-tokenizer", str(other)),
        ModelSpec("absent", str(tmp_path / "absent")),
        ModelSpec("cut", str(cut)),
        ModelSpec("hub", "nobody/nothing"),
        ModelSpec("cached", "somebody/something"),
    )
    cache = tmp_path / "hf" / "hub" / "models--somebody--something"
    write_model(cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    with store_process(fresh_nats, tmp_path) as process:
        async with watch_facts(bus) as facts:
            good = await facts.of("Org/Model-1.5")
            assert good.error is None
            assert good.parameters == 2 * 100 * 64 + 256 * 64 + 64
            objects = await bus.objects(subjects.OBJECTS_TOKENIZERS)
            stored = await objects.get(good.tokenizer)
            bundle = decode(stored.data or b"", TokenizerBundle)
            assert bundle.tokenizer_json == (folder / "tokenizer.json").read_text()
            assert (await facts.of("borrower")).tokenizer == good.tokenizer
            assert (await facts.of("cached")).parameters == good.parameters
            for model, what in [
                ("no-tokenizer", "has no tokenizer.json"),
                ("absent", f"model folder {tmp_path / 'absent'} does not exist on this node"),
                ("cut", "it is cut off"),
                ("hub", "nobody/nothing is neither a folder on this node nor could it be fetched"),
            ]:
                error = (await facts.of(model)).error
                assert error is not None
                assert what in error
                assert "\n" not in error
            # Told again only when something changed.
            bucket = await bus.bucket(subjects.BUCKET_MODELS)
            revision = (await bucket.get(subjects.facts_key("borrower"))).revision
            await register(bus, ModelSpec("borrower", str(other), tokenizer_path=str(folder), priority=1))
            await register(bus, ModelSpec("last", str(folder)))
            await facts.of("last")
            assert (await bucket.get(subjects.facts_key("borrower"))).revision == revision
            await bucket.delete(subjects.spec_key("last"))
            await facts.gone("last")
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 20) == 0
    assert not (tmp_path / "store.sock").exists()


async def test_models_whose_folders_can_not_be_read_are_failed_and_say_why(
    fresh_nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    # No user may look at what has such a name, this one included.
    unreadable = tmp_path / ("x" * 300)
    folder = write_model(tmp_path / "m")
    await register(
        bus,
        ModelSpec("unreadable", str(unreadable)),
        ModelSpec("no-tokenizer", str(folder), tokenizer_path=str(unreadable)),
    )
    with store_process(fresh_nats, tmp_path):
        async with watch_facts(bus) as facts:
            for model in ("unreadable", "no-tokenizer"):
                error = (await facts.of(model)).error
                assert error == f"{unreadable} cannot be read: File name too long"
        with pytest.raises(PrismError, match="cannot be read: File name too long") as caught:
            lease(tmp_path / "store.sock", LeaseRequest("unreadable", str(unreadable)), 10)
        assert caught.value.code is ErrorCode.MODEL_FAILED


async def test_a_store_ends_although_its_inspector_misses_that_it_shall(
    fresh_nats: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = asyncio.Event()

    async def miss_the_first(inspector: Inspector, specs: BucketMirror[ModelSpec]) -> None:
        runs.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.get_running_loop().create_future()
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(Inspector, "run", miss_the_first)
    settings = StoreSettings(
        instance="store-test",
        nats_url=fresh_nats.url,
        node="here",
        socket_path=tmp_path / "store.sock",
        image_dir=tmp_path / "images",
        budget_bytes=10**9,
        disk_bytes=10**9,
        threads=1,
    )
    stop = asyncio.Event()
    async with asyncio.timeout(20):
        serving = asyncio.create_task(serve(settings, stop))
        await runs.wait()
        stop.set()
        await serving


async def test_stage_evict_and_list_answer_with_the_outcome_and_events_tell_of_it(
    fresh_nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m")
    await register(bus, ModelSpec("m", str(folder)))
    events: asyncio.Queue[Event] = asyncio.Queue()

    async def on_event(message: object) -> None:
        events.put_nowait(decode(message.data, Event))  # type: ignore[attr-defined]

    await bus.subscribe(subjects.events(), on_event, inline=True)
    with store_process(fresh_nats, tmp_path):
        await until_ready(bus)

        async def ask(verb: str, request: StoreModelRequest) -> StoreModelOutcome:
            return await bus.request(subjects.store("here", verb), request, StoreModelOutcome, timeout_s=20)

        staged = await ask("stage", StoreModelRequest("m"))
        assert staged.error is None
        assert staged.nbytes > 0
        with lease(tmp_path / "store.sock", LeaseRequest("m", str(folder)), 10) as held:
            assert held.nbytes == staged.nbytes
            assert held.seconds == 0
            report = await until_ready(bus)
            assert [(image.models, image.leases) for image in report.images] == [(["m"], 1)]
            refused = await ask("evict", StoreModelRequest("m"))
            assert refused.error is not None
            assert refused.error.code is ErrorCode.OVERLOADED
        async with asyncio.timeout(10):
            while (await until_ready(bus)).images[0].leases:
                pass
        assert (await ask("evict", StoreModelRequest("m"))).nbytes == staged.nbytes
        assert (await until_ready(bus)).used_bytes == 0
        unknown = await ask("stage", StoreModelRequest("unknown"))
        assert unknown.error is not None
        assert unknown.error.code is ErrorCode.MODEL_NOT_FOUND
        kinds: list[str] = []
        async with asyncio.timeout(10):
            while "evicted" not in kinds:
                event = await events.get()
                # The store's own arrival is about no model.
                if event.model:
                    kinds.append(event.kind)
        assert kinds[0] == "staging"
        assert "staged" in kinds
        services = await bus.client.request("$SRV.INFO.prism-model-store", timeout=5)
        assert b'"node": "here"' in services.data or b'"node":"here"' in services.data


async def test_a_mended_folder_is_looked_at_when_asked(
    fresh_nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m")
    weights = folder / "model.safetensors"
    whole, changed_at = weights.read_bytes(), weights.stat().st_mtime_ns
    weights.write_bytes(whole[:-4])
    await register(bus, ModelSpec("m", str(folder)), ModelSpec("hub", "nobody/nothing"))

    async def inspect(model: str) -> StoreInspection:
        request = StoreModelRequest(model)
        return await bus.request(subjects.store("here", "inspect"), request, StoreInspection, timeout_s=20)

    with store_process(fresh_nats, tmp_path):
        async with watch_facts(bus) as facts:
            assert "it is cut off" in str((await facts.of("m")).error)
            # As if it had always been whole.
            weights.write_bytes(whole)
            os.utime(weights, ns=(changed_at, changed_at))
            found = (await inspect("m")).facts
            assert found is not None
            assert found.parameters
            bucket = await bus.bucket(subjects.BUCKET_MODELS)
            assert decode((await bucket.get(subjects.facts_key("m"))).value or b"", ModelFacts) == found
            await facts.of("hub")
            still = (await inspect("hub")).facts
            assert still is not None
            assert "the hub cannot be reached" in str(still.error)
            unknown = (await inspect("unknown")).error
            assert unknown is not None
            assert unknown.code is ErrorCode.MODEL_NOT_FOUND


async def test_a_killed_store_is_replaced_and_its_successor_serves_from_disk(
    fresh_nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m")
    content = os.urandom(2_000_000)
    socket = tmp_path / "store.sock"
    with store_process(fresh_nats, tmp_path) as process:
        await until_ready(bus)
        with lease(socket, LeaseRequest("m", str(folder)), 10) as checkpoint:
            before = read_memfd(checkpoint.fd, checkpoint.nbytes)
            fd = memfd_of("image", content)
            manifest = engine_manifest(checkpoint.manifest.fingerprint, len(content))
            deposit(socket, "m", manifest, fd, 10)
            os.close(fd)
            async with asyncio.timeout(10):
                while not any(image.on_disk for image in (await until_ready(bus)).images):
                    pass
            process.kill()
            await asyncio.to_thread(process.wait, 10)
            assert socket.exists()
            # A lease's memory is the borrower's too: the store's death takes nothing away.
            assert read_memfd(checkpoint.fd, checkpoint.nbytes) == before
    with pytest.raises(PrismError) as caught:
        lease(socket, LeaseRequest("m", str(folder)), 10)
    assert caught.value.code is ErrorCode.STORE_UNAVAILABLE
    assert caught.value.retry
    with store_process(fresh_nats, tmp_path):
        await until_ready(bus)
        with lease(socket, LeaseRequest("m", str(folder), LAYOUT), 10) as again:
            assert again.kind is ImageKind.ENGINE
            assert read_memfd(again.fd, again.nbytes) == content


async def ended(process: subprocess.Popen[bytes]) -> str:
    """What a store said that ended by itself, with status 1."""
    _, told = await asyncio.to_thread(process.communicate, None, 30)
    assert process.returncode == 1
    assert b"Traceback" not in told
    return told.decode()


async def test_a_second_store_on_the_same_socket_stands_by(
    fresh_nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    with store_process(fresh_nats, tmp_path) as first:
        await until_ready(bus)
        being_written = tmp_path / "images" / ("0" * 32) / ".writing-image"
        being_written.mkdir(parents=True)
        with store_process(fresh_nats, tmp_path) as second:
            told = await ended(second)
            assert "standby: another model store serves" in told
            assert "takes over when the other is gone" in told
        assert first.poll() is None
        assert (tmp_path / "store.sock").exists()
        assert being_written.exists(), "what the first store is writing is not the second one's to remove"
        await until_ready(bus)


async def test_of_stores_that_find_a_dead_ones_socket_at_once_one_serves(
    fresh_nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m")
    path = tmp_path / "store.sock"
    with store_process(fresh_nats, tmp_path) as first:
        await until_ready(bus)
        first.kill()
        await asyncio.to_thread(first.wait, 10)
    assert path.exists()
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(store_process(fresh_nats, tmp_path)) for _ in range(3)]
        async with asyncio.timeout(30):
            while sum(process.poll() is None for process in processes) > 1:
                await until_ready(bus)
        (serving,) = [process for process in processes if process.poll() is None]
        for process in processes:
            if process is not serving:
                assert "standby" in await ended(process)
        with lease(path, LeaseRequest("m", str(folder)), 10) as checkpoint:
            assert checkpoint.kind is ImageKind.CHECKPOINT
