"""What models will generate, foreseen from what their requests generated so far."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.scheduling.placement.test_promises import view

from prism.common.messages.models import ModelState
from prism.scheduling.placement.expected_load import UNKNOWN_TOKENS, with_expected_load
from prism.scheduling.placement.snapshot import ClusterSnapshot, Demand, ModelView, ResidentModel, WorkerView
from prism.scheduling.traffic import Traffic

pytestmark = pytest.mark.core


def asked(name: str, arrivals_per_s: float, output_tokens_per_s: float) -> ModelView:
    found = Traffic(arrivals_per_s, 300 * arrivals_per_s, output_tokens_per_s, 1.0)
    return msgspec.structs.replace(view(name, 1), traffic=found)


def cluster(
    views: list[ModelView], queued: dict[str, int] | None = None, parked: dict[str, int] | None = None
) -> ClusterSnapshot:
    residents = {
        name: ResidentModel(ModelState.ACTIVE, queued=count) for name, count in (queued or {}).items()
    }
    return ClusterSnapshot(
        (WorkerView("w", "node", "cuda", (0,), 10**11, 0, models=residents),),
        {each.spec.model_name: each for each in views},
        {name: Demand(count, 1.0) for name, count in (parked or {}).items()},
    )


def expected(snapshot: ClusterSnapshot, name: str) -> Traffic:
    return with_expected_load(snapshot).models[name].traffic


def test_a_model_whose_requests_all_wait_will_generate_what_others_do() -> None:
    # In the last minute 60 requests, none of which has generated anything.
    snapshot = cluster([asked("waits", 1.0, 0.0), asked("serves", 1.0, 150.0)], queued={"waits": 60})
    assert expected(snapshot, "waits").output_tokens_per_s == pytest.approx(150.0)


def test_its_own_requests_count_as_soon_as_they_have_ended() -> None:
    views = [asked("waits", 1.0, 10.0), asked("serves", 1.0, 150.0)]
    snapshot = cluster(views, queued={"waits": 20})
    # 40 have ended, with 15 tokens each.
    assert 15.0 < expected(snapshot, "waits").output_tokens_per_s < 25.0


def test_with_nothing_known_of_any_model_a_usual_length_is_assumed() -> None:
    snapshot = cluster([asked("new", 0.5, 0.0)], parked={"new": 30})
    assert expected(snapshot, "new").output_tokens_per_s == pytest.approx(0.5 * UNKNOWN_TOKENS)


def test_parked_requests_are_asked_for_before_anybody_has_counted_them() -> None:
    snapshot = cluster([asked("new", 0.0, 0.0)], parked={"new": 6})
    assert expected(snapshot, "new").arrivals_per_s == pytest.approx(0.1)


def test_models_with_nothing_under_way_stay_as_measured() -> None:
    snapshot = cluster([asked("idle", 1.0, 50.0)])
    assert with_expected_load(snapshot) is snapshot


@given(
    st.lists(
        st.tuples(st.floats(0, 20), st.floats(0, 5000), st.integers(0, 500), st.integers(0, 500)),
        min_size=1,
        max_size=5,
    )
)
def test_never_less_than_measured(drawn: list[tuple[float, float, int, int]]) -> None:
    views = [asked(f"m{place}", row[0], row[1]) for place, row in enumerate(drawn)]
    snapshot = cluster(
        views,
        {f"m{place}": row[2] for place, row in enumerate(drawn)},
        {f"m{place}": row[3] for place, row in enumerate(drawn)},
    )
    for name, before in snapshot.models.items():
        after = expected(snapshot, name)
        assert after.arrivals_per_s >= before.traffic.arrivals_per_s
        assert after.output_tokens_per_s >= before.traffic.output_tokens_per_s
