"""What is left of a generation after some of its tokens came."""

import pytest

from prism.common.messages.generation import Finish, SamplingParams
from prism.gateway.dispatch import Job, Shunned, already_over, replay

pytestmark = pytest.mark.core

JOB = Job("m", [5, 6], SamplingParams(max_new_tokens=10, min_new_tokens=3), 9.0, frozenset({1}))


def test_replay_goes_on_behind_the_tokens_that_came() -> None:
    left = replay(JOB, [7, 8])
    assert left.input_ids == [5, 6, 7, 8]
    assert (left.sampling.max_new_tokens, left.sampling.min_new_tokens) == (8, 1)
    assert replay(JOB, []) is JOB


def test_all_tokens_there_without_the_last_frame_is_the_end() -> None:
    assert already_over(JOB, list(range(20, 30))) == Finish("length", 2, 10)


def test_end_token_there_without_the_last_frame_is_the_end() -> None:
    assert already_over(JOB, [7, 8, 9, 1]) == Finish("stop", 2, 4, matched_token=1)


def test_otherwise_there_is_more_to_come() -> None:
    assert already_over(JOB, []) is None
    assert already_over(JOB, [7, 8]) is None
    assert already_over(JOB, [7, 1]) is None


def test_worker_that_fails_again_is_avoided_for_longer() -> None:
    shunned = Shunned()
    shunned.add("w", 0.0)
    assert shunned.at(0.05) == {"w"}
    assert shunned.next_change(0.05) == 0.1
    assert shunned.at(0.1) == set()
    shunned.add("w", 1.0)
    assert shunned.at(1.15) == {"w"}
