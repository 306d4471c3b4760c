"""JSON in and out of wire types, with one error for everything that does not parse."""

from types import UnionType
from typing import Any, TypeVar, get_args

import msgspec

from prism.common.errors import ErrorCode, PrismError

T = TypeVar("T")

_encoder = msgspec.json.Encoder()
_decoders: dict[Any, Any] = {}


def encode(message: object) -> bytes:
    """`message` as JSON bytes."""
    return _encoder.encode(message)


def names_in(payload: bytes) -> dict[str, str]:
    """What a message is about, as far as it can be read: its rid, model and worker. For log lines."""
    try:
        message = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    if not isinstance(message, dict):
        return {}
    spec = message.get("spec")
    named = {"model": spec.get("model_name") if isinstance(spec, dict) else None}
    named |= {key: message[key] for key in ("rid", "model", "worker") if key in message}
    return {key: name for key, name in named.items() if isinstance(name, str)}


def decode(payload: bytes, kind: type[T]) -> T:
    """`payload` as a `kind`.

    Raises PrismError(bad_message) that names the field at fault: peers of another version are told
    what they sent wrong instead of a service dying of it.
    """
    decoder: msgspec.json.Decoder[T] | None = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PrismError(ErrorCode.BAD_MESSAGE, f"not a valid {_name_of(kind)}: {error}") from error


def _name_of(kind: Any) -> str:
    if not isinstance(kind, UnionType):
        return str(kind.__name__)
    *names, last = (_name_of(one) for one in get_args(kind))
    return f"{', '.join(names)} or {last}"
