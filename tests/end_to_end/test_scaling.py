"""Each service is scaled from one to two and back, under load: no request fails, no stream breaks."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from tests.chaos.campaign import learn_answers
from tests.chaos.cluster_view import ClusterView, cluster_view
from tests.chaos.stage import prompts_of, stage
from tests.chaos.traffic import COMPLETE, Question, Traffic, traffic

from prism.cli.demo import tiny_placement
from prism.cli.system import RunningSystem, SystemSettings, running_system
from prism.common.messages.load import LoadReport

pytestmark = pytest.mark.engine

SERVICES = ("gateway", "global_scheduler", "gpu_worker", "model_store")
DEADLINE_S = 120.0
CLIENTS = 6
MEANWHILE = 8


@pytest.fixture(scope="module")
async def growing(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningSystem]:
    """A system of its own, with one of each."""
    folder = tmp_path_factory.mktemp("scaling")
    placement = folder / "placement.json"
    placement.write_bytes(msgspec.json.encode(tiny_placement(list(tiny_models.values()))))
    with (folder / "services.log").open("w", buffering=1) as log:
        settings = SystemSettings(
            placement=placement, worker_memory_gb=0.24, store_memory_gb=1.0, image_dir=folder / "images"
        )
        async with running_system(settings, lambda name, line: print(name, line, file=log)) as system:
            yield system


@pytest.fixture(scope="module")
async def view(growing: RunningSystem) -> AsyncIterator[ClusterView]:
    async with cluster_view(growing.nats_url) as seen:
        yield seen


@pytest.fixture(scope="module")
async def questions(growing: RunningSystem, tiny_models: dict[str, Path]) -> list[Question]:
    return await learn_answers(growing.gateway_url, prompts_of(list(tiny_models.values())))


async def right(view: ClusterView, workers: int) -> None:
    """Wait until the cluster has `workers` workers, a leader, and routes that are true."""
    assert await view.until_right(workers, DEADLINE_S) == []


async def used(flow: Traffic) -> None:
    await flow.more(MEANWHILE, DEADLINE_S)


def has_worked(report: LoadReport) -> bool:
    return any(load.generated_tokens for load in report.models)


def nothing_went_wrong(flow: Traffic) -> None:
    """All requests were answered as they should be, each on the connection that it came by."""
    assert [exchange for exchange in flow.exchanges if exchange.outcome != COMPLETE] == []
    assert flow.breaks == []


async def swap(system: RunningSystem, flow: Traffic, kind: str) -> None:
    """A second one joins, and the first one leaves."""
    (first,) = system.of(kind)
    await system.add(kind)
    await used(flow)
    await system.remove(first.name)
    await used(flow)
    assert len(system.of(kind)) == 1


async def test_every_service_is_replaced_by_a_second_one_without_a_failed_request(
    growing: RunningSystem, view: ClusterView, questions: list[Question]
) -> None:
    system = growing
    async with traffic(
        lambda: list(system.gateway_urls.values()), questions, clients=CLIENTS, seed=11
    ) as flow:
        await used(flow)
        await swap(system, flow, "global_scheduler")
        await right(view, workers=1)

        await system.add("model_store")
        await system.add("gpu_worker")
        await right(view, workers=2)
        await used(flow)
        assert len({report.gpu_ids[0] for report in view.living().values()}) == 2
        await system.remove("gpu_worker")
        await right(view, workers=1)
        await system.remove("model_store")
        await used(flow)
        assert [exchange for exchange in flow.exchanges if exchange.refused] == []

        await swap(system, flow, "gateway")
    nothing_went_wrong(flow)
    assert len(flow.exchanges) >= 5 * MEANWHILE


async def until(flow: Traffic, holds: Callable[[], bool]) -> None:
    """Wait, a request at a time, until `holds`."""
    async with asyncio.timeout(DEADLINE_S):
        while not holds():
            await flow.more(1, DEADLINE_S)


async def test_two_of_every_service_share_the_work_and_become_one_without_a_failed_request(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    models = list(tiny_models.values())
    async with stage(tmp_path, models, tmp_path / "services.log") as running:
        system, seen = running.system, running.view
        assert [len(system.of(kind)) for kind in SERVICES] == [2] * len(SERVICES)
        asked = await learn_answers(running.gateways()[0], prompts_of(models))
        async with traffic(running.gateways, asked, clients=CLIENTS, seed=12) as flow:
            await right(seen, workers=2)
            gateways = set(running.gateways())
            await until(flow, lambda: {done.gateway for done in flow.exchanges if done.ended} == gateways)
            # Each has the weights of its models from a store of its own.
            await until(flow, lambda: all(map(has_worked, seen.living().values())))

            leader = seen.leader
            await system.remove(running.leading)
            await until(flow, lambda: seen.leader not in ("", leader))
            await used(flow)
            await system.remove("gpu_worker-2")
            await right(seen, workers=1)
            await system.remove("model_store-2")
            await used(flow)
            await system.remove("gateway")
            await used(flow)
            await right(seen, workers=1)
        assert [len(system.of(kind)) for kind in SERVICES] == [1] * len(SERVICES)
    nothing_went_wrong(flow)
