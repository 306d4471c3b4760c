"""What a client sees of a stack: its models, a streamed chat, a refusal; and what the bus says."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping

import httpx
import nats
from nats.aio.msg import Msg

ANSWER_DEADLINE_S = 90.0
SHORT_DEADLINE_S = 10.0
PING_S = 1.0
LOOK_S = 0.5
TOKENS = 12
MODELS = frozenset({"tiny-llama", "tiny-qwen3", "tiny-llama-big"})


class Unexpected(Exception):
    """The stack answered, but not as it should; the message says what and how."""


async def first_token(gateway: str, model: str, deadline_s: float) -> None:
    """Ask until the first token of an answer has come, as a client does that waits for a stack to be there.

    Raises Unexpected when none has come after `deadline_s`.
    """
    deadline = time.monotonic() + deadline_s
    told = "nothing yet"
    while time.monotonic() < deadline:
        try:
            # Whatever has not answered by then is asked again.
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                if await chat(gateway, model, tokens=1):
                    return
        except (httpx.HTTPError, Unexpected, TimeoutError) as error:
            told = f"{type(error).__name__} {error}"
        await asyncio.sleep(LOOK_S)
    raise Unexpected(f"no token of {model} after {deadline_s:.0f} s: {told}")


async def chat(gateway: str, model: str, *, tokens: int = TOKENS) -> list[str]:
    """A streamed chat: the pieces of its answer. Raises Unexpected, or httpx.HTTPError."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Tell me of the sea."}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }
    pieces: list[str] = []
    async with (
        httpx.AsyncClient(base_url=gateway, timeout=ANSWER_DEADLINE_S) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        if response.status_code != 200:
            raise Unexpected(f"chat: {response.status_code} {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data == line:
                continue
            if data == "[DONE]":
                return pieces
            event = json.loads(data)
            if "error" in event:
                raise Unexpected(f"chat: {event['error']}")
            pieces += [text for each in event["choices"] if (text := each["delta"].get("content"))]
    raise Unexpected("chat: the stream ended without its last event")


async def check_client(gateway: str) -> None:
    """Models are listed, each streams a chat, a bad request is refused as OpenAI does. Raises Unexpected."""
    async with httpx.AsyncClient(base_url=gateway, timeout=SHORT_DEADLINE_S) as client:
        listed = (await client.get("/v1/models")).json()
        names = {each["id"] for each in listed["data"]}
        if listed["object"] != "list" or not names >= MODELS:
            raise Unexpected(f"/v1/models: {sorted(names)}")
        refused = await client.post("/v1/chat/completions", json={"model": "tiny-llama", "messages": "none"})
    error = refused.json().get("error", {})
    if not 400 <= refused.status_code < 500 or not {"message", "type", "param", "code"} <= set(error):
        raise Unexpected(f"bad request: {refused.status_code} {refused.text[:300]}")
    for model in sorted(MODELS):
        pieces = await chat(gateway, model)
        if len(pieces) < 2:
            raise Unexpected(f"{model} was to stream its answer, and sent {pieces}")


async def count_services(nats_url: str) -> Counter[str]:
    """How many instances of each service answer `$SRV.PING`."""
    found: Counter[str] = Counter()

    async def on_answer(message: Msg) -> None:
        found[json.loads(message.data)["name"]] += 1

    client = await nats.connect(nats_url, connect_timeout=int(SHORT_DEADLINE_S), max_reconnect_attempts=1)
    try:
        inbox = client.new_inbox()
        await client.subscribe(inbox, cb=on_answer)
        await client.publish("$SRV.PING", b"", reply=inbox)
        await client.flush(timeout=int(SHORT_DEADLINE_S))
        await asyncio.sleep(PING_S)
    finally:
        await client.close()
    return found


async def until_counted(nats_url: str, wanted: Mapping[str, int], deadline_s: float) -> None:
    """Wait until each service answers as often as `wanted` says. Raises Unexpected."""
    deadline = time.monotonic() + deadline_s
    while (found := await count_services(nats_url)) != wanted:
        if time.monotonic() > deadline:
            raise Unexpected(f"$SRV.PING after {deadline_s:.0f} s: {dict(found)}, not {dict(wanted)}")
        await asyncio.sleep(LOOK_S)
