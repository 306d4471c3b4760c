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


async def test_what_waits_is_counted_by_model_however_it_leaves() -> None:
    told = Told()
    requests = queue_of(Asked(), told, "m", "n")

    def waiting() -> dict[str, tuple[int, int]]:
        return {model: (requests.queued(model), requests.kv_tokens(model)[1]) for model in "mn"}

    assert waiting() == {"m": (0, 0), "n": (0, 0)}
    requests.arrive(asking("1", "m", prompt=3, output=10), "reply")
    requests.arrive(asking("2", "m", prompt=5, output=10), "reply")
    requests.arrive(asking("late", "m", prompt=7, output=10, deadline_s=-1.0), "reply")
    requests.arrive(asking("3", "n", prompt=9, output=20), "reply")
    assert waiting() == {"m": (3, 13 + 15 + 17), "n": (1, 29)}
    requests.expire()
    assert waiting()["m"] == (2, 13 + 15)
    requests.cancel("1")
    requests.cancel("1")
    assert waiting()["m"] == (1, 15)
    requests.send_away_queued("m")
    assert waiting() == {"m": (0, 0), "n": (1, 29)}
    assert [frame.rid for frame in told.frames if frame.error] == ["late", "1", "2"]
