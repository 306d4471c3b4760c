"""Which places to look at for an instance: all of them in a small cluster, in a large one those that press
least, so that the time of a plan grows about linearly with the cluster."""

from bisect import insort
from collections.abc import Callable

from prism.scheduling.placement.gpus import Gpu, Place

ALL_PLACES = 64
"""Up to so many GPUs are all looked at for a model; of more, those that press least."""


def places_within(whole: Place, tp_size: int, rank: Callable[[Gpu], float]) -> list[Place]:
    """The groups of `tp_size` GPUs of one worker to look at: aligned ones, which leave no odd GPU over,
    and the one of least rank."""
    gpus = whole.gpus
    if len(gpus) == tp_size:
        return [whole]
    if tp_size == 1:
        return [Place(whole.worker, (gpu,)) for gpu in gpus]
    if len(gpus) < tp_size:
        return []
    groups = [gpus[at : at + tp_size] for at in range(0, len(gpus) - tp_size + 1, tp_size)]
    best = tuple(sorted(gpus, key=lambda gpu: (rank(gpu), -gpu.free, gpu.id))[:tp_size])
    if best not in groups:
        groups.append(best)
    return [Place(whole.worker, group) for group in groups]


class Front:
    """Places in the order of the ranks that they had when they were last looked at; those that come up and
    have changed are put where they belong now."""

    def __init__(self, places: list[Place], rank: Callable[[Gpu], float]) -> None:
        self._rank = rank
        self._order = sorted((self._of(place), number, place) for number, place in enumerate(places))

    def _of(self, place: Place) -> float:
        gpus = place.gpus
        return self._rank(gpus[0]) if len(gpus) == 1 else max(self._rank(gpu) for gpu in gpus)

    def nearest(
        self, fits: Callable[[Place], bool], enough: int = 8, unfit: int = 8, most: int = 24
    ) -> list[Place]:
        """Those of least rank: `enough` that fit and `unfit` that don't, looking at no more than `most`."""
        order, rank = self._order, self._rank
        renewed: list[tuple[float, int, Place]] = []
        changed: list[int] = []
        found: list[Place] = []
        seen = fitting = 0
        most = min(most, len(order))
        while seen < most and fitting < enough:
            before, number, place = order[seen]
            after = rank(place.gpus[0]) if len(place.gpus) == 1 else self._of(place)
            if after > before + 1e-12 and seen + 1 < len(order) and after > order[seen + 1][0]:
                del order[seen]
                insort(order, (after, number, place), seen)
                continue
            if after != before:
                changed.append(seen)
                renewed.append((after, number, place))
            seen += 1
            if fits(place):
                fitting += 1
                found.append(place)
            elif len(found) - fitting < unfit:
                found.append(place)
        for at in reversed(changed):
            del order[at]
        for entry in renewed:
            insort(order, entry)
        return found
