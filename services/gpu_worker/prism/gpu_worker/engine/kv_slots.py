"""Free KV slots taken from kvcached ahead of need, so that a decode step's allocation is a slice of a tensor.

kvcached counts slots in Python, and its SGLang allocator copies their numbers from pageable memory at every
step, which waits for the stream: as SGLang orders its streams, for the step before, which is then no longer
overlapped with. A small model's step takes a millisecond, all of it Python: there this was 7 % (docs/gpu.md).
To say how many are used it adds up its pages, of which a full cache has a hundred.
"""

import time
from typing import Any

import torch

from prism.gpu_worker.engine.device_copies import on_device

STEPS_AHEAD = 16
MOST_AHEAD = 512
COUNTED_FOR_S = 0.02


class KvSlots:
    """Takes the place of four methods of `allocator`, SGLang's, over `pool`, kvcached's manager.

    Slots taken ahead count as free, here and for SGLang; kvcached counts them as used (`ahead`).
    """

    def __init__(self, allocator: Any, pool: Any) -> None:
        self._pool = pool
        self._size = int(allocator.size)
        self._device = allocator.device
        self._numbers: list[int] = []
        self._on_device = torch.empty(0, dtype=torch.int64)
        self._next = 0
        self._pool_free = 0
        self._pool_used: int | None = None
        self._counted_at = float("-inf")
        self._pass_free, self._pass_clear = allocator.free, allocator.clear
        allocator.alloc, allocator.available_size = self.alloc, self.available_size
        allocator.free, allocator.clear = self.free, self.clear

    @property
    def ahead(self) -> int:
        """Slots that kvcached counts as used, and nobody uses."""
        return len(self._numbers) - self._next

    @property
    def used(self) -> int:
        """Slots that are used, that for padding too."""
        if self._pool_used is None:
            self._pool_used = int(self._pool._get_num_alloced_blocks())
        return self._pool_used - self.ahead

    def changed(self) -> None:
        """Have everything counted anew: kvcached was spoken to."""
        self._counted_at = float("-inf")
        self._pool_used = None

    def available_size(self) -> int:
        """Slots that can be had, by a count that is COUNTED_FOR_S old at most where others changed it."""
        now = time.monotonic()
        if now - self._counted_at > COUNTED_FOR_S:
            self._pool_free, self._counted_at = int(self._pool.available_size()), now
        return min(self._pool_free + self.ahead, self._size)

    def alloc(self, count: int) -> torch.Tensor | None:
        """The numbers (count,) of free slots, int64 on the device once its stream comes to it; None where
        there are fewer."""
        if count > self.ahead and not self._take(count - self.ahead, min(count * STEPS_AHEAD, MOST_AHEAD)):
            return None
        begin, self._next = self._next, self._next + count
        return self._on_device[begin : self._next]

    def _take(self, missing: int, more: int) -> bool:
        self.changed()
        free = int(self._pool.available_size())
        if free < missing:
            return False
        taken = self._pool.alloc(min(free, missing + more)) or self._pool.alloc(missing)
        if taken is None:
            return False
        fresh = on_device(taken, self._device)
        left = self._on_device[self._next :]
        self._on_device = torch.cat([left, fresh]) if self.ahead else fresh
        self._numbers = self._numbers[self._next :] + taken
        self._next = 0
        return True

    def free(self, index: Any) -> None:
        """Slots that are used no more."""
        self.changed()
        self._pass_free(index)

    def clear(self) -> None:
        """Nothing is used any more."""
        self.forget()
        self._pass_clear()

    def give_back(self) -> None:
        """Have kvcached count no more slots than are used."""
        left = self._numbers[self._next :]
        self.forget()
        if left:
            self._pool.free(left)

    def forget(self) -> None:
        """kvcached has been cleared, or will be: what was taken ahead is no longer ours."""
        self._numbers, self._next = [], 0
        self._on_device = torch.empty(0, dtype=torch.int64)
        self.changed()
