"""`python -m prism.bench.calibration.fit_gpu`: the profiles that come with Prism, from measured rows.

The measurements and where each is from are in `h200_measurements.json`. Fitted by least squares:

- decode steps: fixed + weights and KV cache / bandwidth + sequences * (a cost each + arithmetic);
- first tokens of short prompts: fixed + weights / a bandwidth of its own (launches of each layer, eagerly);
- wakes: fixed + weights / bus.

The 80 GB H100-class profile is the H200's, with memory bandwidth and everything bound by it scaled by the
published ratio. It has not been measured.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import msgspec
import numpy as np

from prism.bench.simulation.model_config import read_model_facts
from prism.bench.simulation.profiles import write_profile
from prism.common.messages.models import ModelFacts
from prism.scheduling.cost import OPERATIONS_PER_PARAMETER, GpuProfile
from prism.scheduling.memory import kv_bytes_per_token, weights_bytes
from prism.scheduling.profiles import FOLDER

H200_BYTES_PER_S = 4.8e12
H100_BYTES_PER_S = 3.35e12
H100_MEMORY_BYTES = 80_000_000_000
MIB = 1 << 20


def fit_h200(measured: dict[str, Any]) -> GpuProfile:
    """The profile that the measurements amount to."""
    assumed = measured["assumed"]
    operations_per_s = assumed["model_flops_utilisation"] * assumed["peak_operations_per_s"]
    decode_fixed_s, per_byte, per_sequence = _fit_decode(measured["decode_steps"], operations_per_s)
    path_s, prefill_per_byte = _fit_first_tokens(measured["first_tokens"], operations_per_s)
    wake_fixed_s, bus_per_byte = _line([(row["bytes"], row["seconds"]) for row in measured["wakes"]])
    eager = measured["eager_step"]
    prefill_fixed_s = eager["seconds"] - weights_bytes(_facts(eager["model"]), None) * prefill_per_byte
    rows = [row["source"] for group in ("decode_steps", "first_tokens", "wakes") for row in measured[group]]
    return GpuProfile(
        name="h200",
        memory_bytes=measured["memory_bytes"],
        operations_per_s=operations_per_s,
        memory_bytes_per_s=1 / per_byte,
        bus_bytes_per_s=1 / bus_per_byte,
        prefill_fixed_s=prefill_fixed_s,
        decode_fixed_s=decode_fixed_s,
        decode_sequence_s=per_sequence,
        wake_fixed_s=wake_fixed_s,
        doze_s=float(np.median(measured["dozes_s"])),
        thaw_fixed_s=assumed["thaw_fixed_s"],
        freeze_s=assumed["freeze_s"],
        shell_s=assumed["shell_s"],
        context_bytes=round(float(np.mean(measured["dozing_mib"])) * MIB),
        source=f"fitted from {measured['gpu']}: {'; '.join([*rows, eager['source']])}. "
        f"Assumed: {assumed['why']}",
        prefill_bytes_per_s=1 / prefill_per_byte,
        request_s=path_s - prefill_fixed_s,
    )


def scaled_h100(h200: GpuProfile) -> GpuProfile:
    """An 80 GB H100-class GPU by the published ratio of memory bandwidths; the rest is the same."""
    ratio = H100_BYTES_PER_S / H200_BYTES_PER_S
    return msgspec.structs.replace(
        h200,
        name="h100-80gb",
        memory_bytes=H100_MEMORY_BYTES,
        memory_bytes_per_s=h200.memory_bytes_per_s * ratio,
        source="SCALED, not measured: the profile h200 with memory bandwidth times "
        f"{H100_BYTES_PER_S / 1e12:g}/{H200_BYTES_PER_S / 1e12:g} (published figures); "
        "arithmetic, launches and bus as there",
    )


def _facts(model: str) -> ModelFacts:
    return read_model_facts(model, model)


def _fit_decode(rows: list[dict[str, Any]], operations_per_s: float) -> tuple[float, float, float]:
    """Seconds of a step: fixed, per byte read, per sequence."""
    matrix, target = [], []
    for row in rows:
        facts = _facts(row["model"])
        read = weights_bytes(facts, None) + row["kv_tokens"] * kv_bytes_per_token(facts, None)
        arithmetic = row["sequences"] * OPERATIONS_PER_PARAMETER * facts.parameters / operations_per_s
        matrix.append([1.0, read / 1e9, row["sequences"]])
        target.append(row["step_s"] - arithmetic)
    fixed, per_gb, per_sequence = np.linalg.lstsq(np.array(matrix), np.array(target), rcond=None)[0]
    return float(fixed), float(per_gb) / 1e9, float(per_sequence)


def _fit_first_tokens(rows: list[dict[str, Any]], operations_per_s: float) -> tuple[float, float]:
    """Seconds of a first token: on the way and in any prefill, and per byte of weights."""
    points = []
    for row in rows:
        facts = _facts(row["model"])
        arithmetic = row["prompt_tokens"] * OPERATIONS_PER_PARAMETER * facts.parameters / operations_per_s
        points.append((weights_bytes(facts, None), row["seconds"] - arithmetic))
    return _line(points)


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope by least squares."""
    slope, intercept = np.polyfit([x / 1e9 for x, _ in points], [y for _, y in points], 1)
    return float(intercept), float(slope) / 1e9


def main() -> None:
    """Write both profiles."""
    source = files("prism.bench.calibration").joinpath("h200_measurements.json")
    h200 = fit_h200(json.loads(source.read_text()))
    for profile in (h200, scaled_h100(h200)):
        write_profile(profile, FOLDER / f"{profile.name}.json")


if __name__ == "__main__":
    main()
