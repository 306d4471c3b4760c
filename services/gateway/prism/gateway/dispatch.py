"""One generation on the bus: tries workers until one has finished it, and loses or doubles no token."""

import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace

import msgspec
import nats.errors

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.generation import (
    CancelRequest,
    Finish,
    GenerateRequest,
    SamplingParams,
    TokenFrame,
    TokenLogprob,
)
from prism.common.telemetry import about
from prism.gateway.fleet import Fleet
from prism.gateway.metrics import Metrics
from prism.gateway.parking import Parking
from prism.gateway.registry import Registry
from prism.gateway.replies import Inbox, Replies
from prism.gateway.settings import Settings
from prism.gateway.silence_watch import HELD_UP_S
from prism.gateway.suspects import Suspects

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 2.0
NOT_STARTED = (ErrorCode.MOVED, ErrorCode.OVERLOADED)
"""Refusals: the worker never began, so trying again elsewhere is no loss of a worker."""


@dataclass(frozen=True, slots=True)
class Job:
    """One generation to be done. `deadline` is on the event loop's clock, in seconds; `request` is the id
    that the client sees, for log lines. Tokens of one that is not `streamed` may come some at a time.
    `version` is that of the model that its tokens were made for, empty for any."""

    model: str
    input_ids: list[int]
    sampling: SamplingParams
    deadline: float
    eos_token_ids: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    priority: int = 0
    request: str = ""
    streamed: bool = True
    version: str = ""


