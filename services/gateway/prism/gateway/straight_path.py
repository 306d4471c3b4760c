"""The way of a generation request past the framework: its endpoint answers whatever may come, so middleware
for errors and a router would only stand in the way of every single token."""

from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send


class StraightPath:
    """An ASGI application: a POST to one of `endpoints` (by path) goes there, all else to `app`."""

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, ASGIApp]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._endpoints.get(scope["path"])
            if endpoint is not None:
                await endpoint(scope, receive, send)
                return
        await self._app(scope, receive, send)
