"""What a simulated engine does in each step, and what it costs and says."""

import msgspec
import pytest

from prism.common.errors import PrismError
from prism.common.messages.generation import SamplingParams
from prism.common.simulated_text import STAMPED_GROUP, numbered_text
from prism.gpu_worker.devices.simulated_batch import SimulatedBatch
from prism.gpu_worker.devices.simulated_costs import Script, SimulatedCosts, costs_from
from prism.gpu_worker.devices.simulated_tokens import NumberedTokens, StampedTokens
from prism.gpu_worker.engine_protocol import Generate, TokenOutput

pytestmark = pytest.mark.core

PRINTABLE = 6


def batch(max_running: int = 4, chunk: int = 8) -> SimulatedBatch:
    return SimulatedBatch(
        lambda prompt: NumberedTokens(prompt, PRINTABLE), max_running=max_running, chunk_tokens=chunk
    )


def request(rid: str, prompt: int = 3, tokens: int = 4, **sampling: object) -> Generate:
    params = SamplingParams(tokens, **sampling)  # type: ignore[arg-type]
    return Generate(rid, list(range(prompt)), params, None, 0)


def text(tokens: list[int]) -> str:
    return "".join(chr(token - PRINTABLE + ord("!")) for token in tokens)


def run(engine: SimulatedBatch) -> dict[str, list[TokenOutput]]:
    """Step until nothing is left; outputs by rid."""
    told: dict[str, list[TokenOutput]] = {}
    while engine.running or engine.waiting:
        for output in engine.step(0):
            told.setdefault(output.rid, []).append(output)
    return told


def test_a_request_ends_after_as_many_tokens_as_it_asked_for() -> None:
    engine = batch()
    engine.add(request("a", prompt=3, tokens=20))
    outputs = run(engine)["a"]
    assert [len(output.tokens) for output in outputs] == [1] * 20
    assert text([output.tokens[0] for output in outputs]) == numbered_text(3, 20)
    assert outputs[-1].finish == "length"
    assert (outputs[-1].prompt_tokens, outputs[-1].completion_tokens) == (3, 20)
    assert engine.kv_tokens == 0


def test_who_takes_over_goes_on_where_the_other_one_stopped() -> None:
    engine = batch()
    engine.add(request("a", prompt=5, tokens=7))
    engine.add(request("b", prompt=12, tokens=9))
    told = run(engine)
    both = [output.tokens[0] for rid in ("a", "b") for output in told[rid]]
    assert text(both) == numbered_text(5, 16)


def test_prompts_are_prefilled_in_chunks_before_anything_is_decoded() -> None:
    engine = batch(chunk=8)
    engine.add(request("a", prompt=2))
    assert engine.prefill_tokens == 2
    assert [output.rid for output in engine.step(0)] == ["a"]
    engine.add(request("b", prompt=20))
    sizes = []
    while engine.waiting:
        sizes.append(engine.prefill_tokens)
        last = engine.step(0)
    assert sizes == [8, 8, 4]
    assert [output.rid for output in last] == ["b"]
    assert engine.prefill_tokens == 0
    assert {output.rid for output in engine.step(0)} == {"a", "b"}
    assert engine.steps == 5


def test_prompts_that_wait_are_prefilled_together_up_to_a_chunk() -> None:
    engine = batch(chunk=8)
    for rid in ("a", "b", "c"):
        engine.add(request(rid, prompt=3))
    assert engine.prefill_tokens == 8
    assert [output.rid for output in engine.step(0)] == ["a", "b"]
    assert engine.prefill_tokens == 1
    assert [output.rid for output in engine.step(0)] == ["c"]
    assert SimulatedCosts(prefill_tokens_per_s=1000, prefill_fixed_ms=10).prefill_s(5) == pytest.approx(0.015)


