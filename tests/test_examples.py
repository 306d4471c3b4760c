"""The example placement files, and the two of the research prototype's README, word for word."""

from pathlib import Path

import pytest

from prism.common.messages.models import InitialPlacement, ModelSpec
from prism.common.placement_file import read_placement_file

pytestmark = pytest.mark.core

EXAMPLES = Path(__file__).parents[1] / "examples"

TWO_MODELS = """[
{
"model_name": "model_1",
"model_path": "meta-llama/Llama-3.2-1B",
"tp_size": 1,
"init_placements": [{
"gpu_ids": [0],
"on": true,
"max_memory_pool_size": 15
}]
},
{
"model_name": "model_2",
"model_path": "meta-llama/Llama-3.2-3B",
"tp_size": 1,
"init_placements": [{
"gpu_ids": [0],
"on": false,
"max_memory_pool_size": 15
}]
}
]"""

LARGE_MODEL = """[
{
"model_name": "large_model",
"model_path": "meta-llama/Llama-3.3-70B-Instruct",
"tp_size": 4,
"init_placements": [{
"gpu_ids": [0, 1, 2, 3],
"on": true,
"max_memory_pool_size": 10
}]
}
]"""


def read(tmp_path: Path, text: str) -> list[ModelSpec]:
    path = tmp_path / "placement.json"
    path.write_text(text)
    return read_placement_file(path)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.name)
def test_every_example_loads(path: Path) -> None:
    specs = read_placement_file(path)
    assert specs
    for spec in specs:
        assert spec.init_placements[0].max_memory_pool_size


def test_the_examples_are_the_ones_that_the_readme_names() -> None:
    assert {path.name for path in EXAMPLES.glob("*.json")} == {
        "2_models_static.json",
        "2_models_elastic.json",
        "18_models_8_gpus.json",
        "70b_4_gpus.json",
        "tiny.json",
    }


def test_the_readmes_two_models_load_unchanged(tmp_path: Path) -> None:
    assert read(tmp_path, TWO_MODELS) == [
        ModelSpec("model_1", "meta-llama/Llama-3.2-1B", init_placements=[InitialPlacement([0], True, 15)]),
        ModelSpec("model_2", "meta-llama/Llama-3.2-3B", init_placements=[InitialPlacement([0], False, 15)]),
    ]
    assert read(tmp_path, TWO_MODELS) == read_placement_file(EXAMPLES / "2_models_elastic.json")


def test_the_readmes_large_model_loads_unchanged(tmp_path: Path) -> None:
    (spec,) = read(tmp_path, LARGE_MODEL)
    assert spec.tp_size == 4
    assert spec.init_placements == [InitialPlacement([0, 1, 2, 3], True, 10)]
    assert [spec] == read_placement_file(EXAMPLES / "70b_4_gpus.json")


def test_eighteen_models_start_on_eight_gpus() -> None:
    specs = read_placement_file(EXAMPLES / "18_models_8_gpus.json")
    assert len(specs) == 18
    assert {gpu for spec in specs for gpu in spec.init_placements[0].gpu_ids} == set(range(8))


def test_tiny_models_are_looked_for_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "tiny-models" / "tiny-llama").mkdir(parents=True)
    specs = read(tmp_path, (EXAMPLES / "tiny.json").read_text())
    assert [spec.model_name for spec in specs] == ["tiny-llama", "tiny-qwen3", "tiny-llama-big"]
    assert specs[0].model_path == str((tmp_path / "tiny-models" / "tiny-llama").resolve())
    assert specs[1].model_path == "tiny-models/tiny-qwen3", "which is not there, and may be a name elsewhere"
