"""The ledger: promises of memory never exceed what there is."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from prism.common.errors import ErrorCode, PrismError
from prism.scheduling.ledger import MemoryLedger, Parts

pytestmark = pytest.mark.core

LIMIT = 1000
OWNERS = st.sampled_from(["a", "b", "c"])
BYTES = st.integers(0, 600)


def test_reservations_add_up_and_come_back() -> None:
    ledger = MemoryLedger(LIMIT)
    ledger.reserve("a", weights=300, kv=100)
    assert ledger.reserve("a", fixed=50) == Parts(weights=300, kv=100, fixed=50)
    assert (ledger.reserved_bytes, ledger.free_bytes) == (450, 550)
    assert ledger.shrink("a", kv=60).kv == 40
    assert ledger.release("a").total == 390
    assert ledger.reserved_bytes == 0
    assert ledger.snapshot().owners == {}


def test_a_refusal_says_who_holds_what_and_changes_nothing() -> None:
    ledger = MemoryLedger(1_000_000_000)
    ledger.reserve("llama", weights=700_000_000, kv=100_000_000)
    before = ledger.snapshot()
    with pytest.raises(PrismError) as caught:
        ledger.reserve("qwen", weights=150_000_000, kv=100_000_000)
    assert caught.value.code is ErrorCode.OUT_OF_MEMORY
    assert caught.value.retry
    for told in (
        "qwen",
        "250.0 MB",
        "200.0 MB of 1000.0 MB",
        "llama 800.0 MB",
        "weights 700.0 MB",
        "KV 100.0 MB",
    ):
        assert told in caught.value.message
    assert ledger.snapshot() == before


def test_resize_sets_what_an_owner_holds_whether_more_or_less() -> None:
    ledger = MemoryLedger(LIMIT)
    ledger.reserve("a", weights=900)
    ledger.resize("a", weights=1000)
    ledger.resize("a", weights=400, kv=100)
    assert ledger.held("a") == Parts(weights=400, kv=100)
    with pytest.raises(PrismError):
        ledger.resize("a", weights=1001)
    assert ledger.reserved_bytes == 500


def test_giving_back_more_than_is_held_is_an_error_of_the_caller() -> None:
    ledger = MemoryLedger(LIMIT)
    ledger.reserve("a", kv=10)
    with pytest.raises(ValueError, match="a holds"):
        ledger.shrink("a", kv=11)
    with pytest.raises(ValueError, match="negative"):
        ledger.reserve("a", kv=-1)
    assert ledger.reserved_bytes == 10


class LedgerMachine(RuleBasedStateMachine):
    """Any sequence of calls, against a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = MemoryLedger(LIMIT)
        self.held: dict[str, Parts] = {}

    def _now_holds(self, owner: str, wanted: Parts, succeeded: bool) -> None:
        others = sum(parts.total for name, parts in self.held.items() if name != owner)
        assert succeeded == (others + wanted.total <= LIMIT)
        if succeeded:
            self.held[owner] = wanted

    @rule(owner=OWNERS, weights=BYTES, kv=BYTES, fixed=BYTES)
    def reserve(self, owner: str, weights: int, kv: int, fixed: int) -> None:
        wanted = self.held.get(owner, Parts()) + Parts(weights, kv, fixed)
        try:
            self.ledger.reserve(owner, weights=weights, kv=kv, fixed=fixed)
        except PrismError:
            self._now_holds(owner, wanted, False)
        else:
            self._now_holds(owner, wanted, True)

    @rule(owner=OWNERS, weights=BYTES, kv=BYTES)
    def resize(self, owner: str, weights: int, kv: int) -> None:
        try:
            self.ledger.resize(owner, weights=weights, kv=kv)
        except PrismError:
            self._now_holds(owner, Parts(weights, kv), False)
        else:
            self._now_holds(owner, Parts(weights, kv), True)

    @rule(owner=OWNERS, kv=BYTES)
    def shrink(self, owner: str, kv: int) -> None:
        held = self.held.get(owner, Parts())
        if kv > held.kv:
            with pytest.raises(ValueError, match="holds"):
                self.ledger.shrink(owner, kv=kv)
        else:
            self.held[owner] = self.ledger.shrink(owner, kv=kv)
            assert self.held[owner] == held - Parts(kv=kv)

    @rule(owner=OWNERS)
    def release(self, owner: str) -> None:
        assert self.ledger.release(owner) == self.held.pop(owner, Parts())

    @invariant()
    def never_more_than_the_limit(self) -> None:
        snapshot = self.ledger.snapshot()
        assert snapshot.reserved_bytes == sum(parts.total for parts in snapshot.owners.values()) <= LIMIT
        assert snapshot.owners == {owner: parts for owner, parts in self.held.items() if parts.total}


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=30)
