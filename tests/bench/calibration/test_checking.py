"""What is asked of the real system while the simulator is held against it."""

import json

import httpx
import pytest

from prism.bench.calibration.checking import PAUSE_S, parts_of, paused, replay
from prism.bench.traces.synthetic import Synthetic, synthetic_trace
from prism.bench.traces.trace import trace_of

pytestmark = pytest.mark.core


async def test_no_load_is_checked_with_prompts_that_another_left_in_the_cache() -> None:
    shape = Synthetic(rate=200.0, duration_s=0.1, alpha=1.0, prompt_tokens=(16, 32), output_tokens=(1, 2))
    trace = synthetic_trace(("a", "b"), shape, 1)
    asked: list[tuple[int, ...]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(tuple(json.loads(request.content)["input_ids"]))
        return httpx.Response(200, stream=httpx.ByteStream(b"data: {}"))

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://gateway") as client:
        for load in (0.25, 0.5):
            for part in parts_of(trace, 2, 0.1):
                assert len(await replay(client, trace, part, load)) == len(part)
    assert len(trace) > 5
    assert len({prompt[:8] for prompt in asked}) == 2 * len(trace)


def test_a_check_in_parts_asks_every_request_once_with_pauses_between() -> None:
    rows = [(0.5, 0, 16, 2), (4.0, 1, 17, 3), (9.5, 0, 18, 4), (10.0, 1, 19, 5)]
    trace = trace_of(("a", "b"), rows)
    parts = parts_of(trace, 4, 10.0)
    assert parts == [range(1), range(1, 2), range(2, 4)], "nobody asks in the third quarter"
    with_pauses = paused(trace, parts)
    assert list(with_pauses.arrival_s) == [0.5, 4.0 + PAUSE_S, 9.5 + 2 * PAUSE_S, 10.0 + 2 * PAUSE_S]
    assert list(with_pauses.prompt_tokens) == [16, 17, 18, 19]
    assert list(with_pauses.model) == list(trace.model)
