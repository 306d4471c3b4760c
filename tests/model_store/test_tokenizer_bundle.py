"""What a gateway is given of a model's tokenizer."""

import errno
import json
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest
from tests.model_store.model_folders import write_model
from tokenizers import Tokenizer

from prism.common.errors import PrismError
from prism.common.messages.codec import decode
from prism.common.messages.models import TokenizerBundle
from prism.model_store.tokenizer_bundle import bundle_key, read_bundle


@pytest.mark.core
def test_a_bundle_survives_its_way_and_encodes_as_the_file_does(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    key, payload = bundle_key(read_bundle(folder))
    bundle = decode(payload, TokenizerBundle)
    assert bundle == read_bundle(folder)
    assert len(bytes.fromhex(key)) == 16
    assert Tokenizer.from_str(bundle.tokenizer_json).encode("hello world").ids == [3, 4]
    assert bundle.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert bundle.chat_template == "{{ messages }}"


@pytest.mark.core
def test_a_template_file_comes_before_the_config_and_named_ones_give_their_default(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_bundle(folder).chat_template == "d"
    (folder / "chat_template.jinja").write_text("from the file")
    assert read_bundle(folder).chat_template == "from the file"


@pytest.mark.core
@pytest.mark.parametrize(
    ("config", "add_bos"),
    [
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}, True),
        ({"tokenizer_class": "LlamaTokenizerFast"}, True),
        ({"tokenizer_class": "GemmaTokenizer", "add_bos_token": False}, False),
        ({"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": True}, False),
        ({"add_bos_token": True}, False),
    ],
)
def test_prompts_begin_with_the_first_token_where_the_tokenizers_class_sees_to_that(
    tmp_path: Path, config: dict[str, Any], add_bos: bool
) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_bundle(folder).add_bos is add_bos


def test_a_folder_without_any_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match=r"has no tokenizer\.json .* set tokenizer_path"):
        read_bundle(tmp_path)


def test_one_that_transformers_can_not_convert_says_why(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a tokenizer")
    with pytest.raises(PrismError, match=r"could not be converted: .*Error"):
        read_bundle(tmp_path)


def test_one_for_whose_conversion_the_disk_has_no_room_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**options: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "tokenizer.model").write_bytes(b"a tokenizer")
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    with pytest.raises(PrismError, match=r"could not be converted: .*No space left on device"):
        read_bundle(tmp_path)


def test_a_tokenizer_in_an_older_format_is_converted(tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    old = ByteLevelBPETokenizer()
    old.train_from_iterator(["hello hello world"], vocab_size=270, show_progress=False)
    old.save_model(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    converted = Tokenizer.from_str(read_bundle(tmp_path).tokenizer_json)
    assert converted.encode("hello world").ids == old.encode("hello world").ids