class Tokens(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one frame; the last one carries `finish`."""

    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprob] | None = None
    finish: Finish | None = None


@dataclass(slots=True)
class Shunned:
    """Workers that a job stays away from for a while, each time longer."""

    until: dict[str, float] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)

    def add(self, worker: str, now: float) -> None:
        """`worker` has just refused or lost the job."""
        count = self.times.get(worker, 0)
        self.times[worker] = count + 1
        self.until[worker] = now + min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2**count)

    def at(self, now: float) -> set[str]:
        """Workers to avoid at `now`."""
        return {worker for worker, until in self.until.items() if until > now}

    def next_change(self, now: float) -> float | None:
        """When the first of them may be asked again."""
        return min((until for until in self.until.values() if until > now), default=None)


def replay(job: Job, done: Sequence[int]) -> Job:
    """What is left of `job` after the tokens `done`."""
    if not done:
        return job
    sampling = msgspec.structs.replace(
        job.sampling,
        max_new_tokens=job.sampling.max_new_tokens - len(done),
        min_new_tokens=max(0, job.sampling.min_new_tokens - len(done)),
    )
    return replace(job, input_ids=[*job.input_ids, *done], sampling=sampling)


def already_over(job: Job, done: Sequence[int]) -> Finish | None:
    """The ending of a generation whose tokens all came and whose last frame did not."""
    if not done:
        return None
    last, sampling = done[-1], job.sampling
    ends = last in sampling.stop_token_ids or (last in job.eos_token_ids and not sampling.ignore_eos)
    if ends and len(done) >= sampling.min_new_tokens:
        return Finish("stop", len(job.input_ids), len(done), matched_token=last)
    if len(done) >= sampling.max_new_tokens:
        return Finish("length", len(job.input_ids), len(done))
    return None


class Dispatcher:
    """Sends jobs to workers. `clock` must be the event loop's."""

    def __init__(
        self,
        bus: Bus,
        gateway: str,
        settings: Settings,
        fleet: Fleet,
        registry: Registry,
        parking: Parking,
        replies: Replies,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._bus = bus
        self._gateway = gateway
        self._settings = settings
        self._fleet = fleet
        self._registry = registry
        self._parking = parking
        self._replies = replies
        self._metrics = metrics
        self._clock = clock
        self._suspects = Suspects()

    async def run(self, job: Job) -> AsyncGenerator[list[Tokens], None]:
        """The tokens of `job`, each exactly once, as many frames at a time as have come. Closing the
        generator cancels the work.

        A request that ends every engine gets nowhere, and would take all others with it each time. So losses
        count in a row, those without a token between, and after two it goes alone (see `Suspects`).

        Raises PrismError: what the worker said, overloaded when too many are parked already as it comes,
        deadline_exceeded, or engine_lost after too many losses in a row.
        """
        done: list[int] = []
        shunned = Shunned()
        losses = 0
        begun = False
        waiting_since = self._clock()
        self._refuse_oversized(job)
        while True:
            if (finish := already_over(job, done)) is not None:
                yield [Tokens((), None, finish)]
                return
            before = len(done)
            async with AsyncExitStack() as stack:
                let_others = None
                if losses > 1:
                    alone = self._suspects.alone(job.model, job.deadline - self._clock())
                    let_others = await stack.enter_async_context(alone)
                worker = await self._find_worker(job, shunned, waiting_since, begun=begun)
                begun = True
                rid = secrets.token_hex(16)
                try:
                    async with aclosing(self._attempt(replay(job, done), before, worker, rid)) as batches:
                        async for parts in batches:
                            for part in parts:
                                done += part.tokens
                            if let_others is not None and len(done) > before:
                                let_others()
                            yield parts
                            waiting_since = self._clock()
                            if parts[-1].finish is not None:
                                return
                except PrismError as error:
                    if error.code not in NOT_STARTED:
                        losses = 1 if len(done) > before else losses + 1
                    self._judge(job, error, losses, _names(job, rid=rid, worker=worker), len(done))
                    shunned.add(worker, self._clock())

    def _judge(
        self, job: Job, error: PrismError, losses: int, names: dict[str, dict[str, str]], got: int
    ) -> None:
        """Raises what the client is told after an attempt that failed by `error`; returns where another one
        is due."""
        if not error.retry:
            log.warning("request failed: %s; %s", error.message, _remedy(error.code), extra=names)
            raise error
        if losses > self._settings.max_losses:
            log.warning(
                "request given up, it was lost %d times in a row: %s; the workers' logs say why, its client "
                "may retry",
                losses,
                error.message,
                extra=names,
            )
            raise PrismError(
                ErrorCode.ENGINE_LOST,
                f"its engine or worker was lost {losses} times in a row, last: {error.message}",
                retry=True,
            ) from error
        log.info("%s after %d tokens, routing again", error.message, got, extra=names)
        self._metrics.replayed(job.model, error.code)

    async def _find_worker(self, job: Job, shunned: Shunned, waiting_since: float, *, begun: bool) -> str:
        """A worker for `job`, waiting for one if need be; it counts as parked since `waiting_since`. One that
        has `begun`, on a worker that it was sent to, is never too many."""
        worker = self._fleet.choose(job.model, shunned.at(self._clock()), job.version)
        if worker is not None:
            return worker
        self._refuse_hopeless(job)
        with self._parking.place(job.model, waiting_since, begun=begun) as place:
            limit = min(self._clock() + self._settings.park_s, job.deadline)
            while True:
                now = self._clock()
                worker = self._fleet.choose(job.model, shunned.at(now), job.version)
                if worker is not None:
                    return worker
                self._refuse_hopeless(job)
                if now >= limit:
                    waited = now - waiting_since
                    log.warning(
                        "request failed: its model was not ready after %.0f s; `prism status` says what the "
                        "scheduler waits for",
                        waited,
                        extra=_names(job),
                    )
                    raise PrismError(
                        ErrorCode.DEADLINE_EXCEEDED,
                        f"model {job.model!r} was not ready after {waited:.0f} s; try again later",
                        retry=True,
                    )
                until = min(limit, shunned.next_change(now) or limit)
                await place.woken(until - now)

    def _refuse_hopeless(self, job: Job) -> None:
        self._registry.refuse_changed(job.model, job.version)
        self._registry.refuse_failed(job.model)

    async def _attempt(
        self, job: Job, replayed: int, worker: str, rid: str
    ) -> AsyncGenerator[list[Tokens], None]:
        settled = False
        with self._replies.open(rid, worker) as inbox:
            try:
                await self._send(job, replayed, worker, rid)
                expected = 0
                begun = False
                while True:
                    try:
                        frames = await self._next_frames(inbox, job, accepted=expected > 0, begun=begun)
                    except PrismError as error:
                        # Nobody there to be told to stop.
                        settled = error.code is ErrorCode.MOVED
                        raise
                    parts: list[Tokens] = []
                    problem: PrismError | None = None
                    for frame in frames:
                        if frame.seq < expected:
                            continue
                        if frame.seq > expected:
                            problem = _lost(expected, frame.seq, worker)
                            break
                        expected += 1
                        settled = frame.error is not None or frame.finish is not None
                        try:
                            part = _content(frame, worker)
                        except PrismError as error:
                            problem = error
                            break
                        if part is not None:
                            begun = True
                            parts.append(part)
                        if settled:
                            break
                    if parts:
                        yield parts
                    if problem is not None:
                        raise problem
                    if settled:
                        return
            finally:
                if not settled:
                    await self._cancel(job, worker, rid)

    async def _send(self, job: Job, replayed: int, worker: str, rid: str) -> None:
        request = GenerateRequest(
            rid=rid,
            model=job.model,
            input_ids=job.input_ids,
            sampling=job.sampling,
            deadline_s=max(0.0, job.deadline - self._clock()),
            gateway=self._gateway,
            top_logprobs=job.top_logprobs,
            ttft_slo_ms=job.ttft_slo_ms,
            tpot_slo_ms=job.tpot_slo_ms,
            priority=job.priority,
            replayed_tokens=replayed,
            streamed=job.streamed,
            version=job.version,
        )
        try:
            await self._bus.publish(
                subjects.request(job.model, worker), request, reply=subjects.reply(self._gateway, rid)
            )
        except (nats.errors.Error, OSError) as error:
            raise PrismError(
                ErrorCode.MOVED, f"the bus did not take the request for {worker}: {error}", retry=True
            ) from error
        log.debug("sent", extra=_names(job, rid=rid, worker=worker))
        self._fleet.sent(worker)

    async def _next_frames(self, inbox: Inbox, job: Job, *, accepted: bool, begun: bool) -> list[TokenFrame]:
        """The next frames. Raises PrismError(engine_lost) when the worker stalls.

        A worker says at once that it has a request. One without a token after that may be waiting its turn:
        as long as its model makes progress on that worker, the worker is busy, not stalled.
        """
        patience_s = self._settings.stall_s
        if not accepted:
            patience_s = min(self._settings.accept_s, patience_s)
        while True:
            progress = None if begun else self._fleet.tokens_done(job.model, inbox.worker)
            stall_at = self._clock() + patience_s
            returns = self._bus.client.stats["reconnects"]
            try:
                return await inbox.get(min(stall_at, job.deadline))
            except TimeoutError:
                if self._clock() >= job.deadline:
                    raise PrismError(
                        ErrorCode.DEADLINE_EXCEEDED, "the request's deadline passed before it was finished"
                    ) from None
                if not self._bus.client.is_connected or self._bus.client.stats["reconnects"] != returns:
                    # Nobody could be heard: what that cost is looked at once the bus is back.
                    continue
                if self._clock() - stall_at > HELD_UP_S:
                    # Told late because the gateway was held up: its frames may wait in the socket.
                    continue
                waiting = accepted and not begun
                if waiting and self._fleet.tokens_done(job.model, inbox.worker) != progress:
                    continue
                raise PrismError(
                    ErrorCode.ENGINE_LOST, f"{inbox.worker} sent nothing for {patience_s:g} s", retry=True
                ) from None

    async def _cancel(self, job: Job, worker: str, rid: str) -> None:
        names = _names(job, rid=rid, worker=worker)
        log.debug("cancelled", extra=names)
        try:
            await self._bus.publish(subjects.cancel(worker), CancelRequest(rid))
        except (nats.errors.Error, OSError) as error:
            why = error or type(error).__name__
            log.info("not told to cancel: %s", why, extra=names)

    def _refuse_oversized(self, job: Job) -> None:
        """Raises PrismError(payload_too_large) now rather than after a wait for the model."""
        longest_id, longest_bias = 8, 64
        biases = job.sampling.logit_bias or ()
        ids = len(job.input_ids) + len(job.sampling.stop_token_ids)
        if ids * longest_id + len(biases) * longest_bias < self._bus.max_payload // 2:
            return
        size = len(msgspec.json.encode((job.input_ids, job.sampling))) + 4096
        if size > self._bus.max_payload:
            raise PrismError(
                ErrorCode.PAYLOAD_TOO_LARGE,
                f"the prompt's {len(job.input_ids)} tokens, {len(job.sampling.stop_token_ids)} stop tokens "
                f"and {len(biases)} biases make a message of {size} bytes; "
                f"the bus takes {self._bus.max_payload}",
            )


def _names(job: Job, **names: str) -> dict[str, dict[str, str]]:
    return about(request=job.request, model=job.model, **names)


def _remedy(code: ErrorCode) -> str:
    """What to do about a request that failed for good."""
    match code:
        case ErrorCode.DEADLINE_EXCEEDED:
            return "`prism status` shows what is busy, --deadline-s is the time that a request has"
        case ErrorCode.MODEL_FAILED:
            return "`prism models` says why, `prism models retry` takes the model up again"
        case ErrorCode.INTERNAL | ErrorCode.BAD_MESSAGE:
            return "the worker's log says more"
        case _:
            return "its client is told, and can mend it"


def _lost(expected: int, came: int, worker: str) -> PrismError:
    return PrismError(
        ErrorCode.ENGINE_LOST, f"frames {expected} to {came - 1} from {worker} were lost", retry=True
    )


def _content(frame: TokenFrame, worker: str) -> Tokens | None:
    """What a frame brings, None if it only says that the worker lives. Raises the error that it carries."""
    if frame.error is not None:
        raise PrismError.from_body(frame.error)
    if frame.finish is not None and frame.finish.reason not in ("stop", "length"):
        raise PrismError(
            ErrorCode.ENGINE_LOST, f"{worker} ended the generation with {frame.finish.reason!r}", retry=True
        )
    if not frame.tokens and frame.finish is None:
        return None
    return Tokens(frame.tokens, frame.logprobs, frame.finish)
