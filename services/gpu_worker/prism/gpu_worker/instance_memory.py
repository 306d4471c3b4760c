"""What one model reserves on its worker: weights, what its process costs, and a KV quota that moves.

Memory is reserved in the ledger before an engine takes it, and given back once the engine has confirmed.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from prism.common.errors import PrismError
from prism.common.messages.models import ModelFacts, ModelSpec
from prism.common.telemetry import about
from prism.gpu_worker.devices.device import Device
from prism.gpu_worker.engine_protocol import Outputs, QuotaSet, Ready
from prism.scheduling.ledger import MemoryLedger
from prism.scheduling.memory import kv_floor, kv_reservation, weights_bytes
from prism.scheduling.quotas import QuotaHolder

log = logging.getLogger(__name__)

SPARE_TOKENS = 8
"""SGLang starts a request only where a few more tokens are free than it takes."""

Room = Callable[[str, int, int], AbstractAsyncContextManager[None]]
"""Keeps free, within its context, what others can give away of so many bytes more for a model: (model, bytes
without which nothing is gained, bytes wanted)."""


class InstanceMemory:
    """The reservation of one model. `kv_bytes` is the quota that its engine has, `kv_tokens` what that has
    room for, `weights_bytes` what its weights turned out to take."""

    def __init__(
        self, spec: ModelSpec, facts: ModelFacts, device: Device, ledger: MemoryLedger, room: Room
    ) -> None:
        self.weights_bytes = 0
        self.kv_bytes = 0
        self.kv_tokens = 0
        self._first_kv_bytes = 0
        self._spec = spec
        self._facts = facts
        self._device = device
        self._ledger = ledger
        self._room = room

    def describe(self, spec: ModelSpec, facts: ModelFacts) -> None:
        """What the model is from its next engine on."""
        self._spec, self._facts = spec, facts

    @property
    def _name(self) -> str:
        return self._spec.model_name

    @property
    def reserved_weights_bytes(self) -> int:
        """Of the ledger, for weights."""
        return self._ledger.held(self._name).weights

    @property
    def reserved_beside_kv_bytes(self) -> int:
        """Of the ledger, for weights and for what its process costs."""
        held = self._ledger.held(self._name)
        return held.weights + held.fixed

    @property
    def quota_bytes(self) -> int:
        """Of the ledger, for the KV cache: never less than what the engine has."""
        return self._ledger.held(self._name).kv

    @property
    def kv_cap_bytes(self) -> int:
        """The largest quota that it may get: what its operator allows, else all that its worker has beside
        its weights. The first one stays where an engine has several ranks: their pools can't be resized
        together yet."""
        if self._spec.tp_size > 1:
            return self._first_kv_bytes
        pool = self._spec.init_placements[0].max_memory_pool_size if self._spec.init_placements else None
        if pool is not None:
            return kv_reservation(self._spec, self._facts, self._device.element_bytes)
        held = self._ledger.held(self._name)
        return self._ledger.limit_bytes - held.weights - held.fixed

    @property
    def most_kv_bytes(self) -> int:
        """The largest quota that there may ever be here."""
        return max(self.kv_cap_bytes, self.quota_bytes)

    def most_kv_tokens(self, ready: Ready) -> int | None:
        """Tokens that one request can have at most, with the largest quota."""
        if not ready.kv_bytes_per_token:
            return None
        quota = self.most_kv_bytes - ready.kv_overhead_bytes
        return max(self.kv_tokens, quota // ready.kv_bytes_per_token) - SPARE_TOKENS

    def begin(self, kv_bytes: int) -> int:
        """An engine is to be started with this quota; returns what its weights will take by estimate."""
        self._first_kv_bytes = kv_bytes
        return weights_bytes(self._facts, self._device.element_bytes, self._spec.tp_size)

    def kept_kv_bytes(self, kv_bytes: int) -> int:
        """The quota to wake with: the one that it had, or less where less is given to it now and quotas can
        change."""
        return min(self.kv_bytes, kv_bytes) if self._spec.tp_size == 1 else self.kv_bytes

    async def reserve(self, weights: int, kv_bytes: int) -> int:
        """Reserve what serving takes, for which others make room. Returns the KV quota: as much of `kv_bytes`
        as there is, its floor at least. Raises PrismError(out_of_memory)."""
        fixed = self._device.fixed_bytes
        floor = self._kv_at_least(weights, kv_bytes)
        held = self._ledger.held(self._name).total
        least = weights + fixed + floor - held
        async with self._room(self._name, least, weights + fixed + kv_bytes - held):
            beside = self._ledger.free_bytes + held - weights - fixed
            kv_bytes = min(kv_bytes, max(floor, beside))
            self._ledger.resize(self._name, weights=weights, kv=kv_bytes, fixed=fixed)
        return kv_bytes

    def grant_weights(self, nbytes: int, kv_bytes: int) -> bool:
        """The weights turned out to take `nbytes`: reserve that, beside as much of the quota `kv_bytes` as
        there is. False when there is too little."""
        fixed = self._device.fixed_bytes
        beside = self._ledger.free_bytes + self._ledger.held(self._name).total - nbytes - fixed
        kept = min(kv_bytes, max(beside, self._kv_at_least(nbytes, kv_bytes)))
        try:
            self._ledger.resize(self._name, weights=nbytes, kv=kept, fixed=fixed)
        except PrismError as error:
            log.info("its weights do not fit: %s", error.message, extra=about(model=self._name))
            return False
        self.weights_bytes, self.kv_bytes = nbytes, kept
        return True

    def raise_quota(self, kv_bytes: int) -> None:
        """Reserve a larger quota, before the engine has it. Raises PrismError(out_of_memory)."""
        held = self._ledger.held(self._name)
        if kv_bytes > held.kv:
            self._ledger.resize(self._name, weights=held.weights, kv=kv_bytes, fixed=held.fixed)

    def confirmed(self, answer: QuotaSet) -> None:
        """The engine has this quota now: what it has not is free."""
        if answer.retracted:
            log.info(
                "%d requests wait for memory: its KV quota is %.1f MB now",
                answer.retracted,
                answer.kv_bytes / 1e6,
                extra=about(model=self._name),
            )
        held = self._ledger.held(self._name)
        self._ledger.resize(
            self._name, weights=held.weights, kv=min(held.kv, answer.kv_bytes), fixed=held.fixed
        )
        self.kv_bytes, self.kv_tokens = answer.kv_bytes, answer.kv_tokens

    def hold_fixed(self) -> None:
        """A dozing engine keeps what its process costs, and nothing else."""
        self._ledger.resize(self._name, fixed=self._device.fixed_bytes)

    def hold_nothing(self) -> None:
        """A frozen engine keeps nothing."""
        self._ledger.resize(self._name)

    def release(self) -> None:
        """There is no engine any more."""
        self._ledger.release(self._name)

    def holder(
        self, ready: Ready, load: Outputs, running_tokens: int, wanted_tokens: int
    ) -> QuotaHolder | None:
        """What the arbiter needs to know while it serves; None where its quota can't move."""
        if self._spec.tp_size > 1:
            return None
        quota, page = self.quota_bytes, max(1, ready.kv_page_bytes)
        return QuotaHolder(
            self._name,
            quota,
            used_bytes=kv_bytes_of(ready, load.kv_used_tokens),
            committed_bytes=kv_bytes_of(ready, running_tokens),
            wanted_bytes=kv_bytes_of(ready, wanted_tokens),
            # Whole pages, as the engine holds them: part of one would be taken from it in every round.
            floor_bytes=min(quota, -(-self._kv_floor // page) * page),
            cap_bytes=max(self.kv_cap_bytes, 0),
            granularity=ready.kv_page_bytes,
            priority=self._spec.priority,
        )

    def _kv_at_least(self, weights: int, kv_bytes: int) -> int:
        """The quota without which it does not start: the floor that placement counts with, less what weights
        take beyond the estimate that placement counts with, up to half of it."""
        if self._spec.tp_size > 1:
            return kv_bytes
        floor = min(kv_bytes, self._kv_floor)
        beyond = weights - weights_bytes(self._facts, self._device.element_bytes)
        return floor - min(floor // 2, max(0, beyond))

    @property
    def _kv_floor(self) -> int:
        return kv_floor(self._spec, self._facts, self._device.element_bytes)


def kv_bytes_of(ready: Ready, tokens: int) -> int:
    """The quota that requests of so many tokens take."""
    return ready.kv_overhead_bytes + (tokens + SPARE_TOKENS) * ready.kv_bytes_per_token if tokens else 0
