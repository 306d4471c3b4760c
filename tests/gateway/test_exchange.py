"""What a stream writes for a client that is behind."""

import json

import pytest
from tests.gateway.reading import read_events

from prism.common.messages.generation import SamplingParams
from prism.common.messages.models import ModelFacts, ModelSpec
from prism.gateway.dispatch import Job
from prism.gateway.exchange import _EventStream, _Sender
from prism.gateway.generate_api import GenerateAnswer
from prism.gateway.plan import Choice, Plan, Servable
from prism.gateway.text_assembler import Ending, Piece
from prism.gateway.text_tokenizer import TextTokenizer

pytestmark = pytest.mark.core

FRAMES = 2000


class Written(_Sender):
    """What would go to a client."""

    def __init__(self) -> None:
        self.data = b""

    async def write(self, data: bytes, *, more: bool) -> None:
        self.data += data


async def test_events_that_repeat_the_answer_are_written_once_for_all_that_came_meanwhile(
    tokenizer: TextTokenizer,
) -> None:
    model = Servable(ModelSpec("m", "/m"), ModelFacts("m"), tokenizer, 1.0)
    choices = [Choice(Job("m", [5], SamplingParams(1), 1.0), index) for index in range(2)]
    answer = GenerateAnswer(model, many=True, top_logprobs=None, clock=lambda: 0.0)
    written = Written()
    stream = _EventStream(Plan("r", model, choices, (), True, answer), written)
    for number in range(FRAMES):
        for index, choice in enumerate(choices):
            ending = Ending("length") if number == FRAMES - 1 else None
            piece = Piece("word ", [number], ending=ending)
            choice.add(piece)
            stream.take(index, choice, piece)
    await stream.flush()
    await stream.close()
    events = read_events(written.data.decode())
    assert [event["index"] for event in events] == [0, 1]
    assert all(event["output_ids"] == list(range(FRAMES)) for event in events)
    assert all(event["meta_info"]["finish_reason"]["type"] == "length" for event in events)
    assert len(written.data) < 2 * sum(len(json.dumps(event)) for event in events)
