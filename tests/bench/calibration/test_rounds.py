"""Everything is measured once, then everything again; each figure is as it usually was."""

import json
from collections.abc import Iterable
from itertools import groupby

import httpx
import pytest

from prism.bench.calibration.probing import Beside, Probe
from prism.bench.calibration.rounds import Rounds, served_contexts, usual, usual_beside, usual_probe
from prism.bench.simulation.profiles import read_profile
from prism.common.errors import PrismError
from prism.common.messages.models import ModelFacts

pytestmark = pytest.mark.core

FACTS = ModelFacts("m", parameters=10**6, kv_elements_per_token=100, checkpoint_dtype="float32")


def answering(
    asked: list[str], asleep: str = "", prompts: list[tuple[int, ...]] | None = None
) -> httpx.AsyncClient:
    """A gateway that serves `a` and `b`, of which `asleep` never stays awake."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            served = [
                {"id": model, "context_length": 600, "state": "sleeping" if model == asleep else "ready"}
                for model in "ab"
            ]
            return httpx.Response(200, json={"data": served})
        body = json.loads(request.content)
        asked.append(body["model"])
        if prompts is not None:
            prompts.append(tuple(body["input_ids"]))
        return httpx.Response(200, stream=httpx.ByteStream(b"data: {}\n\ndata: [DONE]\n\n"))

    return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://gateway")


async def rounds_of(client: httpx.AsyncClient, models: str, said: list[str]) -> Rounds:
    return Rounds(
        client,
        await served_contexts(client, list(models)),
        dict.fromkeys(models, FACTS),
        read_profile("h200"),
        pass_tokens=512,
        element_bytes=None,
        tell=said.append,
    )


def runs(asked: Iterable[str]) -> str:
    return "".join(model for model, _ in groupby(asked))


async def test_a_round_measures_every_model_alone_then_all_at_once() -> None:
    asked: list[str] = []
    said: list[str] = []
    async with answering(asked) as client:
        rounds = await rounds_of(client, "ab", said)
        await rounds.measure(1)
        once = list(asked)
        await rounds.measure(2)
        profile, costs = rounds.fitted("mine")
    assert len(asked) == 3 * len(once)
    assert runs(asked).startswith("ab"), "not first all of one model's samples"
    assert said[:3] == ["round 1: a", "round 1: b", "round 1: all at once"]
    assert said[3:6] == ["round 2: a", "round 2: b", "round 2: all at once"]
    assert (set(costs), profile.name) == ({"a", "b"}, "mine")


async def test_a_model_by_itself_has_no_others_to_slow_it() -> None:
    async with answering([]) as client:
        rounds = await rounds_of(client, "a", [])
        await rounds.measure(1)
        profile, _ = rounds.fitted("x")
    assert (profile.parallel_engines, profile.prefill_parallel_engines) == (1.0, 1.0)


async def test_what_was_served_between_rounds_is_fitted_to() -> None:
    asked: list[str] = []
    said: list[str] = []
    async with answering(asked) as client:
        rounds = await rounds_of(client, "ab", said)
        await rounds.measure(1)
        probed = rounds.fitted("x")[1]
        served = []
        for _ in range(2):
            before = len(asked)
            await rounds.serve(0.01)
            served.append(len(asked) - before)
            await rounds.measure(1)
    assert said.count("serving for 0.01 s") == 2
    assert min(served) >= 1
    assert rounds.fitted("x")[1] != probed


async def test_a_second_calibration_asks_nothing_that_the_first_left_in_a_cache() -> None:
    seen: list[set[tuple[int, ...]]] = []
    for _ in range(2):
        prompts: list[tuple[int, ...]] = []
        async with answering([], prompts=prompts) as client:
            rounds = await rounds_of(client, "ab", [])
            await rounds.measure(1)
            await rounds.serve(0.01)
        seen.append({prompt[:8] for prompt in prompts})
    assert len(seen[0]) > 20
    assert not seen[0] & seen[1]


async def test_models_that_do_not_fit_in_memory_together_are_measured_alone_only() -> None:
    said: list[str] = []
    async with answering([], asleep="b") as client:
        rounds = await rounds_of(client, "ab", said)
        await rounds.measure(1)
        await rounds.serve(0.01)
    assert [line[:9] for line in said] == ["round 1: ", "round 1: ", "not awake", "not awake"]
    assert "all at once: b: it sleeps (" in said[-1]
    base = read_profile("h200")
    profile, costs = rounds.fitted("x")
    assert set(costs) == {"a", "b"}
    assert profile.parallel_engines == base.parallel_engines
    assert profile.source == (
        "prism calibrate: a, b; not measured, as in h200: 2 at once, contexts, wakes, dozes, bus and disk"
    )


async def test_a_model_that_is_not_served_is_told() -> None:
    async with answering([]) as client:
        with pytest.raises(PrismError, match="gateway does not serve c"):
            await served_contexts(client, ["a", "c"])


def test_one_round_in_which_the_machine_was_slow_changes_nothing() -> None:
    def probe(times: float) -> Probe:
        return Probe("m", 512, {8: times, 16: 2 * times}, 16, {1: times, 6: 3 * times}, [(1, 40.0, times)])

    assert usual_probe([probe(0.25), probe(9.0), probe(0.25)]) == probe(0.25)
    quiet, busy = Beside("m", 300, 0.25, 0.5), Beside("m", 300, 9.0, 9.5)
    assert usual_beside([busy, quiet, quiet]) == quiet


def test_a_machine_that_is_slow_often_is_so_in_the_fit() -> None:
    assert usual([1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 1.0]) == pytest.approx(8 / 6)
    assert (usual([1.0]), usual([1.0, 3.0])) == (1.0, 2.0)
