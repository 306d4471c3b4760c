"""Errors as HTTP answers: one shape, `{"error": {message, type, param, code}}`, and the status with it."""

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from prism.common.errors import ErrorCode, PrismError

_STATUS = {
    ErrorCode.INVALID_REQUEST: 400,
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: 400,
    ErrorCode.UNSUPPORTED: 400,
    ErrorCode.MODEL_NOT_FOUND: 404,
    ErrorCode.PAYLOAD_TOO_LARGE: 413,
    ErrorCode.OVERLOADED: 429,
    ErrorCode.MODEL_FAILED: 503,
    ErrorCode.MOVED: 503,
    ErrorCode.DEADLINE_EXCEEDED: 503,
    ErrorCode.CANCELLED: 503,
    ErrorCode.ENGINE_LOST: 503,
    ErrorCode.OUT_OF_MEMORY: 503,
    ErrorCode.STORE_UNAVAILABLE: 503,
}
_RETRY_AFTER_S = {429: 1, 503: 5}


def status_of(error: PrismError) -> int:
    """The HTTP status of `error`: 500 for all that a client can do nothing about."""
    return _STATUS.get(error.code, 500)


def error_object(error: PrismError) -> dict[str, dict[str, str | None]]:
    """`error` in OpenAI's shape."""
    return _shaped(status_of(error), error.message, error.code.value, error.param)


def error_response(error: PrismError) -> Response:
    """`error` as a whole answer, with Retry-After where trying again later makes sense."""
    return _respond(status_of(error), error_object(error))


def not_found_response(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: an unknown path, a method that a path does not take."""
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = f"{path}: {error.detail}; see /openapi.json for what there is"
    response = _respond(error.status_code, _shaped(error.status_code, message, code, None))
    response.headers.update(error.headers or {})
    return response


def malformed_request_body() -> bytes:
    """The body that answers what is not even HTTP."""
    return msgspec.json.encode(_shaped(400, "this is not a valid HTTP/1.1 request", "invalid_request", None))


def internal_error_response(request: Request, error: Exception) -> Response:
    """A fault of the gateway; the details are in its log."""
    fault = PrismError(ErrorCode.INTERNAL, f"internal error ({type(error).__name__}); see the gateway's log")
    return error_response(fault)


def _shaped(status: int, message: str, code: str, param: str | None) -> dict[str, dict[str, str | None]]:
    if status == 429:
        kind = "rate_limit_error"
    elif status < 500:
        kind = "invalid_request_error"
    else:
        kind = "service_unavailable_error" if status == 503 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _respond(status: int, content: object) -> Response:
    headers = {"retry-after": str(_RETRY_AFTER_S[status])} if status in _RETRY_AFTER_S else {}
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")
