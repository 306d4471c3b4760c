"""A model moves between two workers with real engines, under load, without a failed request.

Its operator pins it to the other worker's GPU: a natural reason to move, and one that does not depend on how
fast this machine is.
"""

import asyncio
from pathlib import Path

import msgspec
import pytest
from tests.chaos.campaign import learn_answers
from tests.chaos.cluster_view import cluster_view
from tests.chaos.stage import prompts_of
from tests.chaos.traffic import COMPLETE, traffic
from tests.end_to_end.observing import watching

from prism.cli.system import SystemSettings, running_system
from prism.common import subjects
from prism.common.bus import connect_bus
from prism.common.messages.codec import encode
from prism.common.messages.models import InitialPlacement, ModelSpec, ModelState

pytestmark = pytest.mark.engine

DEADLINE_S = 120.0
CLIENTS = 4
MEANWHILE = 8


async def test_a_model_moves_between_two_workers_under_load_without_a_failed_request(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = next(iter(tiny_models.values()))
    # Pinned from the start: on a slow machine it would get a replica under this load, and not move.
    spec = ModelSpec(folder.name, str(folder), pin=True, init_placements=[InitialPlacement([0])])
    placement = tmp_path / "placement.json"
    placement.write_bytes(msgspec.json.encode([]))
    settings = SystemSettings(
        placement=placement,
        worker_memory_gb=0.24,
        store_memory_gb=1.0,
        image_dir=tmp_path / "images",
        workers=2,
    )
    with (tmp_path / "services.log").open("w", buffering=1) as log:
        async with (
            running_system(settings, lambda service, line: print(service, line, file=log)) as system,
            cluster_view(system.nats_url) as view,
            connect_bus(system.nats_url, name="operator") as bus,
            watching(bus) as watcher,
        ):
            # Registered when both workers are there: which of them is the first is left to chance.
            assert await view.until_right(2, DEADLINE_S) == []
            bucket = await bus.bucket(subjects.BUCKET_MODELS)
            await bucket.put(subjects.spec_key(spec.model_name), encode(spec))
            asked = await learn_answers(system.gateway_url, prompts_of([folder]))
            assert await view.until_right(2, DEADLINE_S) == []

            def where() -> dict[int, ModelState]:
                return {
                    report.gpu_ids[0]: load.state
                    for report in view.living().values()
                    for load in report.models
                    if load.model == spec.model_name
                }

            assert where() == {0: ModelState.ACTIVE}
            async with traffic(lambda: [system.gateway_url], asked, clients=CLIENTS, seed=3) as flow:
                await flow.more(MEANWHILE, DEADLINE_S)
                elsewhere = msgspec.structs.replace(spec, init_placements=[InitialPlacement([1])])
                await bucket.put(subjects.spec_key(spec.model_name), encode(elsewhere))
                async with asyncio.timeout(DEADLINE_S):
                    while where().get(0) is not ModelState.DOZING:
                        await flow.more(1, DEADLINE_S)
                await flow.more(MEANWHILE, DEADLINE_S)
            assert where() == {0: ModelState.DOZING, 1: ModelState.ACTIVE}
            assert [done for done in flow.exchanges if done.outcome != COMPLETE or done.refused] == []
            assert [watcher.count(kind, spec.model_name) for kind in ("moving", "moved")] == [1, 1]
