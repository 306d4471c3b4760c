"""Making the models of a placement file known to all."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import nats.errors
import nats.js.errors

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import PrismError
from prism.common.messages.codec import decode, encode
from prism.common.messages.models import ModelSpec
from prism.common.mirror import mirror_bucket
from prism.common.tasks import end_task
from prism.common.telemetry import about

log = logging.getLogger(__name__)

RETRY_S = 1.0
BUS_ERRORS = (nats.errors.Error, nats.js.errors.Error, OSError, TimeoutError)


async def register(bus: Bus, specs: Sequence[ModelSpec], *, prune: bool = False) -> None:
    """Write `specs` to the registry, in their order, where they differ from what is there.

    Models that others registered stay, unless `prune`: then the registry holds `specs` alone.
    """
    bucket = await bus.bucket(subjects.BUCKET_MODELS)
    for spec in specs:
        key = subjects.spec_key(spec.model_name)
        try:
            known = decode((await bucket.get(key)).value or b"", ModelSpec)
        except (nats.js.errors.KeyNotFoundError, PrismError):
            known = None
        if known != spec:
            await bucket.put(key, encode(spec))
            done = "changed" if known else "registered"
            log.info("%s from %s", done, spec.model_path, extra=about(model=spec.model_name))
    if prune:
        wanted = {subjects.spec_key(spec.model_name) for spec in specs}
        async with mirror_bucket(bus, subjects.BUCKET_MODELS, ModelSpec, pattern="spec.*") as known_specs:
            for key in set(known_specs.values) - wanted:
                await bucket.delete(key)
                log.info("removed %s, which is not in the placement file", key)


@asynccontextmanager
async def registered(bus: Bus, specs: Sequence[ModelSpec], *, prune: bool = False) -> AsyncIterator[None]:
    """`specs` are registered when this begins, and again whenever the bus is back without its state.

    A model that somebody removes from the registry on purpose stays removed.
    """
    await register(bus, specs, prune=prune)
    known = await _made_at(bus)
    returned = asyncio.Event()
    bus.on_return.append(returned.set)
    task = asyncio.create_task(_register_anew(bus, specs, returned, known), name="registration")
    try:
        yield
    finally:
        bus.on_return.remove(returned.set)
        await end_task(task)


async def _register_anew(
    bus: Bus, specs: Sequence[ModelSpec], returned: asyncio.Event, known: object
) -> None:
    while True:
        await returned.wait()
        returned.clear()
        try:
            if (made_at := await _made_at(bus)) != known:
                log.warning("the bus has lost its state, registering %d models anew", len(specs))
                await register(bus, specs)
                known = made_at
        except BUS_ERRORS as error:
            log.debug("registry not looked at yet: %s", error)
            await asyncio.sleep(RETRY_S)
            returned.set()


async def _made_at(bus: Bus) -> object:
    """When the registry's bucket was made: another time means another bucket."""
    status = await (await bus.bucket(subjects.BUCKET_MODELS)).status()
    return status.stream_info.created
