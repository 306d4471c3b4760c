"""Requests that schemathesis makes up from the served OpenAPI document, sound and broken: a real gateway on a
real NATS server, with a scripted worker behind it.

PRISM_FUZZ_CASES says how many at least (`make fuzz`: 10,000), PRISM_FUZZ_SEED which.
"""

import asyncio
import gc
import os
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil
import pytest
from nats.aio.subscription import Subscription
from tests.fuzz.schemathesis_hooks import ASLEEP, BROKEN, SERVED
from tests.gateway.conftest import Stage, bundle, open_stage
from tests.gateway.scripted_worker import ScriptedWorker, Turn

from prism.cli.nats_server import NatsServer
from prism.common.bus import Bus
from prism.common.messages.generation import TokenLogprob
from prism.common.messages.models import TokenizerBundle
from prism.gateway.replies import Inbox
from prism.gateway.settings import Settings

__all__ = ["bundle"]

CASES = int(os.environ.get("PRISM_FUZZ_CASES", "2000"))
SEED = os.environ.get("PRISM_FUZZ_SEED", "1")
WARM_UP_CASES = 300
REQUEST_DEADLINE_S = 10
RUN_DEADLINE_S = 60 + CASES / 20
OPERATIONS = 4
"""Those that take something, and get a share of the cases each; the others get a few on top."""
GROWTH_BYTES = 16 * 1024 * 1024
SETTLE_DEADLINE_S = 20.0
SAME_LOOKS = 3
"""Looks one after the other that find the same: what is on its way out is gone by then."""
LOOK_S = 0.1
ROOT = Path(__file__).parents[2]


async def repeat_prompt(turn: Turn) -> None:
    """Answer with the prompt's first tokens, and with log-probabilities if they are asked for."""
    request = turn.request
    tokens = request.input_ids[: min(8, request.sampling.max_new_tokens)]
    scores = None
    if (top := request.top_logprobs) is not None:
        scores = [TokenLogprob(-0.5, [(token, -0.5) for token in range(top)]) for _ in tokens]
    await turn.send(tokens[:1], logprobs=scores and scores[:1])
    await turn.send(tokens[1:], finish="stop", logprobs=scores and scores[1:])


@dataclass(frozen=True)
class Held:
    """What a gateway holds while nobody asks anything of it."""

    parked: float
    in_flight: float
    inboxes: int
    tasks: int
    subscriptions: int
    memory_bytes: int


class FuzzedGateway:
    """A gateway with a served, a sleeping and a broken model."""

    def __init__(self, stage: Stage, worker: ScriptedWorker) -> None:
        self.stage = stage
        self._worker = worker

    async def fuzz(self, cases: int, folder: Path) -> tuple[int, str]:
        """Send about so many requests: how many they were, and the complaints of schemathesis, if any."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{self.stage.gateway.url}/openapi.json"),
            *("--max-examples", str(-(-cases // OPERATIONS)), "--seed", SEED, "--phases", "coverage,fuzzing"),
            # No schema tells that two fields contradict each other, or that a text makes no token; and which
            # server errors are right is told by a check of our own.
            *("--exclude-checks", "positive_data_acceptance,not_a_server_error"),
            *("--request-timeout", str(REQUEST_DEADLINE_S), "--generation-database", "none", "--no-color"),
            *("--warnings", "off"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=folder,
            env={
                **os.environ,
                "SCHEMATHESIS_HOOKS": "tests.fuzz.schemathesis_hooks",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            },
        )
        try:
            async with asyncio.timeout(RUN_DEADLINE_S):
                printed, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        text = printed.decode()
        count = re.search(r"(\d+) generated", text)
        assert count is not None, text
        return int(count[1]), "" if process.returncode == 0 else text

    async def answers(self) -> dict[int, int]:
        """How often the generation endpoints answered with which status."""
        text = (await self.stage.http.get("/metrics")).text
        counts: Counter[int] = Counter()
        for line in text.splitlines():
            if found := re.fullmatch(r'prism_gateway_requests_total{.*status="(\d+)"} (\S+)', line):
                counts[int(found[1])] += int(float(found[2]))
        return dict(sorted(counts.items()))

    async def held(self) -> Held:
        """What the gateway holds once all requests are over."""
        # The scripted worker keeps what it was sent, for tests that look at it.
        self._worker.forget()
        same, seen = 0, None
        deadline = time.monotonic() + SETTLE_DEADLINE_S
        while same < SAME_LOOKS:
            now = await self._look()
            same = (
                same + 1 if seen is not None and replace(now, memory_bytes=seen.memory_bytes) == seen else 0
            )
            seen = now
            assert time.monotonic() < deadline, f"still changing: {now}"
            await asyncio.sleep(LOOK_S)
        assert seen is not None
        return seen

    async def _look(self) -> Held:
        text = (await self.stage.eventually("/metrics", _idle)).text
        gc.collect()
        return Held(
            parked=_metric(text, "parked"),
            in_flight=_metric(text, "in_flight"),
            inboxes=_alive(Inbox),
            tasks=len(asyncio.all_tasks()),
            subscriptions=_alive(Subscription),
            memory_bytes=psutil.Process().memory_info().rss,
        )


def _metric(text: str, name: str) -> float:
    """The sum of a gauge over all its labels."""
    lines = [line for line in text.splitlines() if line.startswith(f"prism_gateway_{name}")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def _alive(kind: type) -> int:
    """How many objects of exactly this class there are.

    `isinstance` would read each object's `__class__`, which some proxies of loaded packages warn about.
    """
    return sum(type(item) is kind for item in gc.get_objects())


def _idle(answer: httpx.Response) -> bool:
    return _metric(answer.text, "in_flight") == 0


@pytest.fixture
async def fuzzed(bus: Bus, fresh_nats: NatsServer, bundle: TokenizerBundle) -> AsyncIterator[FuzzedGateway]:
    settings = Settings(park_s=0.02)
    async with open_stage(bus, fresh_nats, bundle, settings) as stage:
        await stage.register(SERVED)
        await stage.register(ASLEEP)
        await stage.register(BROKEN, error="its folder holds no weights")
        yield FuzzedGateway(stage, await stage.worker(repeat_prompt, SERVED))


async def test_no_request_breaks_the_gateway_or_leaves_something_behind(
    fuzzed: FuzzedGateway, tmp_path: Path
) -> None:
    await fuzzed.fuzz(WARM_UP_CASES, tmp_path)
    before = await fuzzed.held()
    count, found = await fuzzed.fuzz(CASES, tmp_path)
    assert not found, found
    assert count >= CASES
    answers = await fuzzed.answers()
    print(f"{count} cases, seed {SEED}; generation endpoints answered {answers}")
    assert {200, 400, 404, 503} <= set(answers), "the cases reach every kind of answer"
    after = await fuzzed.held()
    print(f"before: {before}\nafter:  {after}")
    assert (after.parked, after.in_flight, after.inboxes) == (0, 0, 0)
    assert after.tasks <= before.tasks
    assert after.subscriptions <= before.subscriptions
    assert after.memory_bytes - before.memory_bytes < GROWTH_BYTES
