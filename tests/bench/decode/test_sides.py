"""What is asked of both sides, and what their answers are read as."""

import httpx
import pytest

from prism.bench.decode.plain_engine import Batch, PlainSettings, engine_arguments, generated, request_of
from prism.bench.decode.sides import GatewaySide

ANSWER = {
    "output_ids": [4, 5],
    "meta_info": {
        "output_top_logprobs": [[[-0.5, 4, None], [-2.0, 7, None]], [[-1.0, 5, None], [-1.25, 6, None]]]
    },
}


@pytest.mark.parametrize(("grammars", "told"), [(True, {}), (False, {"grammar_backend": "none"})])
def test_on_a_gpu_plain_sglang_is_told_no_more_than_what_the_host_lacks_and_what_leaves_room_for_us(
    monkeypatch: pytest.MonkeyPatch, grammars: bool, told: dict[str, str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if grammars else None)
    arguments = engine_arguments(PlainSettings("/models/m", "cuda", "triton", 1000))
    assert arguments == {
        "model_path": "/models/m",
        "attention_backend": "triton",
        "log_level": "error",
        "max_total_tokens": 1000,
        "sleep_on_idle": True,
        **told,
    }


def test_margins_are_the_distances_of_the_best_two() -> None:
    told = generated([ANSWER], 1.5)
    assert (told.seconds, told.outputs, told.margins) == (1.5, [[4, 5]], [[1.5, 0.25]])


def test_answers_without_log_probabilities_have_no_margins() -> None:
    assert generated([{"output_ids": [4], "meta_info": {}}], 1.0).margins == []


def test_both_sides_get_the_same_greedy_request() -> None:
    body = request_of(Batch([[1, 2]], 7, margins=True))
    assert body["sampling_params"] == {"max_new_tokens": 7, "temperature": 0.0, "ignore_eos": True}
    assert (body["input_ids"], body["top_logprobs_num"]) == ([[1, 2]], 2)
    assert "return_logprob" not in request_of(Batch([[1]], 1))


async def test_a_gateway_is_asked_for_a_model_and_its_errors_are_told() -> None:
    asked: list[bytes] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        asked.append(await request.aread())
        if len(asked) == 1:
            return httpx.Response(200, json=[ANSWER])
        return httpx.Response(503, text="no engine")

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://gateway") as http:
        side = GatewaySide(http, "m")
        assert (await side.generate(Batch([[1]], 2))).outputs == [[4, 5]]
        assert b'"model":"m"' in asked[0]
        with pytest.raises(RuntimeError, match="m answered 503: no engine"):
            await side.generate(Batch([[1]], 2))
