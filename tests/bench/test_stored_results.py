"""What the stored results promise to whoever reads them, whichever run they are of."""

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.core

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def rows(name: str) -> dict[str, dict[str, Any]]:
    content = json.loads((RESULTS / f"{name}.json").read_text())
    return {row["figure"]: row for row in content["rows"]}


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_a_missed_target_says_why(file: Path) -> None:
    for row in rows(file.stem).values():
        assert (row["met"] is None) == (row["target"] is None), row
        if row["met"] is False:
            assert row["note"], row


@pytest.mark.parametrize(
    "figure",
    [
        *(f"added_{share}_ms_{streams}" for share in ("p50", "p99") for streams in (1, 64, 256)),
        "tokens_per_s_one_token_frames",
        "requests_per_core",
        "requests_per_core_over_litellm",
    ],
)
def test_the_gateway_has_the_figure(figure: str) -> None:
    row = rows("gateway")[figure]
    assert row["value"] is not None or row["note"]


def test_the_gateway_has_a_figure_with_coalesced_frames() -> None:
    coalesced = [
        row for figure, row in rows("gateway").items() if figure.startswith("tokens_per_s_coalesced")
    ]
    assert coalesced
    assert all(row["value"] > 0 for row in coalesced)


@pytest.mark.parametrize("figure", ["requests_lost", "requests_doubled", "leftovers"])
def test_chaos_lost_nothing_and_left_nothing(figure: str) -> None:
    assert rows("chaos")[figure]["value"] == 0


def test_chaos_broke_no_stream_whose_gateway_lived() -> None:
    # A file of before this was counted does not have it.
    assert rows("chaos").get("streams_broken", {"value": 0})["value"] == 0
