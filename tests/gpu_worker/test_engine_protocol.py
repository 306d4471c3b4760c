"""Messages between worker and engine survive any cutting of the byte stream."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.common.messages.generation import SamplingParams
from prism.gpu_worker.engine_protocol import (
    Abort,
    Generate,
    MessageBuffer,
    Outputs,
    ToEngine,
    TokenOutput,
    pack,
    unpack_from_engine,
    unpack_to_engine,
)

pytestmark = pytest.mark.core

rids = st.text("0123456789abcdef", min_size=32, max_size=32)
messages = st.one_of(
    rids.map(Abort),
    st.builds(
        Generate,
        rid=rids,
        input_ids=st.lists(st.integers(0, 200_000), max_size=50),
        sampling=st.builds(SamplingParams, max_new_tokens=st.integers(1, 100), seed=st.integers(0, 2**31)),
        top_logprobs=st.none() | st.integers(0, 20),
        priority=st.integers(-5, 5),
    ),
)


@given(st.lists(messages, max_size=10), st.lists(st.integers(1, 40), min_size=1, max_size=200))
def test_messages_arrive_whole_however_the_stream_is_cut(sent: list[ToEngine], cuts: list[int]) -> None:
    stream = b"".join(pack(message) for message in sent)
    buffer = MessageBuffer()
    received: list[ToEngine] = []
    position = 0
    cut = 0
    while position < len(stream):
        size = cuts[cut % len(cuts)]
        received += [unpack_to_engine(body) for body in buffer.feed(stream[position : position + size])]
        position += size
        cut += 1
    assert received == sent


def test_outputs_round_trip() -> None:
    message = Outputs(
        [TokenOutput("r" * 32, [1, 2], "stop", 2, 5, 2)], running=1, waiting=0, kv_used_tokens=7
    )
    (body,) = MessageBuffer().feed(pack(message))
    assert unpack_from_engine(body) == message
