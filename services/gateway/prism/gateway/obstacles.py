"""Models that no request wakes as things are: the leading scheduler knows which and why, and is asked."""

import asyncio
import logging
import math
from collections.abc import Callable

import nats.errors

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import PrismError
from prism.common.messages.explain import ExplainReply, ExplainRequest

log = logging.getLogger(__name__)

ASK_S = 1.0
ANSWER_S = 3.0
HOLD_S = 5.0
"""How long an answer holds when none comes after it."""


class Obstacles:
    """What the scheduler said last. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._texts: dict[str, str] = {}
        self._told_at = -math.inf

    def of(self, model: str) -> str | None:
        """Why no request wakes `model`; None when one does, or when nobody has said lately."""
        return self._texts.get(model) if self._clock() - self._told_at <= HOLD_S else None

    def take(self, reply: ExplainReply) -> None:
        """The scheduler says what there is now."""
        self._texts = {note.model: note.text for note in reply.obstacles}
        self._told_at = self._clock()

    async def run(self, bus: Bus) -> None:
        """Ask every ASK_S seconds until cancelled."""
        question, subject = ExplainRequest(obstacles=True), subjects.scheduler_explain()
        while True:
            try:
                self.take(await bus.request(subject, question, ExplainReply, timeout_s=ANSWER_S))
            except (PrismError, nats.errors.Error, OSError) as error:
                log.debug("no scheduler says what stands in the way of models: %s", error)
            await asyncio.sleep(ASK_S)
