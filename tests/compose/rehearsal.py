"""The stack's life from `up` to `down`, under load: scaled both ways, a gateway and a worker killed."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.campaign import learn_answers
from tests.chaos.cluster_view import ClusterView, cluster_view
from tests.chaos.stage import prompts_of
from tests.chaos.traffic import COMPLETE, Exchange, Traffic, traffic
from tests.compose.checks import Unexpected, check_client, first_token, until_counted
from tests.compose.stack import NotThere, Stack

from prism.common.messages.models import ModelState

CLIENTS = 6
MEANWHILE = 8
ENOUGH = 60
SEED = 5
FIRST_TOKEN_DEADLINE_S = 180.0
REQUESTS_DEADLINE_S = 150.0
REPLACED_DEADLINE_S = 120.0
LOOK_S = 0.1
SCALED = ("gateway", "global_scheduler", "gpu_worker")
FIRST_MODEL = "tiny-llama"


@dataclass
class Rehearsal:
    """What was seen. Times in seconds, from the command to when everything was right again; `exchanges` are
    the requests of the load."""

    seconds: dict[str, float] = field(default_factory=dict)
    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """What became of the requests that did not end with the whole right answer."""
        return [f"{each.model}: {each.detail}" for each in self.exchanges if each.outcome != COMPLETE]

    @property
    def retried(self) -> int:
        """Requests that a gateway refused, or whose gateway went away, and that were asked again."""
        return sum(1 for each in self.exchanges if each.refused or each.breaks)

    @property
    def breaks(self) -> list[str]:
        """Each connection that ended before its answer was whole."""
        return [line for exchange in self.exchanges for line in exchange.breaks]


async def rehearse(stack: Stack, models: list[Path], tell: Callable[[str], None]) -> Rehearsal:
    """Bring the stack up and do everything to it but `down`; `models` are the tiny ones, for their prompts.

    Raises NotThere, Unexpected or CommandFailed when it does not come to where it should be; requests that
    failed are in the result.
    """
    seen = Rehearsal()
    began = time.monotonic()
    await stack.up()
    seen.seconds["up"] = time.monotonic() - began
    if not stack.gateways:
        raise NotThere("no gateway has a port after `up`")
    await first_token(stack.gateways[0], FIRST_MODEL, FIRST_TOKEN_DEADLINE_S)
    seen.seconds["first_token_after_up"] = time.monotonic() - began
    tell(f"first token {seen.seconds['first_token_after_up']:.1f} s after `up`")
    await check_client(stack.gateways[0])
    await until_counted(stack.nats_url, _counts(1), REPLACED_DEADLINE_S)
    tell("models, streamed chats and the refusal of a bad request are right")
    questions = await learn_answers(stack.gateways[0], prompts_of(models))
    async with (
        cluster_view(stack.nats_url) as view,
        stack.followed(),
        traffic(lambda: stack.gateways, questions, clients=CLIENTS, seed=SEED) as flow,
    ):
        seen.exchanges = flow.exchanges
        await _under_load(stack, view, flow, seen, tell)
    return seen


async def _under_load(
    stack: Stack, view: ClusterView, flow: Traffic, seen: Rehearsal, tell: Callable[[str], None]
) -> None:
    chance = random.Random(SEED)
    await _more(flow)
    began = time.monotonic()
    await stack.scale(dict.fromkeys(SCALED, 2))
    await _right(stack, view, 2)
    seen.seconds["scale_up"] = time.monotonic() - began
    tell(f"two of each after {seen.seconds['scale_up']:.1f} s")
    await _more(flow)
    for service in ("gateway", "gpu_worker"):
        killed = chance.choice(await stack.containers(service))
        began = time.monotonic()
        await stack.kill(killed)
        await stack.restarted(killed, REPLACED_DEADLINE_S)
        await _right(stack, view, 2)
        seen.seconds[f"{service}_replaced"] = time.monotonic() - began
        tell(f"{killed.name} killed, there again after {seen.seconds[f'{service}_replaced']:.1f} s")
        await _more(flow)
    # Of containers that go, logs go too.
    await stack.write_logs("before it is scaled down")
    began = time.monotonic()
    await stack.scale(dict.fromkeys(SCALED, 1))
    await _right(stack, view, 1)
    seen.seconds["scale_down"] = time.monotonic() - began
    tell(f"one of each after {seen.seconds['scale_down']:.1f} s")
    await _more(flow, max(MEANWHILE, ENOUGH - len(flow.exchanges)))


async def _more(flow: Traffic, count: int = MEANWHILE) -> None:
    await flow.more(count, REQUESTS_DEADLINE_S)


async def _right(stack: Stack, view: ClusterView, count: int) -> None:
    """Wait until `count` of each scaled service are there, for clients, for the bus, and for each other."""
    await stack.ready(count, REPLACED_DEADLINE_S)
    await until_counted(stack.nats_url, _counts(count), REPLACED_DEADLINE_S)
    await _all_serve(view, count)
    if wrong := await view.until_right(count, REPLACED_DEADLINE_S):
        raise Unexpected(f"after {REPLACED_DEADLINE_S:.0f} s: {'; '.join(wrong)}")


async def _all_serve(view: ClusterView, workers: int) -> None:
    """Wait until each of `workers` workers has a model that takes requests, which none has at once."""
    deadline = time.monotonic() + REPLACED_DEADLINE_S
    while time.monotonic() < deadline:
        serving = [
            name
            for name, report in view.living().items()
            if any(load.state is ModelState.ACTIVE for load in report.models)
        ]
        if len(serving) == workers == len(view.living()):
            return
        await asyncio.sleep(LOOK_S)
    raise Unexpected(f"not {workers} workers serve after {REPLACED_DEADLINE_S:.0f} s, but {serving}")


def _counts(scaled: int) -> dict[str, int]:
    return {
        "prism-gateway": scaled,
        "prism-global-scheduler": scaled,
        "prism-gpu-worker": scaled,
        "prism-model-store": 1,
    }
