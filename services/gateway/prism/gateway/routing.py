"""Which worker takes a request: a pure choice from what routes and load reports say."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prism.common.messages.load import LoadReport, ModelLoad
from prism.common.messages.models import ModelState, same_version


class ModelVersion(NamedTuple):
    """A model as a request means it: with the version whose tokens it has, empty for any."""

    model: str
    version: str


@dataclass(slots=True)
class WorkerView:
    """What a gateway knows of one worker: its last report, when that came (seconds on the gateway's clock),
    and how many requests this gateway has sent it since."""

    report: LoadReport
    heard_at: float
    sent: int = 0

    def alive(self, now: float, silence_s: float) -> bool:
        """Whether it has been heard of lately enough."""
        return now - self.heard_at <= silence_s

    @property
    def load(self) -> int:
        """Requests queued and running there, as far as known."""
        return sum(model.queued + model.running for model in self.report.models) + self.sent

    def serves(self, wanted: ModelVersion) -> bool:
        """Whether its engine of that model, as far as it has told of one, is of that version."""
        entry = self.of(wanted.model)
        return entry is None or same_version(entry.version, wanted.version)

    def of(self, model: str) -> ModelLoad | None:
        """What it reports of `model`."""
        return next((entry for entry in self.report.models if entry.model == model), None)


def choose_worker(
    serving: Iterable[str],
    workers: Mapping[str, WorkerView],
    now: float,
    *,
    silence_s: float,
    avoid: Container[str] = (),
    wanted: ModelVersion | None = None,
) -> str | None:
    """The least loaded of the workers that serve the model, None when none can be used now.

    Silent and draining workers, those in `avoid` and those whose engine is of another version than the one
    `wanted` cannot; equal loads go by name.
    """
    usable = [
        (view.load, worker)
        for worker in serving
        if worker not in avoid
        and (view := workers.get(worker)) is not None
        and view.alive(now, silence_s)
        and not view.report.draining
        and (wanted is None or view.serves(wanted))
    ]
    return min(usable)[1] if usable else None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a model cannot be served, and the seconds since the last worker that tried it failed."""

    reason: str
    age_s: float


def common_failure(model: str, workers: Sequence[WorkerView], now: float) -> Failure | None:
    """Why `model` cannot be served, if every one of these (living) workers reports it as failed."""
    reasons, ages = set(), []
    for view in workers:
        entry = view.of(model)
        if entry is None or entry.state is not ModelState.FAILED:
            return None
        reasons.add(entry.failure or "no reason given")
        ages.append(entry.state_s + now - view.heard_at)
    return Failure("; ".join(sorted(reasons)), min(ages)) if ages else None
