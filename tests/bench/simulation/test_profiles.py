"""The profiles that come with Prism, against what they are fitted from."""

import json
from importlib.resources import files
from pathlib import Path

import msgspec
import pytest

from prism.bench.calibration.fit_gpu import fit_h200, scaled_h100
from prism.bench.simulation.model_config import read_model_facts
from prism.bench.simulation.profiles import read_profile, write_profile
from prism.common.errors import PrismError
from prism.common.messages.models import Tier
from prism.scheduling.cost import GpuProfile, ModelCost, model_cost
from prism.scheduling.profiles import profile_names

pytestmark = pytest.mark.core

MEASURED = json.loads(files("prism.bench.calibration").joinpath("h200_measurements.json").read_text())


def h200_cost(model: str) -> ModelCost:
    return model_cost(read_model_facts(model, model), read_profile("h200"))


def alike(one: GpuProfile, other: GpuProfile) -> bool:
    """Whether they differ by no more than processors do in their last digits."""
    fields, others = msgspec.to_builtins(one), msgspec.to_builtins(other)
    return fields.keys() == others.keys() and all(
        value == (others[name] if isinstance(value, str) else pytest.approx(others[name]))
        for name, value in fields.items()
    )


def test_the_files_are_what_the_measurements_amount_to() -> None:
    h200 = fit_h200(MEASURED)
    assert alike(read_profile("h200"), h200)
    assert alike(read_profile("h100-80gb"), scaled_h100(h200))
    assert "SCALED, not measured" in read_profile("h100-80gb").source


@pytest.mark.parametrize("row", MEASURED["decode_steps"], ids=lambda row: row["source"])
def test_decode_steps_come_out_as_measured(row: dict[str, float]) -> None:
    step = h200_cost(str(row["model"])).decode_step_s(int(row["sequences"]), row["kv_tokens"])
    assert step == pytest.approx(row["step_s"], rel=0.02)


@pytest.mark.parametrize("row", MEASURED["first_tokens"], ids=lambda row: row["source"])
def test_first_tokens_come_out_within_a_fifth_of_what_was_measured(row: dict[str, float]) -> None:
    cost = h200_cost(str(row["model"]))
    assert cost.request_s + cost.prefill_s(int(row["prompt_tokens"])) == pytest.approx(
        row["seconds"], rel=0.2
    )


@pytest.mark.parametrize(("model", "seconds"), [("Llama-3.2-1B", 0.0504), ("Llama-3.1-8B", 0.3023)])
def test_wakes_come_out_as_measured(model: str, seconds: float) -> None:
    assert h200_cost(f"meta-llama/{model}").ready_s(Tier.DOZING) == pytest.approx(seconds, rel=0.03)


def test_every_profile_says_where_it_is_from_and_survives_a_file(tmp_path: Path) -> None:
    for name in profile_names():
        profile = read_profile(name)
        assert profile.source
        assert profile.name == name
        write_profile(profile, tmp_path / "profile.json")
        assert read_profile(str(tmp_path / "profile.json")) == profile


@pytest.mark.parametrize("content", ["{", '{"name": "x"}', '{"name": 1}'])
def test_a_broken_profile_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(PrismError, match=r"mine\.json"):
        read_profile(str(path))
