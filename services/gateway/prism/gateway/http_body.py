"""Reading a request's body, bounded in size and time."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from prism.common.errors import ErrorCode, PrismError
from prism.gateway.request_fields import invalid

__all__ = ["ClientDisconnect", "read_body"]


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The body. Raises PrismError: payload_too_large, or invalid_request when it does not arrive in time;
    ClientDisconnect when the client leaves."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                parts.append(part)
    except TimeoutError:
        raise invalid(None, f"the request's body did not arrive within {timeout_s:g} s") from None
    return b"".join(parts)


def _too_large(max_bytes: int) -> PrismError:
    return PrismError(
        ErrorCode.PAYLOAD_TOO_LARGE, f"the request's body is larger than the {max_bytes} bytes allowed"
    )
