"""The cluster as its bus tells it: who serves what by its route, and by its own word; who leads."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nats.aio.msg import Msg

from prism.common import subjects
from prism.common.bus import connect_bus
from prism.common.messages.codec import decode
from prism.common.messages.load import LoadReport
from prism.common.messages.models import ModelState
from prism.common.messages.placement import LeaderRecord, Route
from prism.common.mirror import BucketMirror, mirror_bucket

FRESH_S = 1.5
LOOK_S = 0.1


class ClusterView:
    """What the bus says now."""

    def __init__(self, routes: BucketMirror[Route], leaders: BucketMirror[LeaderRecord]) -> None:
        self.reports: dict[str, tuple[float, LoadReport]] = {}
        self._routes = routes
        self._leaders = leaders

    async def on_load(self, message: Msg) -> None:
        """A load report."""
        report = decode(message.data, LoadReport)
        self.reports[report.worker] = (time.monotonic(), report)

    def living(self) -> dict[str, LoadReport]:
        """The newest reports of the workers that report."""
        now = time.monotonic()
        return {name: report for name, (at, report) in self.reports.items() if now - at <= FRESH_S}

    @property
    def leader(self) -> str:
        """The scheduler that leads, empty if none does."""
        record = self._leaders.values.get(subjects.LEADER_KEY)
        return record.instance if record else ""

    def faults(self, workers: int) -> list[str]:
        """What is not as it should be with `workers` workers: each difference in words."""
        living = self.living()
        routed = {(route.model, route.worker) for route in self._routes.values.values()}
        active = {
            (load.model, worker)
            for worker, report in living.items()
            for load in report.models
            if load.state is ModelState.ACTIVE
        }
        wrong = [
            f"{model} is routed to {worker}, which does not serve it" for model, worker in routed - active
        ]
        wrong += [f"{model} is active on {worker} without a route" for model, worker in active - routed]
        if len(living) != workers:
            wrong.append(f"{len(living)} workers report, not {workers}")
        if not self.leader:
            wrong.append("nobody leads")
        return wrong

    async def until_right(self, workers: int, timeout_s: float) -> list[str]:
        """Wait until there are no faults; those that are left after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while (faults := self.faults(workers)) and time.monotonic() < deadline:  # noqa: ASYNC110 (time passes)
            await asyncio.sleep(LOOK_S)
        return faults


@asynccontextmanager
async def cluster_view(nats_url: str) -> AsyncIterator[ClusterView]:
    """A view that is kept up to date; it survives the loss of the bus."""
    async with (
        connect_bus(nats_url, name="chaos") as bus,
        mirror_bucket(bus, subjects.BUCKET_ROUTES, Route) as routes,
        mirror_bucket(bus, subjects.BUCKET_LEADER, LeaderRecord) as leaders,
    ):
        view = ClusterView(routes, leaders)
        await bus.subscribe(subjects.load("*"), view.on_load, inline=True)
        await bus.flush()
        yield view
