"""What is asked of the real system while the simulator is held against it."""

import json

import httpx
import pytest

from prism.bench.calibration.checking import replay
from prism.bench.traces.synthetic import Synthetic, synthetic_trace

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
            assert len(await replay(client, trace, load)) == len(trace)
    assert len(trace) > 5
    assert len({prompt[:8] for prompt in asked}) == 2 * len(trace)
