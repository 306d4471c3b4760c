"""Sizes from config.json alone, against transformers and against what is published."""

import json
from pathlib import Path

import pytest

from prism.bench.simulation.model_config import PUBLISHED, read_model_facts
from prism.common.errors import PrismError

PARAMETERS = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "google/gemma-2-2b-it": 2_614_341_888,
}


@pytest.mark.core
@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_published_models_have_the_published_size(name: str, parameters: int) -> None:
    facts = read_model_facts(name, name)
    assert facts.parameters == parameters
    assert facts.checkpoint_bytes == 2 * parameters


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Llama-3.2-3B",
        "Qwen/Qwen2.5-14B",
        "Qwen/Qwen3-4B",
        "mistralai/Mistral-7B-Instruct-v0.3",
        "ibm-granite/granite-3.3-2b-instruct",
        "google/gemma-2-9b-it",
    ],
)
def test_each_family_is_counted_as_transformers_counts_it(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((PUBLISHED / name.replace("/", "--") / "config.json").read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert read_model_facts(name, name).parameters == sum(each.numel() for each in model.parameters())


@pytest.mark.core
def test_a_folder_with_a_config_is_enough(tmp_path: Path) -> None:
    config = json.loads((PUBLISHED / "Qwen--Qwen3-8B" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = read_model_facts("mine", str(tmp_path))
    assert (facts.model, facts.parameters) == ("mine", PARAMETERS["Qwen/Qwen3-8B"])
    assert facts.kv_elements_per_token == 2 * 36 * 8 * 128
    assert facts.context_length == 40960


@pytest.mark.core
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "config.json cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        (
            '{"architectures": ["LlamaForCausalLM"], "hidden_size": 64}',
            "has no positive number num_hidden_layers",
        ),
    ],
)
def test_what_a_config_lacks_is_said_with_its_file(
    tmp_path: Path, content: str | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(PrismError, match=complaint) as caught:
        read_model_facts("mine", str(tmp_path))
    assert str(tmp_path) in caught.value.message


@pytest.mark.core
def test_a_path_that_is_nothing_is_refused() -> None:
    with pytest.raises(PrismError, match="model_path /nowhere/at/all is no folder here"):
        read_model_facts("mine", "/nowhere/at/all")
