"""The gateway as a service: models, health, metrics, limits, its end."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.gateway.conftest import CONTEXT_LENGTH, MakeStage, Stage, open_stage
from tests.gateway.reading import joined, live_events, read_failed_events
from tests.gateway.scripted_worker import Turn, hanging, saying, scripted_worker

from prism.cli.nats_server import NatsServer, nats_server
from prism.common import subjects
from prism.common.bus import Bus, connect_bus
from prism.common.messages.codec import encode
from prism.common.messages.models import ModelSpec, TokenizerBundle
from prism.common.messages.placement import Route
from prism.gateway.service import running_gateway
from prism.gateway.settings import Settings

pytestmark = pytest.mark.core

PROMPT = {"model": "m", "prompt": "hello"}


async def test_models_tell_how_they_stand(stage: Stage) -> None:
    await stage.register("org/awake-1.5")
    await stage.register("sleeping")
    await stage.register("broken", error="no config.json")
    await stage.worker(hanging, "org/awake-1.5")
    listed = (await stage.http.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert {model["id"]: model["state"] for model in listed["data"]} == {
        "broken": "failed",
        "org/awake-1.5": "ready",
        "sleeping": "sleeping",
    }
    one = (await stage.http.get("/v1/models/org/awake-1.5")).json()
    assert (one["object"], one["context_length"], one["reason"]) == ("model", CONTEXT_LENGTH, None)
    assert "no config.json" in (await stage.http.get("/v1/models/broken")).json()["reason"]
    assert (await stage.http.get("/v1/models/none")).status_code == 404


async def test_model_whose_folder_was_not_read_yet_asks_to_come_back(stage: Stage) -> None:
    registry = await stage.bus.bucket(subjects.BUCKET_MODELS)
    await registry.put(subjects.spec_key("new"), encode(ModelSpec("new", "/nowhere")))
    await stage.ready("new", "sleeping")
    response = await stage.http.post("/v1/completions", json={**PROMPT, "model": "new"})
    assert response.status_code == 503
    assert response.headers["retry-after"]


async def test_readiness_follows_workers_and_drain(make_stage: MakeStage) -> None:
    stage = await make_stage(Settings(silence_s=2.0))
    assert (await stage.http.get("/readyz")).status_code == 200
    await stage.register("m")
    unready = await stage.http.get("/readyz")
    assert unready.status_code == 503
    assert "no worker" in unready.json()["reason"]
    worker = await stage.worker(hanging)
    await stage.eventually("/readyz", lambda answer: answer.status_code == 200)
    assert (await stage.http.get("/health")).status_code == 200
    worker.silent = True
    await stage.eventually("/readyz", lambda answer: answer.status_code == 503)
    assert (await stage.http.get("/health")).status_code == 503
    assert (await stage.http.get("/healthz")).status_code == 200
    assert stage.gateway.unready() is not None


async def test_readiness_and_liveness_when_the_bus_is_lost(tmp_path: Path, bundle: TokenizerBundle) -> None:
    with nats_server(tmp_path / "one") as server:
        async with (
            connect_bus(server.url, name="test") as bus,
            open_stage(bus, server, bundle, Settings()) as stage,
        ):
            assert (await stage.http.get("/readyz")).status_code == 200
            server.process.kill()
            lost = await stage.eventually("/readyz", lambda answer: answer.status_code == 503)
            assert "bus" in lost.json()["reason"]
            assert (await stage.http.get("/healthz")).status_code == 200


async def test_metrics_count_what_happened(stage: Stage) -> None:
    await stage.register(ModelSpec("m", "/nowhere", ttft_slo_ms=60_000, tpot_slo_ms=60_000))
    await stage.worker(saying(stage.ids("one "), stage.ids("two")), "m")
    await stage.http.post("/v1/completions", json=PROMPT)
    await stage.register(ModelSpec("strict", "/nowhere", ttft_slo_ms=0.001))
    await stage.worker(saying(stage.ids("one")), "strict", name="worker-2")
    await stage.http.post("/v1/completions", json=PROMPT)
    await stage.http.post("/v1/completions", json={**PROMPT, "model": "strict"})
    await stage.http.post("/v1/completions", json={**PROMPT, "model": "made-up"})
    response = await stage.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    values = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))

    def value(name: str) -> float:
        return float(values[f"prism_gateway_{name}"])

    tokens = len(stage.ids("one ")) + len(stage.ids("two"))
    assert value('requests_total{endpoint="/v1/completions",model="m",status="200"}') == 2
    assert value('requests_total{endpoint="/v1/completions",model="unknown",status="404"}') == 1
    assert value('generated_tokens_total{model="m"}') == 2 * tokens
    assert value('prompt_tokens_total{model="m"}') == 2 * len(stage.ids("hello"))
    assert value('time_to_first_token_seconds_count{model="m"}') == 2
    assert value('inter_token_seconds_count{model="m"}') == 2
    assert value('slo_total{model="m",objective="ttft",outcome="attained"}') == 2
    assert value('slo_total{model="strict",objective="ttft",outcome="missed"}') == 1
    assert value('slo_total{model="m",objective="tpot",outcome="attained"}') == 2
    assert value("in_flight") == 0
    assert "made-up" not in response.text


async def test_body_beyond_the_limit_is_refused(make_stage: MakeStage) -> None:
    stage = await make_stage(Settings(max_body_bytes=1000))
    await stage.register("m")

    async def in_parts() -> Any:
        for _ in range(20):
            yield b" " * 100

    for content in (b" " * 1001, in_parts()):
        response = await stage.http.post("/v1/completions", content=content)
        assert response.status_code == 413
        assert "1000 bytes" in response.json()["error"]["message"]


async def test_it_shows_among_the_micro_services(stage: Stage) -> None:
    answer = await stage.bus.client.request("$SRV.PING.prism-gateway", b"", timeout=5)
    assert stage.gateway.name in answer.data.decode()


async def test_drain_finishes_streams_and_closes_the_door(stage: Stage) -> None:
    await stage.register("m")
    go_on = asyncio.Event()

    async def script(turn: Turn) -> None:
        await turn.send(stage.ids("one "))
        await go_on.wait()
        await turn.send(stage.ids("two"), finish="stop")

    await stage.worker(script, "m")
    async with stage.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as response:
        events = live_events(response)
        assert "one " in await anext(events)
        drain = asyncio.create_task(stage.gateway.drain(20))
        await _refused(stage.gateway.url)
        assert "draining" in (stage.gateway.unready() or "")
        go_on.set()
        assert [event async for event in events][-1] == "[DONE]"
    await asyncio.wait_for(drain, 5)


async def test_whoever_has_connected_before_the_door_closes_is_answered(stage: Stage) -> None:
    await stage.register("m")
    await stage.worker(saying(stage.ids("yes")), "m")
    url = httpx.URL(stage.gateway.url)
    body = json.dumps({**PROMPT, "max_tokens": 5}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    # In one go with the drain's beginning: the kernel has made these connections, nobody has taken them.
    waiting = [socket.create_connection((url.host, url.port or 80)) for _ in range(20)]
    *prompt, late = waiting
    for each in prompt:
        each.sendall(head + body)
    drain = asyncio.create_task(stage.gateway.drain(20))
    answers = [asyncio.create_task(_whole(each)) for each in waiting]
    await _refused(stage.gateway.url)
    late.sendall(head + body)
    for answer in await asyncio.gather(*answers):
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        assert b'"yes"' in answer
    await asyncio.wait_for(drain, 10)


async def _whole(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    reader, writer = await asyncio.open_connection(sock=connection)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


async def test_drain_that_takes_too_long_ends_streams_with_an_error(stage: Stage) -> None:
    await stage.register("m")

    async def script(turn: Turn) -> None:
        await turn.send(stage.ids("one "))

    worker = await stage.worker(script, "m")
    request = asyncio.create_task(stage.http.post("/v1/completions", json={**PROMPT, "stream": True}))
    turn = await worker.turns.get()
    await stage.eventually(
        "/metrics", lambda answer: 'time_to_first_token_seconds_count{model="m"} 1.0' in answer.text
    )
    await stage.gateway.drain(0.05)
    events, error = read_failed_events((await request).text)
    assert joined(events) == "one "
    assert "shutting down" in error["message"]
    assert await worker.cancels.get() == turn.request.rid


async def _refused(url: str) -> None:
    """Wait until nobody listens at `url`."""
    deadline = asyncio.get_running_loop().time() + 10
    while asyncio.get_running_loop().time() < deadline:
        try:
            async with httpx.AsyncClient(base_url=url) as http:
                await http.get("/healthz")
        except httpx.ConnectError:
            return
    raise AssertionError(f"{url} still takes connections")


async def test_process_serves_and_ends_on_sigterm(
    bus: Bus, fresh_nats: NatsServer, bundle: TokenizerBundle
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "prism.gateway", "--port", "0", "--nats", fresh_nats.url),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PRISM_GATEWAY_DRAIN_S": "5"},
    )
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
        found = re.fullmatch(r"gateway ready at (http://127\.0\.0\.1:\d+)\n", line)
        assert found is not None, line
        async with httpx.AsyncClient(base_url=found[1]) as http:
            assert (await http.get("/readyz")).json() == {"status": "ready"}
            async with scripted_worker(bus, "worker-1", hanging):
                assert (await http.get("/v1/models")).json() == {"object": "list", "data": []}
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 15) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("part", ["watch", "routes", "http"])
async def test_gateway_ends_with_what_any_of_its_tasks_ends_with(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def burst(*_: object, **__: object) -> None:
        raise ArithmeticError("a cog is missing")

    async def serve() -> None:
        async with asyncio.timeout(20), running_gateway(bus) as gateway:
            match part:
                case "watch":
                    monkeypatch.setattr(gateway._fleet, "drop_silent", burst)
                case "routes":
                    monkeypatch.setattr(gateway._fleet, "_on_change", burst)
                    await routes.put("m.worker-1", encode(Route("m", "worker-1", "node")))
                case "http":
                    monkeypatch.setattr(gateway.server, "on_tick", burst)
            await asyncio.Event().wait()

    routes = await bus.bucket(subjects.BUCKET_ROUTES)
    with pytest.raises(ExceptionGroup) as caught:
        await serve()
    assert caught.group_contains(ArithmeticError, match="a cog is missing")


async def test_taken_port_is_told_in_one_line(stage: Stage, fresh_nats: NatsServer) -> None:
    port = stage.gateway.url.rpartition(":")[2]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "prism.gateway", "--port", port, "--nats", fresh_nats.url),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, told = await asyncio.wait_for(process.communicate(), 30)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in told.decode()
    assert "Traceback" not in told.decode()
