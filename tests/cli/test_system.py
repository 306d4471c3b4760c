"""When a system counts as up: its gateways answer, and answer for every model of the placement file."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prism.cli.system import wait_until_served
from prism.common.tasks import end_task

DEADLINE_S = 10


@contextmanager
def registering_gateway() -> Iterator[tuple[str, list[str]]]:
    """A gateway that is ready at once and learns one more thing of two models each time that it is asked for
    them: its URL, and what it knows by now, in that order."""
    coming = ["first", "second", "first is read", "second is no good"]
    known: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            entries: list[dict[str, object]] = [{"id": model, "state": "cold"} for model in known[:2]]
            if "first is read" in known:
                entries[0]["context_length"] = 512
            if "second is no good" in known:
                entries[1]["state"] = "failed"
            body = json.dumps({"data": entries}).encode()
            if self.path == "/v1/models" and coming:
                known.append(coming.pop(0))
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", known
        finally:
            server.shutdown()
            thread.join()


async def test_a_ready_gateway_that_does_not_know_the_models_yet_is_waited_for() -> None:
    failure = asyncio.create_task(asyncio.Event().wait())
    try:
        with registering_gateway() as (url, known):
            async with asyncio.timeout(DEADLINE_S):
                await wait_until_served(url, {"first", "second"}, failure)
            assert known == ["first", "second", "first is read", "second is no good"]
    finally:
        await end_task(failure)
