"""Reading a JSON body: every complaint names the field at fault and says what is allowed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from prism.common.errors import ErrorCode, PrismError

T = TypeVar("T")

_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`")
_MISSING = re.compile(r"Object missing required field `(.*?)`")
_PATH = re.compile(r" - at `(?:key in )?\$\.?(.*?)`$")


def invalid(param: str | None, message: str) -> PrismError:
    """A 400 about `param`."""
    return PrismError(ErrorCode.INVALID_REQUEST, message, param=param)


def read_json(body: bytes, kind: type[T]) -> T:
    """`body` as a `kind`. Raises PrismError(invalid_request)."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(None, f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise invalid(None, "the body's JSON is nested too deeply") from error


def _explained(complaint: str) -> PrismError:
    path = found[1] if (found := _PATH.search(complaint)) else ""
    reason = _PATH.sub("", complaint)
    inside = f"{path}." if path else ""
    if unknown := _UNKNOWN.search(complaint):
        param = inside + unknown[1]
        return invalid(param, f"unknown parameter {param!r}; see /openapi.json for what there is")
    if missing := _MISSING.search(complaint):
        param = inside + missing[1]
        return invalid(param, f"required parameter {param!r} is missing")
    return invalid(path or None, f"{path or 'the body'}: {reason[:1].lower()}{reason[1:]}")


@dataclass(frozen=True, slots=True)
class Allowed:
    """A range of numbers. `above` excludes `low` itself; `also` are further values that are fine."""

    low: float
    high: float
    above: bool = False
    also: tuple[float, ...] = ()

    def holds(self, value: float) -> bool:
        """Whether `value` is allowed."""
        if value in self.also:
            return True
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        bound = f"above {self.low}" if self.above else f"at least {self.low}"
        text = f"{bound} and at most {self.high}"
        return text + "".join(f", or {value}" for value in self.also)


def check_ranges(fields: Mapping[str, Any], allowed: Mapping[str, Allowed]) -> None:
    """Raises PrismError(invalid_request) for the first of `fields` outside its range; null is always fine."""
    for name, limits in allowed.items():
        value = fields.get(name)
        if value is not None and not limits.holds(value):
            raise invalid(name, f"{name} must be {limits}; got {value}")


def refuse_unsupported(fields: Mapping[str, Any], harmless: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises PrismError(unsupported) for a parameter that is known, has no effect here, and asks for one.

    `harmless` names such parameters, each with the values beside null that ask for nothing.
    """
    for name, defaults in harmless.items():
        value = fields.get(name)
        if value is None or any(type(value) is type(default) and value == default for default in defaults):
            continue
        raise PrismError(
            ErrorCode.UNSUPPORTED, f"{name} is not supported; leave it out or set it to null", param=name
        )
