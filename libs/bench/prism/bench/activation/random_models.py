"""Checkpoints with random weights in the published shapes of known models: they say noise at the true speed.

The dimensions are those of the models' public config.json files; weights are drawn on the GPU where one is.
"""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from prism.cli.tiny_tokenizer import save_tokenizer, train_tokenizer

SHARD_BYTES = 2 << 30
# One thread brings a gigabyte a second from a GPU into files in memory.
WRITERS = 6
CONTEXT_LENGTH = 8192
# Weights of FP8's format spread so far around 0; it holds up to 448.
FP8_SPREAD = 16.0


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama- or Qwen3-style model in bfloat16; with `fp8` its projections are in
    FP8, with one scale each."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    fp8: bool = False


SHAPES = {
    "1b": Shape("llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "3b": Shape("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "8b": Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
    "14b": Shape("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False),
    "32b": Shape("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, False),
    "8b_fp8": Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False, fp8=True),
    "70b_fp8": Shape("llama", 8192, 28672, 80, 64, 8, 128, 128256, False, fp8=True),
}


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors of a checkpoint, in the order of its files."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj.weight", (query, shape.hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (key, shape.hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (key, shape.hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (shape.hidden, query)
        if shape.family == "qwen3":
            yield f"{prefix}.self_attn.q_norm.weight", (shape.head_dim,)
            yield f"{prefix}.self_attn.k_norm.weight", (shape.head_dim,)
        yield f"{prefix}.mlp.gate_proj.weight", (shape.intermediate, shape.hidden)
        yield f"{prefix}.mlp.up_proj.weight", (shape.intermediate, shape.hidden)
        yield f"{prefix}.mlp.down_proj.weight", (shape.hidden, shape.intermediate)
        yield f"{prefix}.input_layernorm.weight", (shape.hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocabulary, shape.hidden)


def config_of(shape: Shape) -> dict[str, object]:
    """What config.json says."""
    quantized = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
    names = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "architectures": [names[shape.family]],
        "model_type": shape.family,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": CONTEXT_LENGTH,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "use_cache": True,
        **(quantized if shape.fp8 else {}),
    }


def write_random_model(folder: Path, shape: Shape, seed: int) -> int:
    """Write a checkpoint of `shape` into `folder`; returns its bytes. What is there stays."""
    marker = folder / "complete"
    if marker.exists():
        return int(marker.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    total = 0
    with ThreadPoolExecutor(WRITERS, "write") as pool:
        written: list[Future[None]] = []
        for number, shard in enumerate(_shards(shape, generator), 1):
            name = f"model-{number:05}.safetensors"
            files.update(dict.fromkeys(shard, name))
            total += sum(tensor.nbytes for tensor in shard.values())
            written.append(pool.submit(_write_shard, shard, folder / name))
            if len(written) >= WRITERS:
                # No more shards are held than are being written.
                written[-WRITERS].result()
        for each in written:
            each.result()
    if device.type == "cuda":
        # Who measures in this process needs none of it, and others may need all.
        torch.cuda.empty_cache()
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_of(shape), indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    save_tokenizer(train_tokenizer(), folder)
    _name_every_token(folder / "tokenizer.json", shape.vocabulary)
    marker.write_text(str(total))
    return total


def _write_shard(shard: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.cpu() for name, tensor in shard.items()}, path, metadata={"format": "pt"})


def _shards(shape: Shape, generator: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    """The checkpoint's tensors, file by file, on the device of `generator`."""
    device = generator.device
    shard: dict[str, torch.Tensor] = {}
    for name, dimensions in tensor_shapes(shape):
        if name.endswith("norm.weight"):
            tensor = torch.ones(dimensions, dtype=torch.bfloat16)
        else:
            drawn = torch.randn(dimensions, generator=generator, device=device, dtype=torch.bfloat16)
            scale = 0.5 if "embed_tokens" in name else 7.0 if "lm_head" in name else 1.5
            spread = scale / (1.0 if "embed_tokens" in name else dimensions[-1] ** 0.5)
            if shape.fp8 and "_proj." in name:
                tensor = (drawn * FP8_SPREAD).to(torch.float8_e4m3fn)
                shard[f"{name}_scale"] = torch.tensor([spread / FP8_SPREAD])
            else:
                tensor = drawn * spread
        shard[name] = tensor
        if sum(each.nbytes for each in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _name_every_token(file: Path, vocabulary: int) -> None:
    """Give every id a text: the gateway sends tokens that add some, and random weights say any of them."""
    tokenizer = json.loads(file.read_text())
    named = tokenizer["model"]["vocab"]
    for token in range(max(named.values()) + 1, vocabulary):
        named[f"w{token}"] = token
    file.write_text(json.dumps(tokenizer))
