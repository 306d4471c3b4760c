"""The choice of GPU ids: lowest first, never one of a living worker, patient with one that may be dead."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prism.gpu_worker.gpu_id_choice import Revisions, is_living, lowest_free_block

pytestmark = pytest.mark.core

TTL = 3
CLAIMS = st.dictionaries(st.integers(0, 5), st.integers(1, 4))


@pytest.mark.parametrize(
    ("count", "first_look", "now", "block"),
    [
        (1, {}, {}, range(1)),
        (1, {0: 5}, {0: 5}, None),
        (1, {0: 5}, {0: 6}, range(1, 2)),
        (1, {}, {0: 6}, range(1, 2)),
        (1, {0: 5}, {}, range(1)),
        (1, {0: 5, 1: 3}, {0: 6, 1: 3}, None),
        (2, {0: 5}, {0: 6}, range(1, 3)),
        (2, {1: 5}, {1: 5}, None),
        (2, {1: 5}, {1: 6}, range(2, 4)),
        (2, {}, {0: 1, 3: 2}, range(1, 3)),
    ],
)
def test_the_lowest_ids_are_claimed_once_it_is_certain_that_they_are_free(
    count: int, first_look: Revisions, now: Revisions, block: range | None
) -> None:
    assert lowest_free_block(count, first_look, now) == block


@given(st.integers(1, 3), CLAIMS, CLAIMS)
def test_what_is_chosen_is_free_and_all_below_it_is_used_by_the_living(
    count: int, first_look: Revisions, now: Revisions
) -> None:
    block = lowest_free_block(count, first_look, now)
    if block is None:
        assert any(not is_living(gpu_id, first_look, now) for gpu_id in now)
        return
    assert not set(block) & set(now)
    for first in range(block.start):
        assert any(is_living(gpu_id, first_look, now) for gpu_id in range(first, first + count))


class Bucket:
    """The claims: made only where none is, gone when not renewed for TTL ticks."""

    def __init__(self) -> None:
        self.entries: dict[int, tuple[int, int, int]] = {}
        self._revision = 0
        self._now = 0

    def others(self, worker: int) -> Revisions:
        return {gpu: revision for gpu, (owner, revision, _) in self.entries.items() if owner != worker}

    def create(self, gpu_id: int, worker: int) -> bool:
        if gpu_id in self.entries:
            return False
        self._write(gpu_id, worker)
        return True

    def renew(self, worker: int) -> None:
        for gpu_id, (owner, _, _) in list(self.entries.items()):
            if owner == worker:
                self._write(gpu_id, worker)

    def tick(self) -> None:
        self._now += 1
        self.entries = {gpu: entry for gpu, entry in self.entries.items() if self._now - entry[2] < TTL}

    def _write(self, gpu_id: int, worker: int) -> None:
        self._revision += 1
        self.entries[gpu_id] = (worker, self._revision, self._now)


class ModelledWorker:
    """A worker that wants `count` ids; looking and claiming are steps of their own, so that others come
    in between."""

    def __init__(self, number: int, count: int, bucket: Bucket) -> None:
        self.number = number
        self.count = count
        self.ids: list[int] = []
        self._bucket = bucket
        self._first_look = bucket.others(number)
        self._chosen: range | None = None

    def look(self) -> None:
        self._chosen = lowest_free_block(self.count, self._first_look, self._bucket.others(self.number))

    def claim(self) -> None:
        if self.ids or self._chosen is None:
            return
        own = {gpu for gpu, entry in self._bucket.entries.items() if entry[0] == self.number}
        for gpu_id in own.difference(self._chosen):
            del self._bucket.entries[gpu_id]
        if all(gpu in own or self._bucket.create(gpu, self.number) for gpu in self._chosen):
            self.ids = list(self._chosen)
        self._chosen = None


class ClaimsMachine(RuleBasedStateMachine):
    """Workers come, look, claim, renew as they should, and die at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.bucket = Bucket()
        self.workers: list[ModelledWorker] = []
        self.started = 0

    @rule(count=st.integers(1, 2))
    def start(self, count: int) -> None:
        self.started += 1
        self.workers.append(ModelledWorker(self.started, count, self.bucket))

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.workers)).look()

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.workers)).claim()

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        self.workers.remove(data.draw(st.sampled_from(self.workers)))

    @rule()
    def pass_time(self) -> None:
        for worker in self.workers:
            self.bucket.renew(worker.number)
        self.bucket.tick()

    @invariant()
    def no_id_has_two_living_holders(self) -> None:
        held = [gpu_id for worker in self.workers for gpu_id in worker.ids]
        assert len(held) == len(set(held))

    @invariant()
    def holders_have_as_many_ids_as_they_want_in_a_row(self) -> None:
        for worker in self.workers:
            if worker.ids:
                assert worker.ids == list(range(worker.ids[0], worker.ids[0] + worker.count))

    def teardown(self) -> None:
        """Everybody who waits gets ids in the end."""
        for _ in range(TTL + 1):
            self.pass_time()
            for _ in self.workers:
                for worker in self.workers:
                    worker.look()
                    worker.claim()
        assert all(worker.ids for worker in self.workers)


TestClaims = ClaimsMachine.TestCase
TestClaims.settings = settings(max_examples=60, stateful_step_count=30)


@given(st.integers(1, 6), st.data())
def test_who_replaces_a_dead_worker_gets_its_id_and_no_id_is_above_those_that_are_needed(
    workers: int, data: st.DataObject
) -> None:
    bucket = Bucket()
    living = [ModelledWorker(number, 1, bucket) for number in range(workers)]
    next_number = workers

    def until_all_have_ids() -> None:
        for _ in range(TTL * len(living) + 1):
            for worker in data.draw(st.permutations(living)):
                worker.look()
                worker.claim()
                bucket.renew(worker.number)
            bucket.tick()

    until_all_have_ids()
    for _ in range(3):
        dead = data.draw(st.sampled_from(living))
        living.remove(dead)
        replacement = ModelledWorker(next_number, 1, bucket)
        next_number += 1
        living.append(replacement)
        until_all_have_ids()
        assert replacement.ids == dead.ids
    assert sorted(gpu_id for worker in living for gpu_id in worker.ids) == list(range(workers))