def test_no_more_run_at_once_than_may() -> None:
    engine = batch(max_running=2)
    for rid in ("a", "b", "c"):
        engine.add(request(rid, tokens=3))
    engine.step(0)
    engine.step(0)
    assert (engine.running, engine.waiting) == (2, 1)
    assert len(run(engine)["c"]) == 3


def test_an_abort_ends_a_request_wherever_it_is() -> None:
    engine = batch(max_running=1)
    engine.add(request("a"))
    engine.add(request("b"))
    engine.step(0)
    assert [(output.rid, output.finish) for output in engine.abort("b")] == [("b", "abort")]
    assert [(output.rid, output.finish) for output in engine.abort("a")] == [("a", "abort")]
    assert engine.abort("a") == []
    assert (engine.running, engine.waiting) == (0, 0)


def test_a_stop_token_ends_a_request_once_it_has_enough_tokens() -> None:
    zero = ord("0") - ord("!") + PRINTABLE
    engine = batch()
    engine.add(request("a", prompt=1, tokens=20, stop_token_ids=(zero,), min_new_tokens=3))
    outputs = run(engine)["a"]
    assert (len(outputs), outputs[-1].finish, outputs[-1].matched_token) == (3, "stop", zero)


def test_stamps_tell_when_their_first_character_was_said() -> None:
    tokens = StampedTokens(PRINTABLE)
    said = text([tokens.next(1_000 + index) for index in range(2 * STAMPED_GROUP)])
    assert said == "00000001000.00000001012."


def test_a_stamp_is_that_of_the_moment_when_its_step_left() -> None:
    tokens = StampedTokens(PRINTABLE)
    first = tokens.next(1_000)
    tokens.restamp(21_000)
    rest = [tokens.next(0) for _ in range(STAMPED_GROUP - 1)]
    tokens.restamp(99_000)
    assert text([first, *rest]) == "00000021000."


def test_costs_are_read_from_the_environment_and_refused_by_name() -> None:
    environment = {
        "PRISM_SIMULATED_DECODE_STEP_MS": "2.5",
        "PRISM_SIMULATED_SCRIPT": "stamped",
        "PRISM_SIMULATED_PREFILL_TOKENS_PER_S": "0",
    }
    costs = costs_from(environment)
    assert (costs.decode_s, costs.script, costs.prefill_s(1000)) == (0.0025, Script.STAMPED, 0.0)
    assert SimulatedCosts(prefill_tokens_per_s=500).prefill_s(100) == 0.2
    for value in ("fast", "-1", "nan"):
        with pytest.raises(PrismError, match="PRISM_SIMULATED_DECODE_STEP_MS"):
            costs_from({"PRISM_SIMULATED_DECODE_STEP_MS": value})


def test_a_request_waits_until_there_is_room_for_its_prompt() -> None:
    engine = batch()
    engine.limit_tokens = 12
    engine.add(request("a", prompt=5, tokens=4))
    engine.add(request("b", prompt=5, tokens=4))
    order = list(run(engine))
    assert order == ["a", "b"]
    engine.add(request("c", prompt=40, tokens=2))
    assert len(run(engine)["c"]) == 2, "alone, it runs whatever it takes"


def test_the_lowest_priority_waits_when_room_runs_out_and_says_then_what_it_would_have_said() -> None:
    def outputs(limit: int | None) -> dict[str, str]:
        engine = batch()
        for rid, priority in (("low", 0), ("high", 1)):
            engine.add(msgspec.structs.replace(request(rid, prompt=4, tokens=9), priority=priority))
        for _ in range(2):
            engine.step(0)
        engine.limit_tokens = limit
        retracted = engine.make_room()
        assert retracted == (limit is not None)
        assert engine.running == (1 if limit is not None else 2)
        told = run(engine)
        if limit is not None:
            ends = [rid for rid, said in told.items() if said[-1].finish]
            assert ends[0] == "high"
        return {
            rid: text([token for output in said for token in output.tokens]) for rid, said in told.items()
        }

    assert outputs(9) == outputs(None)
