"""Which images leave memory so that another fits: a decision on a snapshot."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class HeldImage:
    """One image in memory. `busy`: leased, or being written to disk. `superseded`: a checkpoint all of whose
    models are here in an engine's layout too. `last_used` in seconds of any one clock."""

    key: int
    nbytes: int
    busy: bool
    superseded: bool
    last_used: float


def choose_victims(images: Sequence[HeldImage], free_bytes: int, needed_bytes: int) -> list[int] | None:
    """Keys of the images to evict so that `needed_bytes` fit, or None if even all idle ones are too few.

    Superseded images go first, then those unused for longest. None goes in vain: one that the ones after it
    made unnecessary is spared.
    """
    missing = needed_bytes - free_bytes
    if missing <= 0:
        return []
    idle = [image for image in images if not image.busy]
    if sum(image.nbytes for image in idle) < missing:
        return None
    chosen: list[HeldImage] = []
    for image in sorted(idle, key=lambda image: (not image.superseded, image.last_used, image.key)):
        if missing <= 0:
            break
        chosen.append(image)
        missing -= image.nbytes
    spared: set[int] = set()
    # The most worth keeping comes last in the order, so it is asked first.
    for image in reversed(chosen):
        if missing + image.nbytes <= 0:
            missing += image.nbytes
            spared.add(image.key)
    return [image.key for image in chosen if image.key not in spared]
