"""A demand report too large for one message travels in several, and is taken as one."""

import msgspec
import pytest

from prism.common.demand_parts import DemandParts, split
from prism.common.messages.codec import encode
from prism.common.messages.load import DemandReport, ModelDemand

pytestmark = pytest.mark.core


def report(count: int, gateway: str = "g") -> DemandReport:
    models = [ModelDemand(f"model-{number}", 1, 0.1 + number, requests=number) for number in range(count)]
    return DemandReport(gateway, models)


def names(taken: DemandReport | None) -> list[str]:
    assert taken is not None
    return [model.model for model in taken.models]


def test_a_report_that_fits_is_sent_as_it_is() -> None:
    for count in (0, 1, 10):
        whole = report(count)
        assert split(whole, len(encode(whole))) == [whole]
        assert DemandParts().take(whole) is whole


@pytest.mark.parametrize("limit", [300, 1000, 65536])
def test_parts_fit_and_come_to_the_whole(limit: int) -> None:
    whole = report(1000)
    parts = split(whole, limit)
    assert max(len(encode(part)) for part in parts) <= limit
    assert len(parts) <= 1.3 * len(encode(whole)) / (limit - 100) + 1
    receiver = DemandParts()
    *earlier, last = parts
    assert [receiver.take(part) for part in earlier] == [None] * len(earlier)
    assert receiver.take(last) == whole


def test_what_misses_a_part_is_left_out_and_the_next_report_is_taken() -> None:
    receiver = DemandParts()
    first, second, third, *_ = split(report(100), 1000)
    assert receiver.take(second) is None
    assert receiver.take(first) is None
    assert receiver.take(third) is None
    last = msgspec.structs.replace(second, parts=2)
    assert receiver.take(last) is None
    parts = split(report(50), 1000)
    assert names([receiver.take(part) for part in parts][-1]) == names(report(50))


def test_a_whole_report_takes_the_place_of_one_that_has_begun() -> None:
    receiver = DemandParts()
    first, second, *rest = split(report(100), 1000)
    receiver.take(first)
    assert receiver.take(report(0)) == report(0)
    assert [receiver.take(part) for part in (second, *rest)] == [None] * (1 + len(rest))


def test_gateways_do_not_mix() -> None:
    receiver = DemandParts()
    ours, others = split(report(30), 1000), split(report(30, "h"), 1000)
    taken = [receiver.take(part) for pair in zip(ours, others, strict=True) for part in pair]
    assert taken[:-2] == [None] * (len(taken) - 2)
    assert taken[-2:] == [report(30), report(30, "h")]
