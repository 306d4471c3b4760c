"""Steady traffic whose every token is known beforehand, so that one lost or doubled shows."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

REQUEST_DEADLINE_S = 150.0
FINISH_DEADLINE_S = 180.0
RETRY_S = 0.1

COMPLETE, LOST, DOUBLED, WRONG = "complete", "lost", "doubled", "wrong"


@dataclass(frozen=True)
class Question:
    """A prompt whose greedy continuation is known and free of near-ties."""

    model: str
    prompt: list[int]
    answer: list[int]


@dataclass
class Exchange:
    """What became of one request. `stall_s` is the longest silence its client saw. After each gateway that
    took no connection (`refused` counts them), or let one go before its answer was whole (`breaks` tells of
    each), the client asked again from the start."""

    model: str
    began: float
    ended: float = 0.0
    outcome: str = LOST
    detail: str = "not finished"
    stall_s: float = 0.0
    gateway: str = ""
    refused: int = 0
    breaks: list[str] = field(default_factory=list)


def judge(tokens: Sequence[int], answer: Sequence[int]) -> str:
    """What happened to an answer on its way: complete, lost (tokens missing), doubled (tokens twice), or
    wrong."""
    if list(tokens) == list(answer):
        return COMPLETE
    if _within(tokens, answer):
        return LOST
    return DOUBLED if _within(answer, tokens) else WRONG


def _within(part: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether `part` is `whole` with nothing changed but some of it left out."""
    rest = iter(whole)
    return all(token in rest for token in part)


@dataclass
class Traffic:
    """Clients that ask one question after the other. `gateways` says where, each time anew."""

    gateways: Callable[[], list[str]]
    questions: list[Question]
    seed: int
    exchanges: list[Exchange] = field(default_factory=list)
    _stopped: bool = False
    _finished: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def breaks(self) -> list[str]:
        """Each connection that ended before its answer was whole."""
        return [line for exchange in self.exchanges for line in exchange.breaks]

    async def more(self, count: int, timeout_s: float) -> None:
        """Wait until `count` further requests have ended."""
        target = sum(1 for exchange in self.exchanges if exchange.ended) + count
        async with asyncio.timeout(timeout_s):
            while sum(1 for exchange in self.exchanges if exchange.ended) < target:
                self._finished.clear()
                await self._finished.wait()

    def stop(self) -> None:
        """Ask no further questions."""
        self._stopped = True

    async def client(self, number: int) -> None:
        """Ask until stopped."""
        chance = random.Random(f"{self.seed}/{number}")
        while not self._stopped:
            await self.ask(chance.choice(self.questions), chance)
            self._finished.set()

    async def ask(self, question: Question, chance: random.Random) -> Exchange:
        """One request, asked again elsewhere when its gateway goes away."""
        exchange = Exchange(question.model, time.monotonic())
        self.exchanges.append(exchange)
        try:
            async with asyncio.timeout(REQUEST_DEADLINE_S):
                while True:
                    exchange.gateway = chance.choice(self.gateways())
                    try:
                        await _stream(exchange.gateway, question, exchange)
                        break
                    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                        exchange.refused += 1
                        exchange.detail = f"{type(error).__name__}: {error}"
                    except httpx.TransportError as error:
                        exchange.detail = f"{exchange.gateway}: {type(error).__name__}: {error}"
                        exchange.breaks.append(exchange.detail)
                    await asyncio.sleep(RETRY_S)
        except TimeoutError:
            exchange.detail = f"no end after {REQUEST_DEADLINE_S:.0f} s; {exchange.detail}"
        exchange.ended = time.monotonic()
        return exchange


async def _stream(gateway: str, question: Question, exchange: Exchange) -> None:
    body = {
        "model": question.model,
        "input_ids": question.prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": len(question.answer)},
        "stream": True,
    }
    tokens: list[int] = []
    heard = time.monotonic()
    timeout = httpx.Timeout(REQUEST_DEADLINE_S, connect=5.0)
    # A connection of its own each time, as from a client behind a load balancer.
    async with (
        httpx.AsyncClient(base_url=gateway, timeout=timeout) as client,
        client.stream("POST", "/generate", json=body) as response,
    ):
        if response.status_code != 200:
            exchange.outcome = LOST
            exchange.detail = f"{response.status_code}: {(await response.aread()).decode()[:300]}"
            return
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            now = time.monotonic()
            exchange.stall_s = max(exchange.stall_s, now - heard)
            heard = now
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                exchange.outcome = judge(tokens, question.answer)
                exchange.detail = "" if exchange.outcome == COMPLETE else f"{tokens} for {question.answer}"
                return
            event = json.loads(data)
            if "error" in event:
                exchange.outcome = LOST
                exchange.detail = str(event["error"])[:300]
                return
            before, tokens = tokens, event["output_ids"]
            if tokens[: len(before)] != before:
                exchange.outcome = WRONG
                exchange.detail = f"{before} became {tokens}"
                return
    raise httpx.RemoteProtocolError("the stream ended without its last event")


@asynccontextmanager
async def traffic(
    gateways: Callable[[], list[str]], questions: list[Question], *, clients: int, seed: int
) -> AsyncIterator[Traffic]:
    """Traffic of `clients` requests at a time while the block runs; all that has begun is then waited for."""
    flow = Traffic(gateways, questions, seed)
    tasks = [asyncio.create_task(flow.client(number), name=f"client {number}") for number in range(clients)]
    try:
        yield flow
        flow.stop()
        async with asyncio.timeout(FINISH_DEADLINE_S):
            await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
