"""The models that this gateway offers: what their operators asked for and what their folders say."""

from dataclasses import dataclass

from prism.common import subjects
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.models import ModelFacts, ModelSpec, same_version
from prism.common.mirror import BucketMirror
from prism.gateway.fleet import Fleet
from prism.gateway.obstacles import Obstacles

FAILED_FOR_S = 15.0
"""How long requests for a failed model are refused at once; the first one after that has it tried again."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """`state` is ready, sleeping (a request wakes it), unavailable (as things are, none does) or failed;
    `reason` says why it is not ready. `devices` are the kinds of hardware that serve it now: what a
    simulated one says, no model has said."""

    name: str
    state: str
    reason: str | None
    context_length: int | None
    devices: tuple[str, ...] = ()


class Registry:
    """Reads the two mirrors of the bucket `prism_models` together with the fleet and what the scheduler
    says."""

    def __init__(
        self,
        specs: BucketMirror[ModelSpec],
        facts: BucketMirror[ModelFacts],
        fleet: Fleet,
        obstacles: Obstacles,
    ) -> None:
        self._specs = specs
        self._facts = facts
        self._fleet = fleet
        self._obstacles = obstacles

    @property
    def ready(self) -> bool:
        """Whether all that the registry held at the start has been read."""
        return self._specs.ready.is_set() and self._facts.ready.is_set()

    def names(self) -> list[str]:
        """All models, sorted."""
        return sorted(spec.model_name for spec in self._specs.values.values())

    def only_model(self) -> str:
        """The one model there is. Raises PrismError(invalid_request) when there are more, or none."""
        names = self.names()
        if len(names) != 1:
            known = ", ".join(names) or "none"
            raise PrismError(
                ErrorCode.INVALID_REQUEST,
                f"model may be left out only where one model is registered; here: {known}",
                param="model",
            )
        return names[0]

    def spec(self, name: str) -> ModelSpec:
        """The spec of `name`. Raises PrismError(model_not_found)."""
        spec = self._specs.values.get(subjects.spec_key(name))
        if spec is None or spec.model_name != name:
            known = ", ".join(self.names()[:20]) or "none"
            raise PrismError(
                ErrorCode.MODEL_NOT_FOUND,
                f"no model {name!r} is registered; registered: {known}",
                param="model",
            )
        return spec

    def facts(self, name: str) -> ModelFacts:
        """What is known of `name`. Raises PrismError: model_failed when its folder cannot be used, or
        store_unavailable when no model store has read it yet."""
        facts = self._facts.values.get(subjects.facts_key(name))
        if facts is not None and facts.error is not None:
            raise PrismError(
                ErrorCode.MODEL_FAILED, f"model {name!r} cannot be served: {facts.error}", param="model"
            )
        if facts is None or not facts.tokenizer or facts.context_length <= 0:
            raise PrismError(
                ErrorCode.STORE_UNAVAILABLE,
                f"model {name!r} is registered, but no model store has read its folder yet; try again soon",
                retry=True,
                param="model",
            )
        return facts

    def refuse_changed(self, name: str, version: str) -> None:
        """Raises PrismError(moved, retry) when `name` is of another version by now: a request that was read
        for `version` can't go on with it."""
        facts = self._facts.values.get(subjects.facts_key(name))
        if facts is not None and not same_version(facts.version, version):
            raise PrismError(
                ErrorCode.MOVED,
                f"the files of model {name!r} were changed while the request waited or ran; ask again for an "
                "answer of the new version",
                retry=True,
                param="model",
            )

    def refuse_failed(self, name: str) -> None:
        """Raises PrismError(model_failed) when every worker reports `name` as failed, one of them since less
        than FAILED_FOR_S, and none serves it."""
        failure = self._fleet.failure(name)
        if failure is not None and failure.age_s < FAILED_FOR_S:
            raise PrismError(
                ErrorCode.MODEL_FAILED,
                f"model {name!r} failed on every worker: {failure.reason}",
                param="model",
            )

    def status(self, name: str) -> ModelStatus:
        """How `name` stands. Raises PrismError(model_not_found)."""
        self.spec(name)
        facts = self._facts.values.get(subjects.facts_key(name))
        length = facts.context_length if facts is not None and facts.context_length > 0 else None
        try:
            self.facts(name)
        except PrismError as error:
            state = "failed" if error.code is ErrorCode.MODEL_FAILED else "sleeping"
            return ModelStatus(name, state, error.message, length)
        failure = self._fleet.failure(name)
        if failure is not None:
            reason = f"{failure.reason}; `prism models retry` or a later request tries it again"
            return ModelStatus(name, "failed", reason, length)
        if self._fleet.choose(name, version=facts.version if facts is not None else "") is not None:
            return ModelStatus(name, "ready", None, length, self._fleet.devices(name))
        if (obstacle := self._obstacles.of(name)) is not None:
            return ModelStatus(name, "unavailable", obstacle, length)
        return ModelStatus(name, "sleeping", "the next request wakes it", length)
