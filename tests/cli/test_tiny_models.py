"""The tiny models: what other tests and the demonstration rely on."""

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from prism.cli.tiny_check import PROMPT_TOKENS, check_conversations, check_prompts
from prism.cli.tiny_models import MARKER, TINY_MODELS, make_tiny_models, make_tiny_models_command
from prism.cli.tiny_tokenizer import (
    CHAT_TEMPLATE,
    CONTEXT_LENGTH,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    train_tokenizer,
)
from prism.model_store.checkpoint import read_checkpoint
from prism.model_store.facts import facts_of
from prism.model_store.fingerprint import Identity


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three models, made once; making them runs the check for near-ties."""
    directory = tmp_path_factory.mktemp("tiny")
    result = CliRunner().invoke(make_tiny_models_command, [str(directory)])
    assert result.exit_code == 0, result.output
    return directory


def test_three_models_of_the_sizes_that_the_demonstration_needs(models_dir: Path) -> None:
    def megabytes(name: str) -> float:
        return sum(file.stat().st_size for file in (models_dir / name).glob("*.safetensors")) / 1e6

    assert 20 <= megabytes("tiny-llama") <= 35
    assert 25 <= megabytes("tiny-qwen3") <= 45
    assert 110 <= megabytes("tiny-llama-big") <= 140
    left_over = [path.name for path in models_dir.iterdir() if path.name.startswith(".")]
    assert left_over == []


def test_a_current_folder_is_kept_and_an_older_one_replaced(models_dir: Path) -> None:
    marker = models_dir / "tiny-llama" / MARKER
    marker.write_text("{}")
    before = {tiny.name: (models_dir / tiny.name).stat().st_ino for tiny in TINY_MODELS}
    told: list[str] = []
    folders = make_tiny_models(models_dir, report=told.append)
    after = {tiny.name: (models_dir / tiny.name).stat().st_ino for tiny in TINY_MODELS}
    assert [folder.name for folder in folders] == [tiny.name for tiny in TINY_MODELS]
    assert [name for name in before if before[name] != after[name]] == ["tiny-llama"]
    assert ["there already" in line for line in told] == [False, True, True]
    assert marker.read_text() != "{}"


def test_folders_load_in_transformers_as_what_they_say_they_are(models_dir: Path) -> None:
    from transformers import AutoConfig

    for tiny in TINY_MODELS:
        config = AutoConfig.from_pretrained(models_dir / tiny.name)
        assert config.model_type == tiny.family
        assert config.tie_word_embeddings is tiny.tied
        assert config.max_position_embeddings == 2048
        assert config.vocab_size == VOCAB_SIZE
        generation = msgspec.json.decode((models_dir / tiny.name / "generation_config.json").read_bytes())
        assert generation["eos_token_id"] == [1, 5]


def test_tokenizer_is_the_same_in_transformers_and_in_tokenizers(models_dir: Path) -> None:
    import jinja2
    from transformers import AutoTokenizer

    folder = models_dir / "tiny-qwen3"
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in check_prompts(ours):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert theirs.encode(text) == ids
        assert ours.encode(text).ids == ids
        assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=False) == text
    template = jinja2.Environment().from_string((folder / "chat_template.jinja").read_text())
    for messages in check_conversations():
        rendered = template.render(messages=messages, bos_token="<|bos|>", add_generation_prompt=True)
        assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == rendered
        assert rendered in check_prompts(ours)
    assert theirs.chat_template == CHAT_TEMPLATE
    assert (theirs.bos_token, theirs.eos_token) == ("<|bos|>", "<|eos|>")


def test_the_store_reads_off_the_folders_what_transformers_makes_of_them(models_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    for tiny in TINY_MODELS:
        facts = facts_of("m", read_checkpoint(models_dir / tiny.name), Identity("", ""), "")
        model = AutoModelForCausalLM.from_pretrained(models_dir / tiny.name)
        assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert facts.kv_elements_per_token == 2 * tiny.layers * tiny.kv_heads * tiny.head_dim
        assert facts.context_length == CONTEXT_LENGTH
        assert facts.architecture == type(model).__name__
        assert facts.checkpoint_dtype == "float32"
        assert facts.eos_token_ids == [1, 5]


@pytest.mark.core
def test_tokenizer_training_is_deterministic_and_its_special_tokens_come_first() -> None:
    tokenizer = train_tokenizer()
    assert tokenizer.to_str() == train_tokenizer().to_str()
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


@pytest.mark.core
def test_check_prompts_reach_from_one_token_to_seven_hundred() -> None:
    tokenizer = train_tokenizer()
    lengths = [len(tokenizer.encode(text).ids) for text in check_prompts(tokenizer)]
    assert len(lengths) >= 12
    assert min(lengths) == 1
    assert max(lengths) == max(PROMPT_TOKENS) == 700
    assert all(any(ord(char) > 127 for char in text) for text in check_prompts(tokenizer)[-1:])
