"""Small model folders made by hand: real safetensors files, no deep-learning library."""

import json
import math
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

BITS = {"F32": 32, "BF16": 16, "I8": 8, "U8": 8, "I64": 64}

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 100,
    "tie_word_embeddings": False,
    "eos_token_id": 7,
}

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
TENSORS: Shapes = {
    "model.embed_tokens.weight": ("F32", (100, 64)),
    "model.layers.0.mlp.up_proj.weight": ("F32", (256, 64)),
    "model.norm.weight": ("F32", (64,)),
    "lm_head.weight": ("F32", (100, 64)),
}


def tensor_bytes(name: str, nbytes: int, seed: int = 0) -> bytes:
    """The content of a tensor: random, the same on each call."""
    return random.Random(f"{seed} {name}").randbytes(nbytes)


def write_safetensors(path: Path, tensors: Shapes, seed: int = 0) -> None:
    """A safetensors file of `tensors`, name to (type, shape), in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape) in tensors.items():
        content = tensor_bytes(name, math.prod(shape) * BITS[dtype] // 8, seed)
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_model(
    folder: Path, *, tensors: Shapes = TENSORS, seed: int = 0, config: Mapping[str, Any] = CONFIG
) -> Path:
    """A whole model folder with one weight file and a tokenizer of a few words."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors, seed)
    words = ["<unk>", "<s>", "</s>", "hello", "world"]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"})
    )
    return folder


def big_model(folder: Path, megabytes: int, seed: int = 0) -> Path:
    """A model folder with weights of about so many MB."""
    return write_model(folder, seed=seed, tensors={"model.big.weight": ("U8", (megabytes, 1_000_000))})
