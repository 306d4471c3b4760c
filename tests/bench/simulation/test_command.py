"""`prism simulate` and `prism plan` as their users call them."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from prism.cli.main import main

pytestmark = pytest.mark.core

EXAMPLES = Path(__file__).parents[3] / "examples" / "simulated"
TRACE, MODELS = EXAMPLES / "trace.csv", EXAMPLES / "8_models_2_gpus.json"
WHOLE = {
    "ttft_attainment",
    "tpot_attainment",
    "both_attainment",
    "goodput_rps",
    "p50_ttft_ms",
    "p99_ttft_ms",
    "p50_tpot_ms",
    "p99_tpot_ms",
    "activations",
    "migrations",
    "gpu_seconds",
}


def prism(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def simulated(*arguments: object) -> dict[str, Any]:
    result = prism("simulate", "--trace", TRACE, "--models", MODELS, "--json", *arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_one_json_object_with_all_figures_in_all_and_by_model() -> None:
    found = simulated("--gpus", 2, "--gpu-memory-gb", 80, "--policy", "lru")
    assert found.keys() >= WHOLE
    assert len(found["models"]) == 8
    for each in found["models"].values():
        assert each.keys() >= WHOLE
    assert sum(each["requests"] for each in found["models"].values()) == found["requests"] == 480
    assert 0.9 < found["both_attainment"] <= 1
    assert found["both_attainment"] <= min(found["ttft_attainment"], found["tpot_attainment"])


def test_the_same_call_gives_the_same_object() -> None:
    arguments = ("--gpus", 1, "--gpu-memory-gb", 40, "--policy", "lru", "--initial-placement", "search")
    assert simulated(*arguments) == simulated(*arguments)


def test_more_load_is_worse_and_laxer_objectives_are_better() -> None:
    usual = simulated("--gpus", 1, "--policy", "lru", "--rate-scale", 3)
    faster = simulated("--gpus", 1, "--policy", "lru", "--rate-scale", 12)
    laxer = simulated(
        "--gpus", 1, "--policy", "lru", "--rate-scale", 12, "--ttft-scale", 50, "--tpot-scale", 50
    )
    assert faster["duration_s"] == pytest.approx(usual["duration_s"] / 4, rel=1e-3)
    assert faster["both_attainment"] < usual["both_attainment"]
    assert laxer["both_attainment"] > faster["both_attainment"]
    slo = usual["models"]["model-0"]["ttft_slo_ms"]
    assert faster["models"]["model-0"]["ttft_slo_ms"] == slo, "the rate does not change what is promised"
    assert laxer["models"]["model-0"]["ttft_slo_ms"] == pytest.approx(10 * slo, rel=1e-4)


def test_gpu_ids_beyond_the_cluster_are_taken_modulo_with_a_warning() -> None:
    result = prism("simulate", "--trace", TRACE, "--models", MODELS, "--gpus", 1, "--policy", "lru", "--json")
    assert json.loads(result.stdout)["gpus"] == 1
    assert "model-1: gpu_ids [1] taken modulo 1 GPUs: [0]" in result.stderr


def test_people_get_a_table() -> None:
    result = prism("simulate", "--trace", TRACE, "--models", MODELS, "--gpus", 2, "--policy", "lru")
    assert result.exit_code == 0
    assert "MODEL" in result.stdout
    assert "of 480 requests met both objectives" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--policy", "nope"), "placement policy 'nope' is not known; known: "),
        (("--admission", "nope"), "admission policy 'nope' is not known; known: edf, first_come"),
        (("--profile", "nope"), "profile 'nope': neither a file nor one of "),
        (("--map", "model-0"), "--map 'model-0': it has to be TRACE_MODEL=MODEL"),
        (("--map", "model-0=nope"), "the placement file has no model 'nope'"),
        (("--trace", "/nowhere.csv"), "trace /nowhere.csv: No such file or directory"),
        (("--seconds", "0.00001"), "no requests in the trace's first"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: tuple[str, ...], complaint: str) -> None:
    result = prism("simulate", "--trace", TRACE, "--models", MODELS, "--gpus", 2, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("prism: ")
    assert complaint in result.stderr


def test_plan_finds_the_least_number_of_gpus_and_draws(tmp_path: Path) -> None:
    plot = tmp_path / "plan.png"
    arguments = ("--trace", TRACE, "--models", MODELS, "--policy", "lru", "--rate-scale", 4, "--target", 0.95)
    result = prism("plan", *arguments, "--plot", plot, "--price", 2, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["policies"]["lru"]
    reached = {int(gpus): value for gpus, value in found["attainment"].items()}
    assert reached[found["gpus"]] >= 0.95
    assert all(value < 0.95 for gpus, value in reached.items() if gpus < found["gpus"])
    assert found["cost_per_month"] == found["gpus"] * 2 * 730
    assert plot.read_bytes().startswith(b"\x89PNG")
