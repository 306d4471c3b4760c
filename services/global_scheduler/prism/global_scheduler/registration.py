"""Making the models of a placement file known to all."""

import logging
from collections.abc import Sequence

import nats.js.errors

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import PrismError
from prism.common.messages.codec import decode, encode
from prism.common.messages.models import ModelSpec
from prism.common.mirror import mirror_bucket

log = logging.getLogger(__name__)


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
            log.info("%s %s: %s", "changed" if known else "registered", spec.model_name, spec.model_path)
    if prune:
        wanted = {subjects.spec_key(spec.model_name) for spec in specs}
        async with mirror_bucket(bus, subjects.BUCKET_MODELS, ModelSpec, pattern="spec.*") as known_specs:
            for key in set(known_specs.values) - wanted:
                await bucket.delete(key)
                log.info("removed %s, which is not in the placement file", key)
