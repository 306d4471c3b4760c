"""JSON in and out of wire types, with one error for everything that does not parse."""

from functools import cache
from typing import TypeVar

import msgspec

from prism.common.errors import ErrorCode, PrismError

_encoder = msgspec.json.Encoder()
T = TypeVar("T")


def encode(message: object) -> bytes:
    """`message` as JSON bytes."""
    return _encoder.encode(message)


@cache
def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    return msgspec.json.Decoder(kind)


def decode(payload: bytes, kind: type[T]) -> T:
    """`payload` as a `kind`.

    Raises PrismError(bad_message) that names the field at fault: peers of another version are told
    what they sent wrong instead of a service dying of it.
    """
    try:
        return _decoder(kind).decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PrismError(ErrorCode.BAD_MESSAGE, f"not a valid {kind.__name__}: {error}") from error
