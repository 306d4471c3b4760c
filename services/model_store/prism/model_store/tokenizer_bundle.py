"""What a gateway needs of a model's tokenizer, gathered from its folder."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import xxhash

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import encode
from prism.common.messages.models import TokenizerBundle
from prism.model_store.checkpoint import read_json
from prism.model_store.file_errors import reading

CONVERT_DEADLINE_S = 120.0
# Those of transformers that know `add_bos_token`; others leave it to tokenizer.json.
_CLASSES_WITH_BOS = frozenset(
    {
        "LlamaTokenizer",
        "LlamaTokenizerFast",
        "CodeLlamaTokenizer",
        "CodeLlamaTokenizerFast",
        "GemmaTokenizer",
        "GemmaTokenizerFast",
        "CohereTokenizerFast",
    }
)
_OLDER_FORMATS = ["*.model", "*.tiktoken", "vocab.*", "merges.txt"]
_CONVERT = (
    "import sys; from transformers import AutoTokenizer; "
    "AutoTokenizer.from_pretrained(sys.argv[1]).backend_tokenizer.save(sys.argv[2])"
)


def read_bundle(folder: Path) -> TokenizerBundle:
    """The tokenizer in `folder`. One that is there only in an older format is converted by transformers
    where that is installed, which takes some seconds. Raises PrismError(model_failed)."""
    with reading(folder):
        return _read_bundle(folder)


def _read_bundle(folder: Path) -> TokenizerBundle:
    path = folder / "tokenizer.json"
    tokenizer_json = _text(path) if path.exists() else _converted(folder)
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path)[1] if config_path.exists() else {}
    map_path = folder / "special_tokens_map.json"
    special = (read_json(map_path)[1] if map_path.exists() else {}) | config
    return TokenizerBundle(
        tokenizer_json=tokenizer_json,
        chat_template=_chat_template(folder, config),
        special_tokens={
            name: text
            for name, value in sorted(special.items())
            if name.endswith("_token") and (text := _token_text(value)) is not None
        },
        add_bos=_adds_bos(config),
    )


def bundle_key(bundle: TokenizerBundle) -> tuple[str, bytes]:
    """The key of a bundle in the object store, which is the xxh3_128 of its JSON, and that JSON."""
    payload = encode(bundle)
    return xxhash.xxh3_128_hexdigest(payload), payload


def _adds_bos(config: dict[str, Any]) -> bool:
    """What transformers does with `add_bos_token`, which it takes for true where it is not given."""
    if config.get("tokenizer_class") not in _CLASSES_WITH_BOS:
        return False
    return config.get("add_bos_token") in (None, True)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return _text(folder / "chat_template.jinja")
    if (folder / "chat_template.json").exists():
        config = read_json(folder / "chat_template.json")[1]
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _text(path: Path) -> str:
    try:
        with reading(path):
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PrismError(ErrorCode.MODEL_FAILED, f"{path} cannot be read: {error}") from error


def _converted(folder: Path) -> str:
    if not any(path for name in _OLDER_FORMATS for path in folder.glob(name)):
        raise _no_tokenizer(folder, "it holds no tokenizer in an older format either")
    # In a process of its own: transformers takes seconds and hundreds of megabytes that the store
    # needs for nothing else.
    try:
        with tempfile.TemporaryDirectory(prefix="prism-tokenizer-") as scratch:
            target = Path(scratch) / "tokenizer.json"
            done = subprocess.run(
                [sys.executable, "-c", _CONVERT, str(folder), str(target)],
                capture_output=True,
                text=True,
                timeout=CONVERT_DEADLINE_S,
                check=False,
            )
            if target.exists():
                return _text(target)
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"not done after {CONVERT_DEADLINE_S:.0f} s"
    except OSError as error:
        reason = str(error)
    raise _no_tokenizer(folder, f"its tokenizer could not be converted: {reason[:300]}")


def _no_tokenizer(folder: Path, why: str) -> PrismError:
    return PrismError(
        ErrorCode.MODEL_FAILED,
        f"{folder} has no tokenizer.json ({why}); save one with transformers' "
        "PreTrainedTokenizerFast.save_pretrained, or set tokenizer_path",
    )
