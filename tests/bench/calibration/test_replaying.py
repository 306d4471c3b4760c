"""A trace is asked of the real system in parts, and simulated as a whole with pauses."""

import json

import httpx
import pytest

from prism.bench.calibration.replaying import PAUSE_S, joined, parts_of, replay
from prism.bench.traces.synthetic import Synthetic, synthetic_trace
from prism.bench.traces.trace import trace_of

pytestmark = pytest.mark.core


async def test_prompts_of_another_seed_are_in_no_cache() -> None:
    shape = Synthetic(rate=200.0, duration_s=0.1, alpha=1.0, prompt_tokens=(16, 32), output_tokens=(1, 2))
    trace = synthetic_trace(("a", "b"), shape, 1)
    asked: list[tuple[int, ...]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(tuple(json.loads(request.content)["input_ids"]))
        return httpx.Response(200, stream=httpx.ByteStream(b"data: {}\n\ndata: [DONE]\n\n"))

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://gateway") as client:
        for seed in ("one", "another"):
            assert len(await replay(client, trace, seed)) == len(trace)
    assert len(trace) > 5
    assert len({prompt[:8] for prompt in asked}) == 2 * len(trace)


def test_parts_begin_when_their_time_does() -> None:
    rows = [(0.5, 0, 16, 2), (4.0, 1, 17, 3), (9.5, 0, 18, 4), (10.0, 1, 19, 5)]
    parts = parts_of(trace_of(("a", "b"), rows), 4, 10.0)
    assert [list(part.arrival_s) for part in parts] == [[0.5], [1.5], [2.0, 2.5]], "none of the third quarter"
    assert [list(part.prompt_tokens) for part in parts] == [[16], [17], [18, 19]]


def test_joined_they_ask_every_request_once_with_pauses_between() -> None:
    rows = [(0.5, 0, 16, 2), (4.0, 1, 17, 3), (9.5, 0, 18, 4), (10.0, 1, 19, 5)]
    trace = trace_of(("a", "b"), rows)
    whole = joined(parts_of(trace, 4, 10.0))
    later = 0.5 + PAUSE_S + 1.5 + PAUSE_S
    assert list(whole.arrival_s) == [0.5, 0.5 + PAUSE_S + 1.5, later + 2.0, later + 2.5]
    assert list(whole.model) == list(trace.model)
    assert list(whole.output_tokens) == list(trace.output_tokens)
