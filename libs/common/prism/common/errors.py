"""Errors as they cross the bus and reach a user: a code, a message that says what to do, a retry hint."""

import enum
from collections.abc import Callable

import msgspec


class ErrorCode(enum.StrEnum):
    """What went wrong, stable across versions: programs branch on it, people read the message."""

    BAD_MESSAGE = "bad_message"
    INVALID_REQUEST = "invalid_request"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_FAILED = "model_failed"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    MOVED = "moved"
    OVERLOADED = "overloaded"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    ENGINE_LOST = "engine_lost"
    OUT_OF_MEMORY = "out_of_memory"
    STALE_EPOCH = "stale_epoch"
    STORE_UNAVAILABLE = "store_unavailable"
    UNSUPPORTED = "unsupported"
    INTERNAL = "internal"


class ErrorBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error on the wire. `retry` tells the receiver that the same thing may succeed elsewhere or later."""

    code: ErrorCode
    message: str
    retry: bool = False
    param: str | None = None


def shortened(text: str, most: int = 2000) -> str:
    """`text`, or its beginning and its end within `most` characters: messages have to carry it."""
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def words_of(error: BaseException | None) -> str:
    """What is told of an error: some have no text."""
    return str(error) or type(error).__name__


class PrismError(Exception):
    """Anything that a caller must be told: becomes an `ErrorBody` at the edge of a service."""

    def __init__(
        self, code: ErrorCode, message: str, *, retry: bool = False, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry = retry
        self.param = param

    def __reduce__(self) -> tuple[Callable[[ErrorBody], "PrismError"], tuple[ErrorBody]]:
        # An exception is else made anew from its message alone, which this one can't be.
        return type(self).from_body, (self.body,)

    @property
    def body(self) -> ErrorBody:
        """This error as it travels."""
        return ErrorBody(self.code, self.message, self.retry, self.param)

    @classmethod
    def from_body(cls, body: ErrorBody) -> "PrismError":
        """The error that a peer reported."""
        return cls(body.code, body.message, retry=body.retry, param=body.param)
