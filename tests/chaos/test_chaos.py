"""The short form of `make chaos`: some faults under traffic, on the whole system with two of each service."""

from pathlib import Path

import pytest
from tests.chaos.campaign import learn_answers, run_campaign
from tests.chaos.faults import FAULTS, SHORT
from tests.chaos.stage import prompts_of, stage

pytestmark = pytest.mark.engine


async def test_no_request_is_lost_or_doubled_whatever_dies(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    models = list(tiny_models.values())
    faults = [fault for fault in FAULTS if fault.name in SHORT]
    assert len(faults) == len(SHORT)
    async with stage(tmp_path, models, tmp_path / "services.log") as running:
        questions = await learn_answers(running.gateways()[0], prompts_of(models))
        reports = await run_campaign(running, faults, questions, seed=7)
    assert all(report.requests > 0 for report in reports)
    assert [report for report in reports if not report.clean] == []
