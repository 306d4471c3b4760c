"""Steps of building an engine: each is told of with its time, and works as before."""

import pytest

from prism.gpu_worker.engine.build_steps import MODEL_RUNNER_STEPS, follow


class Runner:
    """Has two of the steps that are followed."""

    def load_model(self, name: str) -> str:
        return name.upper()

    def init_cuda_graphs(self) -> None:
        raise RuntimeError("out of memory")


def test_a_step_that_ends_is_told_of_with_its_seconds() -> None:
    told: list[tuple[str, float]] = []

    class Followed(Runner):
        pass

    follow(Followed, MODEL_RUNNER_STEPS, lambda step, seconds: told.append((step, seconds)))
    assert Followed().load_model("a") == "A"
    ((step, seconds),) = told
    assert step == "weights"
    assert 0 <= seconds < 60


def test_a_step_that_fails_is_not_told_of_as_done() -> None:
    told: list[str] = []

    class Followed(Runner):
        pass

    follow(Followed, MODEL_RUNNER_STEPS, lambda step, _: told.append(step))
    with pytest.raises(RuntimeError, match="out of memory"):
        Followed().init_cuda_graphs()
    assert told == []
