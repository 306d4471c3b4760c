"""What a checkpoint says about the model: its size, its KV cache, its limits."""

from collections import Counter
from typing import Any

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.models import ModelFacts
from prism.model_store.checkpoint import Checkpoint
from prism.model_store.fingerprint import Identity


def facts_of(model: str, checkpoint: Checkpoint, identity: Identity, tokenizer: str) -> ModelFacts:
    """The facts of `model`. Raises PrismError(model_failed) for a config.json that lacks what is needed."""
    config = text_config(checkpoint.config)
    tensors = [tensor for file in checkpoint.files for tensor in file.tensors]
    tied = bool(config.get("tie_word_embeddings", checkpoint.config.get("tie_word_embeddings", False)))
    bytes_of_dtype: Counter[str] = Counter()
    for tensor in tensors:
        bytes_of_dtype[tensor.dtype] += tensor.nbytes
    architectures = checkpoint.config.get("architectures") or [checkpoint.config.get("model_type", "")]
    return ModelFacts(
        model=model,
        fingerprint=identity.fingerprint,
        version=identity.version,
        parameters=sum(
            tensor.elements for tensor in tensors if not (tied and tensor.name.endswith("lm_head.weight"))
        ),
        checkpoint_bytes=checkpoint.nbytes,
        kv_elements_per_token=kv_elements_per_token(checkpoint),
        context_length=_positive(config, "max_position_embeddings", checkpoint),
        vocab_size=_positive(config, "vocab_size", checkpoint),
        checkpoint_dtype=max(bytes_of_dtype, key=lambda dtype: (bytes_of_dtype[dtype], dtype), default=""),
        architecture=str(architectures[0]),
        eos_token_ids=_eos_token_ids(checkpoint),
        tokenizer=tokenizer,
    )


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model: all of it, unless others are beside it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def kv_elements_per_token(checkpoint: Checkpoint) -> int:
    """Elements of K and V that one token occupies, over all layers.

    With multi-head latent attention a layer keeps one compressed vector and the rotary part of the key.
    """
    config = text_config(checkpoint.config)
    layers = _positive(config, "num_hidden_layers", checkpoint)
    if config.get("kv_lora_rank"):
        rank = _positive(config, "kv_lora_rank", checkpoint)
        return layers * (rank + _positive(config, "qk_rope_head_dim", checkpoint))
    heads = _positive(config, "num_attention_heads", checkpoint)
    kv_heads = _positive(config, "num_key_value_heads", checkpoint, default=heads)
    head_dim = _positive(
        config, "head_dim", checkpoint, default=_positive(config, "hidden_size", checkpoint) // heads
    )
    return 2 * layers * kv_heads * head_dim


def _positive(config: dict[str, Any], key: str, checkpoint: Checkpoint, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or value <= 0:
        raise PrismError(
            ErrorCode.MODEL_FAILED,
            f"{checkpoint.folder / 'config.json'} has {key} = {value!r}, a positive number is needed; "
            "is this a causal language model?",
        )
    return value


def _eos_token_ids(checkpoint: Checkpoint) -> list[int]:
    for config in (checkpoint.generation_config, text_config(checkpoint.config), checkpoint.config):
        value = config.get("eos_token_id")
        if isinstance(value, int):
            return [value]
        if isinstance(value, list):
            return [token for token in value if isinstance(token, int)]
    return []
