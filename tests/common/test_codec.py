"""What does not parse is told with the name of what it should have been."""

import pytest

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode
from prism.common.messages.store import LeaseRequest, StoreModelRequest, StoreRequest

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (StoreModelRequest, "StoreModelRequest"),
        (StoreRequest, "LeaseRequest, RoomRequest or DepositRequest"),
        (LeaseRequest | None, "LeaseRequest or NoneType"),
        (list[LeaseRequest], "list"),
    ],
    ids=["one type", "one of several", "perhaps nothing", "many"],
)
@pytest.mark.parametrize("payload", [b"{", b'{"type": "unheard of"}', b"\xff"])
def test_a_message_that_is_not_valid_says_of_what_kind(kind: type[object], name: str, payload: bytes) -> None:
    with pytest.raises(PrismError, match=f"not a valid {name}: ") as caught:
        decode(payload, kind)
    assert caught.value.code is ErrorCode.BAD_MESSAGE
