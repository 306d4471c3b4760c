"""What two who generate come to: the rate of decoding alone, and whether they say the same."""

from collections.abc import Sequence
from dataclasses import dataclass


def decode_rate(
    streams: int, short_tokens: int, long_tokens: int, short_s: Sequence[float], long_s: Sequence[float]
) -> float:
    """Tokens per second of decoding, from times of the same batch with few and with many tokens an answer.

    The difference of their least holds neither prefill nor what a request costs beside its tokens, and what
    others do on the host lengthens a step of a small model by up to a quarter, for seconds.
    """
    more = streams * (long_tokens - short_tokens)
    return more / (min(long_s) - min(short_s))


@dataclass(frozen=True, slots=True)
class Likeness:
    """How many of some answers are equal, how many differ where no near-tie excuses it, and how many tokens
    could be held against each other."""

    answers: int
    equal: int
    mismatches: int
    compared_tokens: int


def comparable_tokens(margins: Sequence[float], near_tie: float) -> int:
    """How many tokens must be the same: those before the first whose margin is under `near_tie`."""
    return next((index for index, margin in enumerate(margins) if margin < near_tie), len(margins))


def likeness(
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    margins: Sequence[Sequence[float]],
    near_tie: float,
) -> Likeness:
    """Hold answers against those of the yardstick, whose `margins` are given for each token."""
    equal = mismatches = compared = 0
    for mine, other, margin in zip(ours, theirs, margins, strict=True):
        count = comparable_tokens(margin, near_tie)
        compared += count
        equal += list(mine) == list(other)
        mismatches += list(mine[:count]) != list(other[:count])
    return Likeness(len(ours), equal, mismatches, compared)
