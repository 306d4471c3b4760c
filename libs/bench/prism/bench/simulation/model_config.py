"""What a model's config.json alone says of its size: parameters, KV cache, limits. No weights are needed."""

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.models import ModelFacts

PUBLISHED = Path(str(files("prism.bench.simulation").joinpath("published_configs")))
BYTES_OF_DTYPE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

_DENSE = {
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GraniteForCausalLM",
    "Gemma2ForCausalLM",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_model_facts(model: str, model_path: str, *, tokens_of_context: int | None = None) -> ModelFacts:
    """The facts of `model` from the config.json in the folder `model_path`.

    A name of the Hugging Face hub that is no folder here is looked for among the configs of published models
    that come with Prism, then on the hub (config.json alone is fetched). `tokens_of_context` replaces the
    context length, where it is less. Raises PrismError(invalid_request) that names the file and what it
    lacks.
    """
    path = _config_path(model, model_path)
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise _refused(model, f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _refused(model, f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise _refused(model, f"{path} is not a JSON object")
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(text, dict)
    architecture = str((config.get("architectures") or [config.get("model_type", "")])[0])
    try:
        parameters = (
            dense_parameters(text, architecture)
            if architecture in _DENSE
            else _parameters_by_transformers(config, architecture)
        )
        context = _number(text, "max_position_embeddings")
        dtype = str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "bfloat16")
        return ModelFacts(
            model=model,
            parameters=parameters,
            checkpoint_bytes=parameters * BYTES_OF_DTYPE.get(dtype, 2),
            kv_elements_per_token=kv_elements_per_token(text),
            context_length=min(context, tokens_of_context or context),
            vocab_size=_number(text, "vocab_size"),
            checkpoint_dtype=dtype,
            architecture=architecture,
        )
    except KeyError as error:
        raise _refused(model, f"{path} has no {error.args[0]}; is this a causal language model?") from error


def dense_parameters(config: Mapping[str, Any], architecture: str) -> int:
    """Parameters of a dense decoder, tied embeddings counted once.

    Per layer: four attention projections, three of the gated MLP, the norms; Qwen2 has biases on Q, K and V,
    Qwen3 norms on Q and K, Gemma 2 two more norms a layer. Raises KeyError for what the config lacks.
    """
    hidden, layers = _number(config, "hidden_size"), _number(config, "num_hidden_layers")
    heads, vocabulary = _number(config, "num_attention_heads"), _number(config, "vocab_size")
    kv_heads = _number(config, "num_key_value_heads", heads)
    head = _number(config, "head_dim", hidden // heads)
    inner = _number(config, "intermediate_size")
    layer = 2 * hidden * heads * head + 2 * hidden * kv_heads * head + 3 * hidden * inner + 2 * hidden
    if architecture == "Qwen2ForCausalLM":
        layer += (heads + 2 * kv_heads) * head
    elif config.get("attention_bias"):
        layer += (heads + 2 * kv_heads) * head + hidden
    if config.get("mlp_bias"):
        layer += 2 * inner + hidden
    if architecture == "Qwen3ForCausalLM":
        layer += 2 * head
    if architecture == "Gemma2ForCausalLM":
        layer += 2 * hidden
    # transformers' default where the config is silent: Gemma ties, the others don't.
    tied = config.get("tie_word_embeddings", architecture == "Gemma2ForCausalLM")
    return vocabulary * hidden * (1 if tied else 2) + layers * layer + hidden


def kv_elements_per_token(config: Mapping[str, Any]) -> int:
    """Elements of K and V that one token occupies over all layers. Raises KeyError for what is lacking."""
    layers = _number(config, "num_hidden_layers")
    if config.get("kv_lora_rank"):
        return layers * (_number(config, "kv_lora_rank") + _number(config, "qk_rope_head_dim"))
    heads = _number(config, "num_attention_heads")
    kv_heads = _number(config, "num_key_value_heads", heads)
    return 2 * layers * kv_heads * _number(config, "head_dim", _number(config, "hidden_size") // heads)


def published(model_path: str) -> Path | None:
    """The config.json of a published model that comes with Prism, by its name on the hub."""
    path = PUBLISHED / model_path.replace("/", "--") / "config.json"
    return path if _HUB_ID.fullmatch(model_path) and path.is_file() else None


def _config_path(model: str, model_path: str) -> Path:
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        return folder / "config.json"
    if (found := published(model_path)) is not None:
        return found
    if not _HUB_ID.fullmatch(model_path):
        raise _refused(
            model, f"model_path {model_path} is no folder here; a folder with a config.json is enough"
        )
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(model_path, "config.json", etag_timeout=5))
    except Exception as error:  # Whatever the hub's client may raise: the answer is the same.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _refused(
            model,
            f"model_path {model_path} is neither a folder here nor could its config.json be fetched from the "
            f"Hugging Face hub ({reason}); put its config.json into a folder and name that",
        ) from error


def _parameters_by_transformers(config: dict[str, Any], architecture: str) -> int:
    """Parameters of any other architecture: its modules built by transformers without memory behind them."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise PrismError(
            ErrorCode.INVALID_REQUEST,
            f"the size of a {architecture or 'model without architectures'} is computed by transformers, "
            "which is not installed here; known without it: " + ", ".join(sorted(_DENSE)),
        ) from error
    try:
        known = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(known)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PrismError(
            ErrorCode.INVALID_REQUEST, f"transformers cannot build a {architecture or 'model'}: {error}"
        ) from error
    return sum(parameter.numel() for parameter in model.parameters())


def _number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise KeyError(f"positive number {key} (it has {value!r})")
    return value


def _refused(model: str, what: str) -> PrismError:
    return PrismError(ErrorCode.INVALID_REQUEST, f"{model}: {what}")
