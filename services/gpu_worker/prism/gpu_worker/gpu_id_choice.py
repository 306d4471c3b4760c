"""Which GPU ids a worker may claim: the lowest that are free, once it is certain that they are.

A claim is an entry that expires; until then, that of a worker that died looks like that of a living one. What
tells them apart is that a living worker renews: the revision of its entry changes. To pass over an entry that
nobody has been seen to write would let ids drift upwards with each worker that is replaced.
"""

from collections.abc import Mapping

Revisions = Mapping[int, int]
"""The revision of each claim that another worker has, by GPU id; an id that is not there is free."""


def is_living(gpu_id: int, first_look: Revisions, now: Revisions) -> bool:
    """Whether the claim on `gpu_id` was made or renewed since `first_look`."""
    return gpu_id in now and now[gpu_id] != first_look.get(gpu_id)


def lowest_free_block(count: int, first_look: Revisions, now: Revisions) -> range | None:
    """The lowest `count` consecutive ids of which no living worker has any, to be claimed now.

    None while one of them may yet turn out to be free: its claim was neither renewed nor has it expired.
    """
    first = 0
    while True:
        block = range(first, first + count)
        living = [gpu_id for gpu_id in block if is_living(gpu_id, first_look, now)]
        if not living:
            return None if any(gpu_id in now for gpu_id in block) else block
        first = living[-1] + 1
