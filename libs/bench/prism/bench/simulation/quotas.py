"""KV memory between the engines of a GPU: the real arbiter decides, quotas follow.

A shrink counts as confirmed at once: what an engine holds beyond its new quota it gives up step by step,
which takes milliseconds. The arbiter is asked when an engine's requests come near its quota or want more than
it holds, at most every INTERVAL_S seconds, and when a model is to come to a GPU.
"""

from collections.abc import Sequence
from functools import partial

import msgspec

from prism.bench.simulation.events import EventQueue
from prism.bench.simulation.gpu import Gpu
from prism.bench.simulation.instance import Instance
from prism.bench.simulation.model import SimulatedModel
from prism.scheduling.memory import GB, kv_floor
from prism.scheduling.quotas import QuotaHolder, arbitrate

INTERVAL_S = 0.1
NO_CAP = 1 << 62


class QuotaShell:
    """Moves quotas on the GPUs of a cluster; not at all unless `elastic`."""

    def __init__(self, events: EventQueue, *, elastic: bool) -> None:
        self.elastic = elastic
        self._events = events
        self._pending: set[int] = set()

    def wanted(self, instance: Instance, now: float) -> None:
        """An instance wants more than it has, or will soon."""
        if not self.elastic:
            return
        for gpu in instance.gpus:
            if gpu.index not in self._pending:
                self._pending.add(gpu.index)
                self._events.at(now + INTERVAL_S, partial(self._look, gpu))

    def _look(self, gpu: Gpu, now: float) -> None:
        self._pending.discard(gpu.index)
        for _ in range(2):
            # What the first round shrinks, the second gives to those who wait for it.
            plan = arbitrate(
                _pool(gpu), [_holder(each) for each in gpu.residents.values() if each.quota_bytes]
            )
            for name, quota_bytes in plan.shrink.items():
                _resize(gpu.residents[name], quota_bytes, now)
            for name, quota_bytes in plan.grow.items():
                instance = gpu.residents[name]
                room = min(each.free_bytes for each in instance.gpus)
                _resize(instance, min(quota_bytes, instance.quota_bytes + room), now)
            if not plan.shrink:
                break

    def make_room(
        self, model: SimulatedModel, gpus: Sequence[Gpu], kv_bytes: int, now: float, *, held: int
    ) -> int:
        """KV memory for a model that comes to `gpus`, where `held` bytes of its own are counted already: up
        to `kv_bytes`, 0 when there is not even its floor. Others' quotas shrink for it as far as their
        requests need them not."""
        fixed = model.cost.weights_bytes + model.cost.context_bytes - held
        if not self.elastic:
            return max(0, min(kv_bytes, min(gpu.free_bytes for gpu in gpus) - fixed))
        floor = min(kv_bytes, kv_floor_bytes(model))
        found = kv_bytes
        plans = []
        for gpu in gpus:
            pool = _pool(gpu) - fixed
            holders = [_holder(each) for each in gpu.residents.values() if each.quota_bytes]
            new = QuotaHolder("", 0, wanted_bytes=kv_bytes, floor_bytes=floor, cap_bytes=kv_bytes)
            plan = arbitrate(pool, [*holders, new])
            if plan.targets[""] < floor:
                # What running requests will only come to take may be had: they wait, or are retracted.
                holders = [
                    msgspec.structs.replace(
                        each, committed_bytes=each.used_bytes, wanted_bytes=each.used_bytes
                    )
                    for each in holders
                ]
                if sum(max(each.used_bytes, each.floor_bytes) for each in holders) + floor > pool:
                    return 0
                plan = arbitrate(pool, [*holders, new])
            plans.append((gpu, plan))
            found = min(found, max(floor, plan.targets[""]))
        for gpu, plan in plans:
            for name, quota_bytes in plan.shrink.items():
                _resize(gpu.residents[name], quota_bytes, now)
        return max(0, min(found, min(gpu.free_bytes for gpu in gpus) - fixed))


def kv_floor_bytes(model: SimulatedModel) -> int:
    """What an active model keeps in any case."""
    return kv_floor(model.spec, model.facts, None)


def _pool(gpu: Gpu) -> int:
    """What is not weights or contexts."""
    fixed = sum(each.weights_bytes + each.context_bytes for each in gpu.residents.values())
    return gpu.limit_bytes - fixed


def _holder(instance: Instance) -> QuotaHolder:
    model, per_token = instance.model, instance.model.cost.kv_bytes_per_token
    placements = model.spec.init_placements
    pool = placements[0].max_memory_pool_size if placements else None
    if instance.engine is None:
        # On its way up: its quota stays until it is there.
        committed = wanted = instance.quota_bytes
        used = 0
    else:
        committed = instance.reserved * per_token
        wanted = instance.wanted_bytes
        used = instance.used_bytes
    return QuotaHolder(
        model=model.name,
        quota_bytes=instance.quota_bytes,
        used_bytes=used,
        committed_bytes=committed,
        wanted_bytes=wanted,
        floor_bytes=min(instance.quota_bytes, kv_floor_bytes(model)),
        cap_bytes=max(instance.quota_bytes, round(pool * GB)) if pool is not None else NO_CAP,
        granularity=max(1, per_token),
        priority=model.spec.priority,
    )


def _resize(instance: Instance, quota_bytes: int, now: float) -> None:
    if quota_bytes == instance.quota_bytes:
        return
    instance.hold(weights=instance.weights_bytes, quota=quota_bytes, context=instance.context_bytes)
    if instance.engine is not None:
        grows = quota_bytes > instance.quota_bytes
        instance.engine.set_quota(instance.quota_tokens, now)
        if instance.queue is not None and (grows or instance.queued):
            instance.queue.pump(now)
