"""What a model folder says about the model."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.model_store.model_folders import CONFIG, TENSORS, write_model, write_safetensors

from prism.common.errors import PrismError
from prism.common.messages.models import ModelFacts
from prism.model_store.checkpoint import read_checkpoint
from prism.model_store.facts import facts_of
from prism.model_store.fingerprint import Identity

pytestmark = pytest.mark.core


def facts(folder: Path) -> ModelFacts:
    return facts_of("m", read_checkpoint(folder), Identity("f" * 32, "v" * 32), "tok")


def with_config(folder: Path, **changes: Any) -> Path:
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    return write_model(folder, config=config)


def test_all_facts_of_a_plain_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    assert facts(folder) == ModelFacts(
        model="m",
        fingerprint="f" * 32,
        version="v" * 32,
        parameters=2 * 100 * 64 + 256 * 64 + 64,
        checkpoint_bytes=(folder / "model.safetensors").stat().st_size,
        kv_elements_per_token=2 * 3 * 2 * 8,
        context_length=512,
        vocab_size=100,
        checkpoint_dtype="float32",
        architecture="LlamaForCausalLM",
        eos_token_ids=[7],
        tokenizer="tok",
    )


def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    folder = with_config(tmp_path / "m", tie_word_embeddings=True)
    assert facts(folder).parameters == 100 * 64 + 256 * 64 + 64


def test_head_dim_of_its_own_counts(tmp_path: Path) -> None:
    assert facts(with_config(tmp_path / "m", head_dim=16)).kv_elements_per_token == 2 * 3 * 2 * 16


def test_without_grouped_heads_each_head_has_its_keys(tmp_path: Path) -> None:
    assert facts(with_config(tmp_path / "m", num_key_value_heads=None)).kv_elements_per_token == 2 * 3 * 64


def test_latent_attention_keeps_one_compressed_vector_a_layer(tmp_path: Path) -> None:
    folder = with_config(tmp_path / "m", kv_lora_rank=512, qk_rope_head_dim=64)
    assert facts(folder).kv_elements_per_token == 3 * (512 + 64)


def test_a_language_model_inside_another_is_found(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", config={"architectures": ["Both"], "text_config": CONFIG})
    assert facts(folder).vocab_size == 100
    assert facts(folder).architecture == "Both"


def test_generation_config_decides_what_ends_a_sequence(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert facts(folder).eos_token_ids == [7, 9]


def test_dtype_is_that_of_most_bytes(tmp_path: Path) -> None:
    tensors = {"a": ("BF16", (500,)), "b": ("F32", (20,))}
    assert facts(write_model(tmp_path / "m", tensors=tensors)).checkpoint_dtype == "bfloat16"


def test_shards_are_those_that_the_index_names(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    write_safetensors(folder / "model-00002-of-00002.safetensors", {"extra": ("F32", (10,))})
    write_safetensors(folder / "consolidated.safetensors", TENSORS)
    names = dict.fromkeys(TENSORS, "model-00001-of-00002.safetensors")
    names["extra"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert facts(folder).parameters == 2 * 100 * 64 + 256 * 64 + 64 + 10
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(PrismError, match=r"model-00002-of-00002\.safetensors cannot be read"):
        facts(folder)


def test_what_a_config_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match=r"config\.json has vocab_size = None"):
        facts(with_config(tmp_path / "m", vocab_size=None))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "m")
    (folder / name).unlink()
    with pytest.raises(PrismError, match=str(folder)):
        facts(folder)
