"""How an answer is judged, and how what happened to its connection is counted."""

import asyncio
import json
from random import Random

import pytest
from tests.chaos.campaign import FaultReport
from tests.chaos.traffic import COMPLETE, DOUBLED, LOST, WRONG, Question, Traffic, judge

from prism.bench.gateway.stacks import free_port

pytestmark = pytest.mark.core

ANSWER = [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("tokens", "outcome"),
    [
        ([5, 6, 7, 8, 9], COMPLETE),
        ([5, 6, 8, 9], LOST),
        ([5, 6, 7], LOST),
        ([], LOST),
        ([5, 6, 6, 7, 8, 9], DOUBLED),
        ([5, 6, 7, 5, 6, 7, 8, 9], DOUBLED),
        ([5, 6, 1, 8, 9], WRONG),
    ],
)
def test_an_answer_with_tokens_missing_or_repeated_is_told_from_a_complete_one(
    tokens: list[int], outcome: str
) -> None:
    assert judge(tokens, ANSWER) == outcome


async def test_a_stream_that_breaks_is_told_from_a_connection_that_nobody_took() -> None:
    event = f"data: {json.dumps({'output_ids': ANSWER})}\n\n"
    # A connection each: broken before the answer, broken within it, whole.
    answers = iter(["", event, f"{event}data: [DONE]\n\n"])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if answer := next(answers):
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + answer.encode())
        writer.close()

    nobody = free_port()
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        ports = iter([nobody, *[server.sockets[0].getsockname()[1]] * 3])
        flow = Traffic(lambda: [f"http://127.0.0.1:{next(ports)}"], [], 0)
        exchange = await flow.ask(Question("m", [1], ANSWER), Random(0))
    assert (exchange.outcome, exchange.refused, len(exchange.breaks)) == (COMPLETE, 1, 2)
    assert flow.breaks == exchange.breaks


def test_a_broken_stream_is_a_fault_unless_its_gateway_died() -> None:
    assert FaultReport("bus restarted", refused=3).clean
    assert not FaultReport("bus restarted", broken=1).clean
    assert FaultReport("gateway killed", broken=1, may_break=True).clean
