"""Being a NATS micro service: what makes `nats micro ls` show a Prism service and its endpoints."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version

import nats.errors
from nats.micro import add_service
from nats.micro.request import Request

from prism.common.bus import Bus
from prism.common.identity import node_name
from prism.common.messages.events import Event

VERSION = version("prism-serving-common")
STOP_DEADLINE_S = 2.0

EndpointHandler = Callable[[Request], Awaitable[None]]


@asynccontextmanager
async def micro_service(
    bus: Bus,
    name: str,
    *,
    instance: str,
    description: str,
    metadata: Mapping[str, str] | None = None,
    endpoints: Mapping[str, tuple[str, EndpointHandler]] | None = None,
) -> AsyncIterator[None]:
    """Be the micro service `name` until the end of the `async with`, known to the server when this yields.

    `endpoints` maps an endpoint's name to its subject and handler. All instances of a service share its name;
    `instance`, in the metadata beside node, host and pid, tells them apart (containers of one node are hosts
    of their own). The events `arrived` and `left` say when one comes and goes.
    """
    told = {"instance": instance, "node": node_name(), "host": socket.gethostname(), "pid": str(os.getpid())}
    service = await add_service(
        bus.client,
        name=name,
        version=VERSION,
        description=description,
        metadata={**told, **(metadata or {})},
    )
    try:
        for endpoint, (subject, handler) in (endpoints or {}).items():
            await service.add_endpoint(name=endpoint, subject=subject, handler=handler)
        await bus.flush()
        await bus.tell(Event("arrived", "", instance, detail=name))
        yield
    finally:
        # A bus that is away holds up neither the end of this service nor anyone who would ask it.
        with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
            async with asyncio.timeout(STOP_DEADLINE_S):
                await bus.tell(Event("left", "", instance, detail=name))
                await service.stop()
