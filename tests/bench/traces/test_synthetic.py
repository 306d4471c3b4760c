"""Made-up traces have the statistics that they are asked for."""

from itertools import pairwise
from pathlib import Path
from statistics import mean, pstdev

import pytest
from click.testing import CliRunner

from prism.bench.traces.__main__ import main
from prism.bench.traces.synthetic import Synthetic, long_tailed_trace, synthetic_trace

pytestmark = pytest.mark.core

NAMES = [f"m{index}" for index in range(8)]


def test_the_same_seed_the_same_trace_another_seed_another() -> None:
    shape = Synthetic(rate=5)
    assert synthetic_trace(NAMES, shape, 1) == synthetic_trace(NAMES, shape, 1)
    assert synthetic_trace(NAMES, shape, 1) != synthetic_trace(NAMES, shape, 2)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_the_variation(cv: float) -> None:
    trace = synthetic_trace(NAMES, Synthetic(rate=10, duration_s=4000, cv=cv), 3)
    gaps = [later - earlier for earlier, later in zip(trace.arrival_s, trace.arrival_s[1:], strict=False)]
    assert mean(gaps) == pytest.approx(0.1, rel=0.05)
    assert pstdev(gaps) / mean(gaps) == pytest.approx(cv, rel=0.05)


def test_popularity_follows_the_power_law() -> None:
    trace = synthetic_trace(NAMES, Synthetic(rate=100, duration_s=400, alpha=2.1), 4)
    shares = [count / len(trace) for count in trace.counts().values()]
    # The share of model i of N, the hottest first: ((N - i) / N) ** alpha - ((N - i - 1) / N) ** alpha.
    expected = [((8 - i) / 8) ** 2.1 - ((7 - i) / 8) ** 2.1 for i in range(8)]
    assert shares == pytest.approx(expected, abs=0.01)


def test_lengths_lie_within_their_bounds() -> None:
    trace = synthetic_trace(NAMES, Synthetic(rate=50, prompt_tokens=(3, 5), output_tokens=(7, 7)), 5)
    assert set(trace.prompt_tokens) == {3, 4, 5}
    assert set(trace.output_tokens) == {7}


def test_phases_leave_models_silent_for_long() -> None:
    def longest_gap(on_s: float) -> float:
        shape = Synthetic(rate=40, duration_s=300, alpha=1.0, on_s=on_s, off_s=on_s)
        trace = synthetic_trace(NAMES, shape, 6)
        times = [at for at, model in zip(trace.arrival_s, trace.model, strict=True) if model == 0]
        return max(later - earlier for earlier, later in pairwise(times))

    assert longest_gap(0.0) < 3
    assert longest_gap(20.0) > 5


def test_long_tailed_lengths_are_those_of_chats() -> None:
    trace = long_tailed_trace(NAMES, Synthetic(rate=100, duration_s=200), 7)
    prompts, outputs = sorted(trace.prompt_tokens), sorted(trace.output_tokens)
    count = len(prompts)
    assert prompts[count // 2] == pytest.approx(40, rel=0.1)
    assert prompts[count * 9 // 10] == pytest.approx(430, rel=0.15)
    assert outputs[count // 2] == pytest.approx(210, rel=0.1)
    assert max(prompts) <= 1020


def test_the_shipped_trace_is_the_one_that_the_command_writes(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    options = ["--seconds", "120", "--cv", "1.5", "--on", "20", "--off", "20"]
    result = CliRunner().invoke(main, [str(path), *options])
    assert result.exit_code == 0, result.output
    shipped = Path(__file__).parents[3] / "examples" / "simulated" / "trace.csv"
    assert path.read_text() == shipped.read_text()
