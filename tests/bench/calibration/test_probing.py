"""Measuring through the gateway's HTTP, against one that is scripted."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from prism.bench.calibration.probing import (
    OUTPUT,
    all_of,
    beside_once,
    generate,
    probe_once,
    served_models,
    slowdown_once,
)
from prism.common.errors import ErrorCode, PrismError

pytestmark = pytest.mark.core


ANSWER = b"data: {}\n\ndata: [DONE]\n\n"


class _Stream(httpx.AsyncByteStream):
    def __init__(self, gates: list[asyncio.Event]) -> None:
        self._gates = gates

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for gate in self._gates:
            await gate.wait()
            yield b"data: {}\n\n"
        yield b"data: [DONE]\n\n"


def client_of(handler: object) -> httpx.AsyncClient:
    transport = httpx.MockTransport(handler)  # type: ignore[arg-type]  # sync or async
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


async def test_the_first_chunk_is_the_first_token_and_the_end_the_last() -> None:
    first, last, arrived = asyncio.Event(), asyncio.Event(), asyncio.Event()
    asked: list[dict[str, object]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        arrived.set()
        return httpx.Response(200, stream=_Stream([first, last]))

    async with client_of(answer) as client:
        running = asyncio.create_task(generate(client, "m", 7, 5, random.Random(1)))
        await arrived.wait()
        first.set()
        last.set()
        seen = await running
    assert len(asked[0]["input_ids"]) == 7  # type: ignore[arg-type]
    assert asked[0]["sampling_params"] == {"max_new_tokens": 5, "ignore_eos": True, "temperature": 0}
    assert 0 < seen.ttft_s <= seen.total_s
    assert seen.tpot_s == pytest.approx((seen.total_s - seen.ttft_s) / 4)


async def test_prefills_are_measured_alone_and_while_all_others_decode_in_turn() -> None:
    ends: dict[str, asyncio.Event] = {}
    beside: list[tuple[str, int, list[str]]] = []

    class Decoded(httpx.AsyncByteStream):
        def __init__(self, model: str) -> None:
            self._model = model

        async def __aiter__(self) -> AsyncIterator[bytes]:
            ends[self._model] = asyncio.Event()
            yield b"data: {}\n\n"
            await ends[self._model].wait()
            del ends[self._model]
            yield ANSWER

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if body["sampling_params"]["max_new_tokens"] > 1:
            return httpx.Response(200, stream=Decoded(body["model"]))
        beside.append((body["model"], len(body["input_ids"]), sorted(ends)))
        for end in ends.values():
            end.set()
        return httpx.Response(200, stream=httpx.ByteStream(ANSWER))

    async with client_of(answer) as client:
        seen = await beside_once(client, {"a": 600, "b": 1 << 17, "c": 1 << 17}, 512, random.Random(1))
    assert [(each.model, each.prompt_tokens) for each in seen] == [("a", 300), ("b", 512), ("c", 512)]
    assert all(min(each.alone_s, each.beside_s) > 0 for each in seen)
    assert beside == [
        (each.model, each.prompt_tokens, others)
        for each in seen
        for others in ([], [other for other in "abc" if other != each.model])
    ]


async def test_nobody_waits_for_the_first_token_of_one_that_fails() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        failed = json.loads(request.content)["model"] == "b"
        return httpx.Response(
            503 if failed else 200, stream=httpx.ByteStream(b"no such luck" if failed else ANSWER)
        )

    async with client_of(answer) as client:
        with pytest.raises(PrismError, match="b: status 503"):
            await beside_once(client, {"a": 600, "b": 600}, 512, random.Random(1))


async def test_prompts_differ_so_that_no_prefix_is_cached() -> None:
    asked: list[list[int]] = []
    open_gate = asyncio.Event()
    open_gate.set()

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content)["input_ids"])
        return httpx.Response(200, stream=_Stream([open_gate]))

    async with client_of(answer) as client:
        random_ = random.Random(1)
        for _ in range(3):
            await generate(client, "m", 16, 1, random_)
    assert len({tuple(ids[:8]) for ids in asked}) == 3


async def test_no_prompt_of_a_probe_takes_two_passes() -> None:
    asked: set[int] = set()

    def answer(request: httpx.Request) -> httpx.Response:
        asked.add(len(json.loads(request.content)["input_ids"]))
        return httpx.Response(200, stream=httpx.ByteStream(ANSWER))

    async with client_of(answer) as client:
        seen = await probe_once(client, "m", 1 << 17, 1024, random.Random(1))
        assert sorted(seen.first_token_s) == [8, 64, 128, 256, 512, 1024]
        assert (max(asked), seen.burst_tokens, seen.pass_tokens) == (1024, 1024, 1024)
        assert sorted(seen.burst_s) == [1, 6]
        short = await probe_once(client, "m", 600, 1024, random.Random(1))
        assert (max(short.first_token_s), sorted(short.burst_s)) == (512, [1, 12]), "six passes as well"


async def test_an_error_of_the_system_is_told() -> None:
    async with client_of(lambda request: httpx.Response(503, text="no such luck")) as client:
        with pytest.raises(PrismError, match="m: status 503: no such luck"):
            await generate(client, "m", 4, 4, random.Random(1))


@pytest.mark.parametrize("said", [b"", b'data: {}\n\ndata: {"error": {"message": "engine lost"}}\n\n'])
async def test_an_answer_that_breaks_off_is_an_error_and_no_measurement(said: bytes) -> None:
    async with client_of(lambda request: httpx.Response(200, stream=httpx.ByteStream(said))) as client:
        with pytest.raises(PrismError, match=r"m: the answer broke off, after: '.*'"):
            await generate(client, "m", 4, 4, random.Random(1))


async def test_when_one_fails_the_others_are_ended() -> None:
    ended = asyncio.Event()

    async def others() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def fails() -> None:
        raise PrismError(ErrorCode.INTERNAL, "no such luck")

    with pytest.raises(PrismError, match="no such luck"):
        await all_of([others(), fails()])
    assert ended.is_set()


async def test_models_that_decode_at_once_do_so_for_as_long_as_the_slowest() -> None:
    outputs: dict[str, list[int]] = {"fast": [], "slow": []}
    clock = [1.0]

    class Decoded(httpx.AsyncByteStream):
        def __init__(self, model: str, tokens: int) -> None:
            self._seconds = tokens * (1.0 if model == "fast" else 3.0)

        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"data: {}\n\n"
            clock[0] += self._seconds
            yield ANSWER

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        tokens = body["sampling_params"]["max_new_tokens"]
        outputs[body["model"]].append(tokens)
        return httpx.Response(200, stream=Decoded(body["model"], tokens))

    async with client_of(answer) as client:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "perf_counter", lambda: clock[0])
            await slowdown_once(client, {"fast": 4096, "slow": 4096}, random.Random(1))
            await slowdown_once(client, {"fast": 160, "slow": 4096}, random.Random(1))
    assert outputs["slow"] == [OUTPUT] * 4
    assert outputs["fast"] == [OUTPUT, 3 * OUTPUT, OUTPUT, 80], "within its context"


async def test_a_gateway_that_is_not_there_is_told() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    async with client_of(refuse) as client:
        with pytest.raises(PrismError, match="does not list its models"):
            await served_models(client)
