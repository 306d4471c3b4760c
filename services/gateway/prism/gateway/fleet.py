"""The workers as this gateway sees them: mirrored routes and load reports, kept up to date by events."""

from collections.abc import Callable, Collection

from prism.common.messages.load import LoadReport
from prism.common.messages.placement import Route
from prism.gateway.routing import Failure, ModelVersion, WorkerView, choose_worker, common_failure


class Fleet:
    """`clock` gives seconds. `on_change` is called after each change that may make a model servable."""

    def __init__(self, clock: Callable[[], float], silence_s: float, on_change: Callable[[], None]) -> None:
        self._clock = clock
        self._silence_s = silence_s
        self._on_change = on_change
        self._routes: dict[str, Route] = {}
        self._serving: dict[str, set[str]] = {}
        self._workers: dict[str, WorkerView] = {}

    def on_route(self, key: str, route: Route | None) -> None:
        """A route appeared, or (None) went away."""
        old = self._routes.pop(key, None)
        if old is not None:
            self._serving[old.model].discard(old.worker)
        if route is not None:
            self._routes[key] = route
            self._serving.setdefault(route.model, set()).add(route.worker)
        self._on_change()

    def on_load(self, report: LoadReport) -> None:
        """A worker reported."""
        self._workers[report.worker] = WorkerView(report, self._clock())
        self._on_change()

    def sent(self, worker: str) -> None:
        """A request was sent to `worker`; counts as its load until its next report."""
        if worker in self._workers:
            self._workers[worker].sent += 1

    def choose(self, model: str, avoid: Collection[str] = (), version: str = "") -> str | None:
        """The worker for the next request of `model` in this version, any for an empty one; None when there
        is none."""
        return choose_worker(
            self._serving.get(model, ()),
            self._workers,
            self._clock(),
            silence_s=self._silence_s,
            avoid=avoid,
            wanted=ModelVersion(model, version) if version else None,
        )

    def devices(self, model: str) -> tuple[str, ...]:
        """The kinds of devices of the workers that serve `model`, sorted."""
        views = [self._workers.get(worker) for worker in self._serving.get(model, ())]
        return tuple(sorted({view.report.device for view in views if view is not None}))

    def failure(self, model: str) -> Failure | None:
        """Why no worker can serve `model`, if that is what they all say and nobody does serve it."""
        if self.choose(model) is not None:
            return None
        return common_failure(model, self._alive(), self._clock())

    def tokens_done(self, model: str, worker: str) -> int | None:
        """What `worker` has done for `model` so far by its own account (tokens and engine steps, which show a
        long prefill too), None when it says nothing. Only growth means anything."""
        view = self._workers.get(worker)
        entry = view.of(model) if view else None
        return entry.prompt_tokens + entry.generated_tokens + entry.engine_steps if entry else None

    def drop_silent(self) -> list[str]:
        """Forget the workers that have gone silent, and name them."""
        now = self._clock()
        gone = [name for name, view in self._workers.items() if not view.alive(now, self._silence_s)]
        for name in gone:
            del self._workers[name]
        return gone

    def retiring(self) -> set[str]:
        """The workers whose last report said that they are about to end."""
        return {name for name, view in self._workers.items() if view.report.draining}

    def excuse_silence(self) -> None:
        """Start everybody's silence anew: a gateway that is off the bus or held up itself hears nobody."""
        now = self._clock()
        for view in self._workers.values():
            view.heard_at = now

    @property
    def heard_anyone(self) -> bool:
        """Whether at least one worker's report is fresh."""
        return bool(self._alive())

    def _alive(self) -> list[WorkerView]:
        now = self._clock()
        return [view for view in self._workers.values() if view.alive(now, self._silence_s)]
