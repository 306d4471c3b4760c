"""Taking down the routes of workers that are gone: they can't do it themselves any more."""

import logging

import nats.errors

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.messages.placement import Route
from prism.common.mirror import BucketMirror

log = logging.getLogger(__name__)

ROUTE_SILENT_S = 5.0


class DeadRoutes:
    """Finds routes whose worker has not been heard of for ROUTE_SILENT_S, and deletes them."""

    def __init__(self, bus: Bus, routes: BucketMirror[Route]) -> None:
        self._bus = bus
        self._routes = routes
        self._absent_since: dict[str, float] = {}

    def find(self, present: set[str], now: float) -> list[str]:
        """Keys of routes to take down, given the workers that report."""
        named = {route.worker for route in self._routes.values.values()}
        self._absent_since = {
            worker: self._absent_since.get(worker, now) for worker in named if worker not in present
        }
        return [
            key
            for key, route in self._routes.values.items()
            if now - self._absent_since.get(route.worker, now) > ROUTE_SILENT_S
        ]

    async def take_down(self, keys: list[str]) -> None:
        """Delete `keys`; what fails is found again."""
        try:
            bucket = await self._bus.bucket(subjects.BUCKET_ROUTES)
            for key in keys:
                await bucket.delete(key)
                log.info("route %s taken down: its worker is gone", key)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            log.warning("routes of lost workers not taken down: %s", error)
