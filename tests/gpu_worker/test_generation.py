"""The queue of a worker, without engines: what it tells of itself, and when it asks admission again."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import cast

import pytest

from prism.common.messages.generation import GenerateRequest, SamplingParams, TokenFrame
from prism.common.messages.models import ModelSpec, ModelState
from prism.gpu_worker.frames import FramePublisher
from prism.gpu_worker.generation import GenerationRequests
from prism.gpu_worker.model_instance import ModelInstance
from prism.gpu_worker.serving_record import ServingRecord
from prism.scheduling.admission import (
    SHORTEST_WAIT_S,
    Admission,
    AdmissionPolicy,
    Bounds,
    EngineCapacity,
    GpuWork,
    QueuedRequest,
)

pytestmark = pytest.mark.core

DEADLINE_S = 10.0


class Serving:
    """A model that is active, as far as a queued request asks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.spec = ModelSpec(name, "/nowhere")
        self.state = ModelState.ACTIVE
        self.record = ServingRecord()
        self.most_kv_tokens = None
        self.ready = None
        self.idle_since = 0.0


class Told:
    """Stands in for the publisher: keeps the frames."""

    coalesce_s = 0.0

    def __init__(self) -> None:
        self.frames: list[TokenFrame] = []

    def send(self, subject: str, gateway: str, frame: TokenFrame) -> None:
        self.frames.append(frame)


class Asked:
    """An admission policy that starts nothing, and wants to look again at once for so many times."""

    def __init__(self, times: int = 0) -> None:
        self.at_s: list[float] = []
        self.enough = asyncio.Event()
        self._times = times

    def select(
        self,
        queue: Sequence[QueuedRequest],
        engines: Mapping[str, EngineCapacity],
        gpu: GpuWork,
        now: float,
    ) -> Admission:
        self.at_s.append(now)
        if len(self.at_s) < self._times:
            return Admission([], now)
        self.enough.set()
        return Admission([])


def queue_of(policy: AdmissionPolicy, told: Told, *models: str) -> GenerationRequests:
    serving = {name: Serving(name) for name in models}
    return GenerationRequests(
        cast(FramePublisher, told),
        policy,
        find=lambda name: cast(ModelInstance, serving[name]),
        spawn=lambda coroutine, name: asyncio.create_task(coroutine, name=name),
        max_running_requests=8,
        pass_tokens=1000,
        bounds=Bounds(),
        on_demand=lambda: None,
    )


def asking(
    rid: str, model: str = "m", *, prompt: int = 3, output: int = 10, deadline_s: float = 60.0
) -> GenerateRequest:
    return GenerateRequest(rid, model, [1] * prompt, SamplingParams(output), deadline_s)


async def test_admission_is_never_asked_again_at_once() -> None:
    asked = Asked(times=4)
    requests = queue_of(asked, Told(), "m")
    requests.arrive(asking("r"), "reply")
    async with asyncio.timeout(DEADLINE_S):
        await asked.enough.wait()
    waits = [after - before for before, after in zip(asked.at_s, asked.at_s[1:], strict=False)]
    assert min(waits) > 0.99 * SHORTEST_WAIT_S
