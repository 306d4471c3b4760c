"""A library's script in `scripts/`: what it saw of the gateway, whether a stream that it left has ended."""

import asyncio
import json
from pathlib import Path
from typing import Any

from tests.clients.conftest import CLIENTS, MODEL, Count, Run

from prism.cli.system import RunningSystem

SCRIPTS = Path(__file__).parent / "scripts"
OUTPUT_TOKENS = 12
LEFT_DEADLINE_S = 20.0


async def what_it_saw(script: str, run: Run, system: RunningSystem, folder: Path) -> dict[str, Any]:
    """Run a script to its end: the JSON object that it wrote."""
    result = folder / "seen.json"
    arguments = (f"{system.gateway_url}/v1", MODEL, str(OUTPUT_TOKENS), result)
    await run(CLIENTS / "bin" / "python", SCRIPTS / script, *arguments)
    seen: dict[str, Any] = json.loads(result.read_text())
    return seen


async def streams_left(count: Count, before: int) -> int:
    """How many chats were left by their client since there were `before`, once nothing is in progress."""
    async with asyncio.timeout(LEFT_DEADLINE_S):
        while (now := await count()).in_flight():
            continue
    return now.requests("/v1/chat/completions", 499, MODEL) - before


def check_answer(answer: dict[str, Any]) -> None:
    """An answer that ran to its length, with a usage that adds up."""
    assert answer["text"]
    assert answer["finish"] == "length"
    prompt_tokens, completion_tokens, total_tokens = answer["usage"]
    assert prompt_tokens > 0
    assert completion_tokens == OUTPUT_TOKENS
    assert total_tokens == prompt_tokens + completion_tokens


def check_stream(stream: dict[str, Any], whole: dict[str, Any]) -> None:
    """A stream came in pieces, and says what the whole answer says."""
    check_answer(stream)
    assert stream["chunks"] > OUTPUT_TOKENS // 4
    assert (stream["text"], stream["usage"]) == (whole["text"], whole["usage"])
