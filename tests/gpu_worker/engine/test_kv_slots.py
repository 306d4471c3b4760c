"""KV slots taken ahead from kvcached, which is stood in for by its rule: it hands out free numbers."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prism.gpu_worker.engine import kv_slots
from prism.gpu_worker.engine.kv_slots import KvSlots

pytestmark = pytest.mark.core

SIZE = 200


class Pool:
    """kvcached's manager: slot 0 is for padding."""

    def __init__(self) -> None:
        self.free_numbers = list(range(1, SIZE + 1))
        self.calls = 0
        self.counts = 0

    def _get_num_alloced_blocks(self) -> int:
        self.counts += 1
        return SIZE + 1 - len(self.free_numbers)

    def available_size(self) -> int:
        return len(self.free_numbers)

    def alloc(self, count: int) -> list[int] | None:
        self.calls += 1
        if count > len(self.free_numbers):
            return None
        taken, self.free_numbers = self.free_numbers[:count], self.free_numbers[count:]
        return taken

    def free(self, numbers: list[int]) -> None:
        assert not set(numbers) & set(self.free_numbers), "freed twice"
        self.free_numbers += numbers


class Allocator:
    """SGLang's, as kvcached's patch leaves it."""

    size = SIZE
    device = "cpu"

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def alloc(self, count: int) -> Any:
        raise AssertionError("ours is in its place")

    def available_size(self) -> int:
        raise AssertionError("ours is in its place")

    def free(self, index: torch.Tensor) -> None:
        self._pool.free(index.tolist())

    def clear(self) -> None:
        self._pool.free_numbers = list(range(1, SIZE + 1))


def made() -> tuple[Allocator, Pool, KvSlots]:
    pool = Pool()
    allocator = Allocator(pool)
    return allocator, pool, KvSlots(allocator, pool)


def test_decode_steps_ask_kvcached_once_in_many() -> None:
    allocator, pool, slots = made()
    steps = [allocator.alloc(2) for _ in range(17)]
    assert pool.calls == 1
    assert torch.cat(steps).tolist() == list(range(1, 35))
    assert steps[0].dtype == torch.int64
    assert slots.ahead == 0
    assert allocator.available_size() == SIZE - 34


def test_used_slots_are_counted_by_kvcached_once_after_each_change_of_its_own() -> None:
    allocator, pool, slots = made()
    assert slots.used == 1, "the one for padding"
    for step in range(1, 17):
        allocator.alloc(2)
        assert slots.used == 1 + 2 * step
    assert pool.counts == 2
    allocator.free(torch.tensor([1, 2]))
    assert slots.used == 31
    slots.give_back()
    assert slots.used == 31
    allocator.clear()
    assert slots.used == 1


def test_the_last_slots_can_be_had_and_no_more() -> None:
    allocator, _, _ = made()
    assert len(allocator.alloc(SIZE - 1)) == SIZE - 1
    assert allocator.alloc(2) is None
    assert len(allocator.alloc(1)) == 1
    assert allocator.alloc(1) is None


def test_what_was_taken_ahead_goes_back() -> None:
    allocator, pool, slots = made()
    used = allocator.alloc(3)
    assert slots.ahead > 0
    slots.give_back()
    assert slots.ahead == 0
    assert sorted(pool.free_numbers + used.tolist()) == list(range(1, SIZE + 1))


def test_a_cleared_pool_owes_nothing() -> None:
    allocator, pool, slots = made()
    allocator.alloc(3)
    allocator.clear()
    slots.give_back()
    assert len(pool.free_numbers) == SIZE


@given(st.lists(st.integers(-40, 60), max_size=60))
def test_no_slot_has_two_users_and_none_is_lost(steps: list[int]) -> None:
    """Positive: so many are wanted; negative: the oldest users of so many free them."""
    allocator, pool, slots = made()
    used: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kv_slots, "COUNTED_FOR_S", 3600.0)
        for step in steps:
            if step < 0 and used:
                freed, used = used[:-step], used[-step:]
                allocator.free(torch.tensor(freed, dtype=torch.int64))
            elif step > 0:
                room = allocator.available_size()
                got = allocator.alloc(step)
                assert (got is None) == (step > room)
                used += [] if got is None else got.tolist()
            assert len(set(used)) == len(used)
            assert allocator.available_size() == SIZE - len(used)
            assert len(pool.free_numbers) + slots.ahead + len(used) == SIZE
