"""Reading the gateway's event streams."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx


def read_events(text: str) -> list[Any]:
    """The events of a whole stream, without [DONE], which must come last."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def read_failed_events(text: str) -> tuple[list[Any], Any]:
    """The events of a stream that failed, and the error that ends it."""
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]
    return events[:-1], events[-1]["error"]


async def live_events(response: httpx.Response) -> AsyncIterator[str]:
    """Data of the events as they come."""
    async for line in response.aiter_lines():
        if line:
            yield line.removeprefix("data: ")


def joined(events: list[Any], index: int = 0) -> str:
    """The text of one choice of a chat or completion stream."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(
        choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices
    )
