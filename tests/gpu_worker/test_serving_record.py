"""What an engine has shown while it served: speeds and promises kept."""

from math import nan

import pytest

from prism.common.messages.generation import GenerateRequest, SamplingParams
from prism.common.messages.models import ModelSpec
from prism.gpu_worker.serving_record import Objectives, ServingRecord

pytestmark = pytest.mark.core


def objectives(ttft_ms: float | None = None, tpot_ms: float | None = None) -> Objectives:
    request = GenerateRequest("r", "m", [1], SamplingParams(1), 1.0, ttft_slo_ms=ttft_ms, tpot_slo_ms=tpot_ms)
    return Objectives(request, ModelSpec("m", "/m"))


def test_a_request_s_own_objectives_count_before_its_model_s() -> None:
    spec = ModelSpec("m", "/m", ttft_slo_ms=500, tpot_slo_ms=50)
    own = Objectives(GenerateRequest("r", "m", [1], SamplingParams(1), 1.0, ttft_slo_ms=100), spec)
    assert (own.ttft_s, own.tpot_s) == (0.1, 0.05)
    assert (objectives().ttft_s, objectives().tpot_s) == (None, None)


@pytest.mark.parametrize("told_ms", [1e-323, 0.5, -3.0, nan])
def test_no_objective_is_shorter_than_a_millisecond_whatever_the_bus_brings(told_ms: float) -> None:
    assert (objectives(told_ms, told_ms).ttft_s, objectives(told_ms, told_ms).tpot_s) == (0.001, 0.001)


def test_a_prompt_s_time_counts_from_its_turn() -> None:
    record = ServingRecord()
    for number in range(3):
        # All released at 0: each is prefilled after the one before.
        record.stepped(1.0 + number, number, (100, 0.0), decoded=False)
    assert record.prefill.reached_tokens_per_s == pytest.approx(100.0)


def test_prompts_of_one_step_tell_what_a_pass_takes() -> None:
    record = ServingRecord()
    now = 0.0
    for number, tokens in enumerate((100, 800, 100, 800, 1600)):
        before, now = now, now + 0.02 * (1 + (tokens > 1000)) + tokens / 10_000
        record.stepped(now, number, (tokens, before), decoded=False, pass_tokens=1000)
    assert record.prefill.fixed_s == pytest.approx(0.02)
    assert record.prefill.tokens_per_s == pytest.approx(10_000)


def test_a_prefill_that_waited_for_weights_is_a_guess_while_there_is_no_better() -> None:
    record = ServingRecord()
    for number in range(3):
        record.stepped(1.0 + number, number, (100, 0.0), decoded=False, held_back=True)
    assert record.prefill.reached_tokens_per_s == pytest.approx(100.0)
    for number in range(3, 9):
        record.stepped(10.0 * number, number, (100, 0.0), decoded=False, held_back=True)
    assert record.prefill.reached_tokens_per_s == pytest.approx(100.0)
    record.stepped(80.5, 9, (100, 80.0), decoded=False)
    record.stepped(81.0, 10, (100, 80.0), decoded=False)
    record.stepped(81.5, 11, (100, 80.0), decoded=False)
    record.stepped(82.0, 12, (100, 80.0), decoded=False)
    assert record.prefill.reached_tokens_per_s == pytest.approx(200.0)


def test_only_one_step_after_another_tells_how_long_a_step_takes() -> None:
    record = ServingRecord()
    for now, steps in ((1.0, 1), (1.02, 2), (1.04, 3), (9.0, 14), (9.02, 15)):
        record.stepped(now, steps, None, decoded=True)
    assert record.step.seconds == pytest.approx(0.02)


def test_a_step_beside_others_would_have_taken_its_share_of_the_time_alone() -> None:
    record = ServingRecord()
    for steps in range(5):
        record.stepped(1.0 + 0.06 * steps, steps, None, decoded=True, at_work=3)
    assert record.step.seconds == pytest.approx(0.06)
    assert record.step_alone.seconds == pytest.approx(0.02)


def test_what_was_promised_is_counted_as_kept_or_not() -> None:
    record = ServingRecord()
    promised = objectives(ttft_ms=100, tpot_ms=10)
    record.first_token(0.1, promised)
    record.first_token(0.11, promised)
    record.never_began(promised)
    record.finished(11, 0.1, promised)
    record.finished(11, 0.2, promised)
    record.finished(1, 0.0, promised)
    assert (record.ttft_met, record.ttft_missed) == (1, 2)
    assert (record.tpot_met, record.tpot_missed) == (1, 1)
    assert record.requests == 3


def test_without_a_promise_nothing_is_counted() -> None:
    record = ServingRecord()
    record.first_token(99.0, objectives())
    record.never_began(objectives())
    record.finished(11, 99.0, objectives())
    assert (record.ttft_met, record.ttft_missed, record.tpot_met, record.tpot_missed) == (0, 0, 0, 0)


def test_the_wait_that_is_told_follows_the_waits_that_were() -> None:
    record = ServingRecord()
    for _ in range(40):
        record.released(2.0)
    assert record.queue_s == pytest.approx(2.0, rel=0.01)
