"""What policies differ in: which of the ways to have a model come up they prefer, and who sleeps first."""

import enum
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeGuard

from prism.scheduling.placement.gpus import Gpu, Instance, Place
from prism.scheduling.placement.pressure import Work
from prism.scheduling.placement.snapshot import ClusterSnapshot
from prism.scheduling.placement.wants import Wanted

if TYPE_CHECKING:
    from prism.scheduling.placement.prospects import Manners
    from prism.scheduling.placement.reconcile import Reconciler


class Step(enum.IntEnum):
    """How a model can come to a place, gentlest first."""

    FREE = 0
    AWAIT_IDLE = 1
    EVICT_IDLE = 2
    AWAIT_BUSY = 3
    EVICT_BUSY = 4
    AWAIT_RIPE = 5


class Option(NamedTuple):
    """One place for a model, what it takes to have it there, and what each of its GPUs must give."""

    place: Place
    step: Step
    need: int
    victims: tuple[Instance, ...] = ()

    def pressure_with(self, work: Work, nbytes: int) -> float:
        """The highest pressure among its GPUs with one more instance, whose weights and context take
        `nbytes`, and without the victims."""
        gpus = self.place.gpus
        if not self.victims:
            return (
                gpus[0].with_work(work, nbytes)
                if len(gpus) == 1
                else max([gpu.with_work(work, nbytes) for gpu in gpus])
            )
        highest = 0.0
        for gpu in self.place.gpus:
            gone = [victim for victim in self.victims if gpu in victim.place.gpus]
            for victim in gone:
                gpu.lose(victim.work, victim.resident.weights_bytes)
            highest = max(highest, gpu.with_work(work, nbytes))
            for victim in gone:
                gpu.take(victim.work, victim.resident.weights_bytes)
        return highest


class Judge(Protocol):
    """What policies differ in."""

    def gpu_rank(self, gpu: Gpu) -> float:
        """Which GPUs to look at first, least first."""
        ...

    def option_rank(self, wanted: Wanted, option: Option) -> tuple[float, ...]:
        """Which of the options to take, least first."""
        ...

    def victim_rank(self, instance: Instance) -> tuple[float, ...]:
        """Who of the idle sleeps first, least first."""
        ...

    def refuses(self, wanted: Wanted, option: Option) -> str | None:
        """Why an option is not taken now, None if it may be."""
        ...

    def spares(self, instance: Instance) -> bool:
        """Whether an idle one is left alone as long as a busy one is."""
        ...


class Judging(Protocol):
    """A policy that weighs places: what explains it."""

    @property
    def manners(self) -> "Manners":
        """How gently it puts models to sleep."""
        ...

    def foresees(self, snapshot: ClusterSnapshot) -> ClusterSnapshot:
        """The snapshot that it plans from: with what is to come, as far as it counts on that."""
        ...

    def judge(self, reconciler: "Reconciler") -> Judge:
        """Its judge, for one plan."""
        ...


def has_judge(policy: object) -> TypeGuard[Judging]:
    """Whether a policy weighs places."""
    return hasattr(policy, "judge")
