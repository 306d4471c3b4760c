"""How an answer is judged."""

import pytest
from tests.chaos.traffic import COMPLETE, DOUBLED, LOST, WRONG, judge

pytestmark = pytest.mark.core

ANSWER = [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("tokens", "outcome"),
    [
        ([5, 6, 7, 8, 9], COMPLETE),
        ([5, 6, 8, 9], LOST),
        ([5, 6, 7], LOST),
        ([], LOST),
        ([5, 6, 6, 7, 8, 9], DOUBLED),
        ([5, 6, 7, 5, 6, 7, 8, 9], DOUBLED),
        ([5, 6, 1, 8, 9], WRONG),
    ],
)
def test_an_answer_with_tokens_missing_or_repeated_is_told_from_a_complete_one(
    tokens: list[int], outcome: str
) -> None:
    assert judge(tokens, ANSWER) == outcome
