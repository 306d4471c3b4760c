"""What a worker tells without being asked: load reports, life-cycle events."""

import asyncio
import logging
import time
from collections.abc import Callable

import nats.errors

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import PrismError
from prism.common.messages.events import Event
from prism.common.messages.load import LoadReport
from prism.common.messages.models import ModelState
from prism.common.telemetry import about
from prism.gpu_worker.engine_protocol import Progress
from prism.gpu_worker.model_instance import ModelInstance
from prism.gpu_worker.model_load import told_bytes
from prism.scheduling.ledger import Parts

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 0.25
PROGRESS_INTERVAL_S = 0.25
COMMAND_DONE = {
    ModelState.ACTIVE: "activated",
    ModelState.DOZING: "dozed",
    ModelState.FROZEN: "froze",
    ModelState.COLD: "released",
}
"""By what the model is then: one without an image was released, whatever was asked for."""


class Announcements:
    """Reports of one worker: every REPORT_INTERVAL_S and at once after `changed`; events as they happen."""

    def __init__(
        self,
        bus: Bus,
        worker: str,
        report: Callable[[], LoadReport],
        spawn: Callable[..., "asyncio.Task[None]"],
    ) -> None:
        self._bus = bus
        self._worker = worker
        self._report = report
        self._spawn: Callable[..., asyncio.Task[None]] = spawn
        self._changed = asyncio.Event()
        self._progress_told: dict[str, float] = {}

    def changed(self) -> None:
        """Report load at once."""
        self._changed.set()

    async def report_load(self) -> None:
        """Report until cancelled."""
        subject = subjects.load(self._worker)
        while True:
            self._changed.clear()
            try:
                await self._bus.publish(subject, self._report())
            except (nats.errors.Error, OSError) as error:
                log.debug("load report not sent: %s", error)
            except PrismError as error:
                # One report less, not a worker less.
                log.error("load report not sent: %s", error.message)
            try:
                async with asyncio.timeout(REPORT_INTERVAL_S):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def state_entered(self, instance: ModelInstance, held: Parts) -> None:
        """An event for the state that `instance` is in now, with what it has reserved."""
        # Why it is, if something failed, is told by whoever noticed.
        log.info("%s", instance.state, extra=about(model=instance.name))
        self.changed()
        self._tell(
            str(instance.state),
            instance.name,
            instance.failure or "",
            {},
            {"weights": held.weights, "kv": held.kv},
        )

    def command_done(self, instance: ModelInstance, before: str, seconds: dict[str, float]) -> None:
        """An event for a command that changed something, with the time it took and the memory in use now."""
        if seconds:
            weights, kv = told_bytes(instance)
            kind = COMMAND_DONE[instance.state]
            self._tell(kind, instance.name, f"from {before}", seconds, {"weights": weights, "kv": kv})

    def progress(self, instance: ModelInstance, progress: Progress) -> None:
        """An event for staging progress, a few a second."""
        now = time.monotonic()
        if now - self._progress_told.get(instance.name, 0.0) >= PROGRESS_INTERVAL_S:
            self._progress_told[instance.name] = now
            done = {"done": progress.done_bytes, "total": progress.total_bytes}
            self._tell("progress", instance.name, "", {}, done)

    def _tell(
        self, kind: str, model: str, detail: str, seconds: dict[str, float], nbytes: dict[str, int]
    ) -> None:
        event = Event(kind, model, self._worker, self._worker, detail, seconds, nbytes)
        self._spawn(self._bus.tell(event), name=f"event {kind} {model}")
