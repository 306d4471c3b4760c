"""The queue of a worker, without engines: what it tells of itself, and when it asks admission again."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import cast

import msgspec
import pytest

from prism.common.errors import ErrorCode
from prism.common.messages.generation import GenerateRequest, SamplingParams, TokenFrame
from prism.common.messages.models import ModelSpec, ModelState
from prism.gpu_worker.engine_protocol import Generate, Outputs, TokenOutput
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


class Taking:
    """An engine that takes what it is given."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def generate(self, request: Generate) -> None:
        self.given.append(request.rid)


class Memory:
    """Room for all."""

    kv_tokens = 10**6


class Serving:
    """A model that is active, as far as requests ask; with an `engine` it serves."""

    def __init__(self, name: str, engine: Taking | None = None) -> None:
        self.name = name
        self.spec = ModelSpec(name, "/nowhere")
        self.version = "1"
        self.state = ModelState.ACTIVE
        self.record = ServingRecord()
        self.most_kv_tokens = None
        self.engine = engine
        self.ready = engine
        self.memory = Memory()
        self.idle_since = self.busy_since = self.weights_arrived_at = 0.0
        self.prompt_tokens = self.generated_tokens = 0


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


class Starting:
    """An admission policy that starts everything and keeps what it saw of engines, and when."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, Mapping[str, EngineCapacity]]] = []

    def select(
        self,
        queue: Sequence[QueuedRequest],
        engines: Mapping[str, EngineCapacity],
        gpu: GpuWork,
        now: float,
    ) -> Admission:
        self.seen.append((now, engines))
        return Admission([request.rid for request in queue])


def queue_of(
    policy: AdmissionPolicy, told: Told, *models: str, engine: Taking | None = None
) -> GenerationRequests:
    serving = {name: Serving(name, engine) for name in models}
    return GenerationRequests(
        cast(FramePublisher, told),
        policy,
        find=lambda name: cast(ModelInstance, serving.get(name)),
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


async def test_a_request_for_another_version_never_waits_here() -> None:
    told = Told()
    requests = queue_of(Asked(), told, "m")
    requests.arrive(msgspec.structs.replace(asking("new"), version="2"), "reply")
    requests.arrive(msgspec.structs.replace(asking("right"), version="1"), "reply")
    requests.arrive(asking("any"), "reply")
    assert [(frame.rid, frame.error.code) for frame in told.frames if frame.error] == [
        ("new", ErrorCode.MOVED)
    ]
    assert requests.queued("m") == 2


@pytest.mark.parametrize("others", [0, 1])
async def test_a_model_is_idle_from_when_its_last_request_has_left_the_queue_by_its_deadline(
    others: int,
) -> None:
    requests = queue_of(Asked(), Told(), "m")
    instance = requests._find("m")
    assert instance is not None
    instance.idle_since = long_ago = time.monotonic() - 1000.0
    requests.arrive(asking("late", deadline_s=-1.0), "reply")
    for number in range(others):
        requests.arrive(asking(f"{number}"), "reply")
    began = time.monotonic()
    requests.expire()
    assert requests.queued("m") == others
    if others:
        assert instance.idle_since == long_ago
    else:
        assert instance.idle_since >= began


async def test_an_engine_is_at_work_from_its_first_request_until_it_has_none() -> None:
    policy = Starting()
    requests = queue_of(policy, Told(), "m", engine=Taking())
    instance = requests._find("m")
    assert instance is not None

    def goes(rid: str) -> tuple[float, float]:
        """When it went, and since when its engine had been at work."""
        requests.arrive(asking(rid), "reply")
        requests.pump()
        now, engines = policy.seen[-1]
        return now, engines["m"].busy_since_s

    def ends(rid: str) -> None:
        requests.on_outputs(instance, Outputs([TokenOutput(rid, [7], "stop")], 0, 0, 0))

    began, _ = goes("1")
    assert goes("2")[1] == began
    ends("1")
    assert goes("3")[1] == began
    ends("2")
    ends("3")
    again, _ = goes("4")
    assert goes("5")[1] == again > began


async def test_steps_are_learned_from_while_their_tokens_are_kept_for_later() -> None:
    requests = queue_of(Starting(), Told(), "m", engine=Taking())
    instance = requests._find("m")
    assert instance is not None
    requests.arrive(asking("1"), "reply")
    requests.pump()
    requests.on_outputs(instance, Outputs([TokenOutput("1", [7])], 1, 0, 0, 1))
    assert instance.record.step.seconds is None
    for step in range(2, 20):
        requests.on_outputs(instance, Outputs([], 1, 0, 0, step, unsaid=True))
    assert instance.record.step.seconds is not None
