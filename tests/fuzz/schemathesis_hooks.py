"""What schemathesis needs to know of this gateway: loaded by its command line through SCHEMATHESIS_HOOKS."""

import zlib
from typing import Any

import schemathesis

SERVED, ASLEEP, BROKEN = "served", "asleep", "broken"
"""The models that the gateway under test has: one of each kind."""


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Names of models as generated are unknown to the gateway: most become one that it has."""
    if isinstance(body, dict) and isinstance(body.get("model"), str) and body["model"]:
        draw = zlib.crc32(repr(body).encode()) % 16
        if draw == 0:
            body["model"] = ASLEEP
        elif draw == 1:
            body["model"] = BROKEN
        elif draw < 14:
            body["model"] = SERVED
    return body


@schemathesis.check
def documented_errors_alone(context: Any, response: Any, case: Any) -> None:
    """No 5xx but 503 with Retry-After, and every error in OpenAI's shape."""
    status = response.status_code
    if status < 400:
        return
    if status >= 500:
        assert status == 503, f"{status} is no documented fault"
        assert int(response.headers["retry-after"][0]) > 0
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
