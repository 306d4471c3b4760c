"""Requests that were lost twice in a row are sent one at a time, until they have a token."""

import asyncio

import pytest

from prism.common.errors import ErrorCode, PrismError
from prism.gateway.suspects import Suspects

pytestmark = pytest.mark.core

DEADLINE_S = 10.0


async def test_of_one_model_one_goes_at_a_time_and_the_next_once_it_has_a_token() -> None:
    suspects = Suspects()
    went: list[str] = []

    async def second() -> None:
        async with suspects.alone("m", DEADLINE_S):
            went.append("second")

    async with suspects.alone("m", DEADLINE_S) as let_others:
        waiting = asyncio.create_task(second())
        async with suspects.alone("another", DEADLINE_S):
            went.append("another")
        with pytest.raises(PrismError):
            async with suspects.alone("m", 0.0):
                pass
        let_others()
        await asyncio.wait_for(waiting, DEADLINE_S)
        went.append("first")
    assert went == ["another", "second", "first"]


async def test_one_that_fails_or_leaves_lets_the_next_go() -> None:
    suspects = Suspects()
    with pytest.raises(ArithmeticError):
        async with suspects.alone("m", DEADLINE_S):
            raise ArithmeticError
    async with suspects.alone("m", DEADLINE_S):
        pass


async def test_whose_turn_does_not_come_in_time_is_told() -> None:
    suspects = Suspects()
    async with suspects.alone("m", DEADLINE_S):
        with pytest.raises(PrismError) as caught:
            async with suspects.alone("m", 0.01):
                pass
    assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED
