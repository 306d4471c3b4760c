"""Errors on their way to whoever must be told."""

import pickle

import pytest

from prism.common.errors import ErrorCode, PrismError, shortened

pytestmark = pytest.mark.core

ERRORS = [
    PrismError(ErrorCode.OVERLOADED, "try again in 2 s", retry=True),
    PrismError(ErrorCode.INVALID_REQUEST, "top_p must be above 0", param="top_p"),
]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_an_error_travels_as_its_body(error: PrismError) -> None:
    assert PrismError.from_body(error.body).body == error.body


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_an_error_crosses_to_another_process(error: PrismError) -> None:
    # A pool of processes pickles what a job raises, and waits for ever for one that can't be read back.
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is PrismError
    assert (arrived.body, str(arrived)) == (error.body, str(error))


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    assert shortened("as it is") == "as it is"
    cut = shortened("begin" + "x" * 10_000 + "end", 100)
    assert len(cut) <= 100
    assert cut.startswith("begin")
    assert cut.endswith("end")
