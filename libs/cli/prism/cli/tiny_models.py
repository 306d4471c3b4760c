"""Three tiny models in the style of Hugging Face, with random weights, for tests and demonstrations.

They speak gibberish, fast and always the same: weights come from fixed seeds through numpy, whose generator
gives the same numbers on every machine. The seeds were chosen such that greedy output has no near-ties.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
from tokenizers import Tokenizer

from prism.cli.tiny_check import CHECKED_STEPS, MINIMUM_MARGIN, check_prompts, greedy_margins
from prism.cli.tiny_tokenizer import (
    BOS,
    CONTEXT_LENGTH,
    END,
    EOS,
    VOCAB_SIZE,
    save_tokenizer,
    train_tokenizer,
)
from prism.common.errors import ErrorCode, PrismError

GENERATOR_VERSION = 1
MARKER = "prism_tiny_model.json"
LOGIT_STD = 7.0


@dataclass(frozen=True)
class TinyModel:
    """The shape of one tiny model, and the seed of its weights."""

    name: str
    family: str
    seed: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool


TINY_MODELS = (
    TinyModel("tiny-llama", "llama", 105, 256, 704, 7, 8, 4, 32, tied=False),
    TinyModel("tiny-qwen3", "qwen3", 101, 320, 896, 7, 8, 2, 64, tied=True),
    TinyModel("tiny-llama-big", "llama", 101, 512, 1408, 10, 8, 4, 64, tied=False),
)


def make_tiny_models(directory: Path, *, report: Callable[[str], None]) -> list[Path]:
    """Write the tiny models below `directory` and return their folders; `report` gets a line for each.

    A folder that this version of the generator wrote is kept. Raises PrismError(internal) when a model's
    greedy output turns out to be a near-tie on this machine; then nothing of that model is left behind.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    folders = []
    for tiny in TINY_MODELS:
        folder = directory / tiny.name
        folders.append(folder)
        if _is_current(folder, tiny):
            report(f"{folder}: there already")
            continue
        began = time.monotonic()
        temporary = Path(tempfile.mkdtemp(prefix=f".{tiny.name}-", dir=directory))
        try:
            margin = _write(temporary, tiny, tokenizer)
            _publish(temporary, folder, tiny)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        megabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
        report(
            f"{folder}: {megabytes:.0f} MB, no greedy choice closer than {margin:.3f}, "
            f"{time.monotonic() - began:.1f} s"
        )
    return folders


def _publish(temporary: Path, folder: Path, tiny: TinyModel) -> None:
    temporary.chmod(0o755)
    for file in temporary.iterdir():
        file.chmod(0o644)
    if folder.exists():
        shutil.rmtree(folder)
    try:
        temporary.rename(folder)
    except OSError:
        # Somebody else who made the same model at the same time was faster: theirs is as good.
        if not _is_current(folder, tiny):
            raise


def _is_current(folder: Path, tiny: TinyModel) -> bool:
    try:
        marker = msgspec.json.decode((folder / MARKER).read_bytes())
    except (OSError, msgspec.DecodeError):
        return False
    return bool(marker == _marker(tiny))


def _marker(tiny: TinyModel) -> dict[str, Any]:
    return {"generator": GENERATOR_VERSION, "model": tiny.name, "seed": tiny.seed}


def _write(folder: Path, tiny: TinyModel, tokenizer: Tokenizer) -> float:
    # With more threads, the workers of several processes on few cores only get into each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    from transformers.utils.logging import disable_progress_bar

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = build_model(tiny, tokenizer)
        prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in check_prompts(tokenizer)]
        _, margin = greedy_margins(model, prompts, CHECKED_STEPS)
    finally:
        torch.set_num_threads(threads)
    if margin < MINIMUM_MARGIN:
        raise PrismError(
            ErrorCode.INTERNAL,
            f"{tiny.name}: two tokens of a greedy continuation are only {margin:.5f} apart on this machine, "
            f"less than {MINIMUM_MARGIN}; its seed {tiny.seed} has to be chosen anew (prism.cli.tiny_models)",
        )
    disable_progress_bar()
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    (folder / MARKER).write_bytes(msgspec.json.encode(_marker(tiny)))
    return margin


def build_model(tiny: TinyModel, tokenizer: Tokenizer) -> Any:
    """The model of transformers, in float32, with its weights drawn from `tiny.seed`."""
    from transformers.generation.configuration_utils import GenerationConfig

    bos, eos, end = (tokenizer.token_to_id(token) for token in (BOS, EOS, END))
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": tiny.hidden,
        "intermediate_size": tiny.intermediate,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.kv_heads,
        "head_dim": tiny.head_dim,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": tiny.tied,
        "bos_token_id": bos,
        "eos_token_id": [eos, end],
        "pad_token_id": eos,
        "dtype": "float32",
    }
    if tiny.family == "qwen3":
        from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    else:
        from transformers.models.llama.configuration_llama import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(**shape))
    draw_weights(model, tiny)
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=[eos, end], pad_token_id=eos)
    return model.eval()


def draw_weights(model: Any, tiny: TinyModel) -> None:
    """Fill the parameters of `model`, in the order of their names.

    The scales make the output depend on the whole prompt: attention is sharper than at a usual random
    start, and each layer adds about as much to the residual stream as the embedding brought. Logits have a
    standard deviation of LOGIT_STD, so that leads are clear and sampling at temperature 1 still varies. The
    random signs of the final norm keep tied embeddings from predicting the token that was just read.
    """
    import numpy as np
    import torch

    generator = np.random.default_rng(tiny.seed)
    embedding_std = 0.5
    head_scale = LOGIT_STD / np.sqrt(tiny.hidden)
    parameters: dict[str, Any] = dict(model.named_parameters())
    with torch.no_grad():
        for name in sorted(parameters):
            parameter = parameters[name]
            if name == "model.norm.weight":
                signs = generator.choice(np.array([-1.0, 1.0], dtype=np.float32), size=parameter.shape)
                values = signs * np.float32(head_scale / embedding_std if tiny.tied else 1.0)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                values = np.full(parameter.shape, 1.5, dtype=np.float32)
            elif name.endswith("norm.weight"):
                values = np.ones(parameter.shape, dtype=np.float32)
            else:
                values = generator.standard_normal(parameter.shape, dtype=np.float32)
                values *= np.float32(_std(name, parameter.shape[-1], embedding_std, head_scale))
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))


def _std(name: str, fan_in: int, embedding_std: float, head_scale: float) -> float:
    if "embed_tokens" in name:
        return embedding_std
    if "lm_head" in name:
        return head_scale
    gain = {"q_proj": 1.5, "k_proj": 1.5, "o_proj": 2.0, "down_proj": 1.5}.get(name.split(".")[-2], 1.0)
    return float(gain / fan_in**0.5)


@click.command("make-tiny-models")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def make_tiny_models_command(directory: Path) -> None:
    """Write three tiny models with random weights into DIRECTORY.

    They speak gibberish, but load and run like any Llama or Qwen3 from Hugging Face.
    """
    try:
        make_tiny_models(directory, report=click.echo)
    except PrismError as error:
        raise click.ClickException(error.message) from error
