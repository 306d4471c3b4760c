"""The shapes of the random models are those of the models that they stand for."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from prism.bench.activation.random_models import SHAPES, Shape, tensor_shapes, write_random_model

SMALL = Shape("llama", 64, 128, 2, 4, 2, 16, 2000, tied=False)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("1b", 1_235_814_400),
        ("3b", 3_212_749_824),
        ("8b", 8_030_261_248),
        ("14b", 14_768_307_200),
        ("32b", 32_762_123_264),
    ],
)
def test_a_shape_has_as_many_parameters_as_the_published_model(size: str, parameters: int) -> None:
    assert sum(math.prod(shape) for _, shape in tensor_shapes(SHAPES[size])) == parameters


def test_a_written_model_is_whole_and_every_token_has_a_text(tmp_path: Path) -> None:
    nbytes = write_random_model(tmp_path / "m", SMALL, seed=1)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == nbytes
    assert set(index["weight_map"]) == {name for name, _ in tensor_shapes(SMALL)}
    with safe_open(tmp_path / "m" / "model-00001.safetensors", "pt") as weights:
        assert list(weights.get_tensor("lm_head.weight").shape) == [SMALL.vocabulary, SMALL.hidden]
    tokenizer = Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    assert all(tokenizer.decode([token]) for token in range(6, SMALL.vocabulary))


def test_a_model_in_fp8_has_a_scale_for_each_projection(tmp_path: Path) -> None:
    shape = dataclasses.replace(SMALL, fp8=True)
    write_random_model(tmp_path / "m", shape, seed=1)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    with safe_open(tmp_path / "m" / "model-00001.safetensors", "pt") as weights:
        projections = [name for name in weights.keys() if name.endswith("_proj.weight")]  # noqa: SIM118
        assert len(projections) == 7 * SMALL.layers
        for name in projections:
            scaled = weights.get_tensor(name).float() * weights.get_tensor(f"{name}_scale")
            assert weights.get_tensor(name).dtype == torch.float8_e4m3fn
            assert scaled.std().item() == pytest.approx(1.5 / scaled.shape[-1] ** 0.5, rel=0.1)
        assert weights.get_tensor("lm_head.weight").dtype == torch.bfloat16
