"""Log lines as text and as JSON: what they are about stands in them, and can be read back."""

import json
import logging
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import pytest

from prism.common.messages.codec import encode, names_in
from prism.common.messages.generation import CancelRequest
from prism.common.messages.models import ModelSpec
from prism.common.telemetry import JsonFormatter, TextFormatter, about

pytestmark = pytest.mark.core

Failure = tuple[type[BaseException], BaseException, TracebackType | None]
MadeFormatter = Callable[[str, dict[str, str]], logging.Formatter]


def formatted(
    make: MadeFormatter,
    message: str = "it went %s",
    *,
    extra: dict[str, dict[str, str]] | None = None,
    of_service: dict[str, str] | None = None,
    failure: Failure | None = None,
) -> str:
    logger = logging.getLogger("prism.some.module")
    arguments = ("wrong",) if "%s" in message else ()
    record = logger.makeRecord(
        logger.name, logging.WARNING, __file__, 1, message, arguments, failure, extra=extra
    )
    return make("gateway", of_service or {}).format(record)


def raised() -> Failure:
    try:
        raise ValueError("the cause")
    except ValueError as error:
        return type(error), error, sys.exc_info()[2]


def parsed(line: str) -> dict[str, Any]:
    assert "\n" not in line
    read: dict[str, Any] = json.loads(line)
    return read


def test_a_text_line_says_who_and_what_about() -> None:
    line = formatted(TextFormatter, extra=about(rid="r1", model="m", worker=""), of_service={"gateway": "g1"})
    time, line = line.split(" ", 1)
    assert len(time) == len("12:34:56.789")
    assert line == "WARNING gateway prism.some.module: it went wrong rid=r1 model=m gateway=g1"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("two words", '"two words"'),
        ("a=b", '"a=b"'),
        ('with "quotes"', '"with \\"quotes\\""'),
        ("line\nbreak", '"line\\nbreak"'),
        ("模型", "模型"),
    ],
)
def test_names_that_would_tear_a_text_line_are_quoted(name: str, shown: str) -> None:
    line = formatted(TextFormatter, extra=about(model=name, worker="w"))
    assert line.endswith(f" model={shown} worker=w")


def test_a_traceback_follows_the_names_on_lines_of_its_own() -> None:
    first, *rest = formatted(TextFormatter, extra=about(model="m"), failure=raised()).splitlines()
    assert first.endswith("it went wrong model=m")
    assert rest[0] == "Traceback (most recent call last):"
    assert rest[-1] == "ValueError: the cause"


def test_a_json_line_has_a_field_for_each_name() -> None:
    line = parsed(formatted(JsonFormatter, extra=about(rid="r1", model="模 型"), of_service={"worker": "w1"}))
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "WARNING",
        "service": "gateway",
        "logger": "prism.some.module",
        "message": "it went wrong",
        "rid": "r1",
        "model": "模 型",
        "worker": "w1",
    }


def test_a_json_line_holds_its_traceback_and_stays_one_line() -> None:
    line = parsed(formatted(JsonFormatter, 'of "two"\nlines', failure=raised()))
    assert line["message"] == 'of "two"\nlines'
    assert line["traceback"].endswith("ValueError: the cause")
    assert "traceback" not in parsed(formatted(JsonFormatter))


def test_what_a_message_on_the_bus_is_about_is_read_from_it() -> None:
    assert names_in(encode(CancelRequest("r1"))) == {"rid": "r1"}
    assert names_in(encode({"kind": "doze", "spec": ModelSpec("m", "/m")})) == {"model": "m"}
    assert names_in(b'{"model": "m", "worker": "w", "rid": 3}') == {"model": "m", "worker": "w"}
    assert names_in(b"[1]") == {}
    assert names_in(b"\xff not JSON") == {}
