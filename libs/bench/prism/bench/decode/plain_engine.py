"""SGLang by itself, as the yardstick: its own Engine with its own defaults, in a process of its own.

Run as `python -m prism.bench.decode.plain_engine`. The first line on stdin is a `PlainSettings`, each further
one a `Batch` to generate; a line of JSON on stdout answers each, "{}" the first.
"""

import importlib.util
import sys
import time
from typing import Any

import msgspec


class PlainSettings(msgspec.Struct, frozen=True):
    """What Engine is told: no more than it takes to run on `device` with the attention backend that is
    there, and how many tokens its KV cache is for; with `same_kernels` also what makes it compute a prompt by
    the kernels that engines of ours use."""

    model_path: str
    device: str
    attention_backend: str
    kv_tokens: int
    same_kernels: bool = False


class Batch(msgspec.Struct, frozen=True):
    """Prompts to continue at once, greedily, by exactly `tokens` tokens each; with `margins` each answer's
    distance between its best and second best token, in log-probability."""

    prompts: list[list[int]]
    tokens: int
    margins: bool = False


class Generated(msgspec.Struct, frozen=True):
    """The answers to a batch, and the seconds until the last of them was whole."""

    seconds: float
    outputs: list[list[int]]
    margins: list[list[float]] = []


def engine_arguments(settings: PlainSettings) -> dict[str, Any]:
    """The arguments of SGLang's Engine."""
    arguments: dict[str, Any] = {
        "model_path": settings.model_path,
        "attention_backend": settings.attention_backend,
        "log_level": "error",
        # By default it takes most of the GPU, and nobody could be measured beside it.
        "max_total_tokens": settings.kv_tokens,
        # Nor does it keep a core from who is measured beside it.
        "sleep_on_idle": True,
    }
    if importlib.util.find_spec("xgrammar") is None:
        # Its default, which hosts without network may lack. No answer here has a grammar.
        arguments["grammar_backend"] = "none"
    if settings.same_kernels:
        # By default prompts run through CUDA graphs of compiled pieces: other kernels, other rounding.
        arguments["disable_prefill_cuda_graph"] = True
    if settings.device == "cpu":
        # What SGLang cannot do without on a CPU that has no kernels of its own for it.
        arguments |= {
            "device": "cpu",
            "sampling_backend": "pytorch",
            "grammar_backend": "none",
            "disable_cuda_graph": True,
            "disable_overlap_schedule": True,
            "dtype": "float32",
            "max_running_requests": 64,
        }
    return arguments


def request_of(batch: Batch) -> dict[str, Any]:
    """The body of SGLang's native request for a batch; the gateway's /generate takes the same."""
    body: dict[str, Any] = {
        "input_ids": batch.prompts,
        "sampling_params": {"max_new_tokens": batch.tokens, "temperature": 0.0, "ignore_eos": True},
    }
    if batch.margins:
        body |= {"return_logprob": True, "top_logprobs_num": 2}
    return body


def generated(answers: list[dict[str, Any]], seconds: float) -> Generated:
    """What SGLang's answers to a batch say."""
    margins = [
        [float(best[0]) - float(second[0]) for best, second, *_ in answer["meta_info"]["output_top_logprobs"]]
        for answer in answers
        if "output_top_logprobs" in answer["meta_info"]
    ]
    return Generated(seconds, [list(answer["output_ids"]) for answer in answers], margins)


def main() -> None:
    """Be one engine until stdin ends."""
    from sglang.srt.entrypoints.engine import Engine

    settings = msgspec.json.decode(sys.stdin.readline(), type=PlainSettings)
    # What libraries print must not stand between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    engine = Engine(**engine_arguments(settings))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        batch = msgspec.json.decode(line, type=Batch)
        began = time.perf_counter()
        said = engine.generate(**request_of(batch))
        told = generated(said, time.perf_counter() - began)
        print(msgspec.json.encode(told).decode(), file=answers, flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
