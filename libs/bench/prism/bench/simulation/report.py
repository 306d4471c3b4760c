"""What a run amounts to: attainment, goodput, latencies, moves; per model and in all."""

from typing import Any

import numpy as np

from prism.bench.simulation.simulation import Outcome


def report(outcome: Outcome) -> dict[str, Any]:
    """One object for programs. Attainments are shares of all requests: one that was not served met nothing.
    Percentiles are of those served, None when there were none. `gpu_seconds` is the time that GPUs had a
    model active on them; of a model, the time that it was active, times its GPUs."""
    trace = outcome.trace
    ttft, tpot = np.array(outcome.ttft_s), np.array(outcome.tpot_s)
    model_of = np.array(trace.model)
    ttft_slo = np.array([model.ttft_slo_s for model in outcome.models])
    tpot_slo = np.array([model.tpot_slo_s for model in outcome.models])
    ttft_met = ttft <= ttft_slo[model_of] * (1 + 1e-9)
    tpot_met = tpot <= tpot_slo[model_of] * (1 + 1e-9)
    duration = max(trace.duration_s, 1e-9)

    def figures(mask: Any) -> dict[str, Any]:
        count = int(mask.sum())
        both = int((ttft_met & tpot_met & mask).sum())
        served = mask & ~np.isnan(ttft)
        return {
            "requests": count,
            "completed": int(served.sum()),
            "ttft_attainment": _share(int((ttft_met & mask).sum()), count),
            "tpot_attainment": _share(int((tpot_met & mask).sum()), count),
            "both_attainment": _share(both, count),
            "goodput_rps": round(both / duration, 6),
            **_percentiles("ttft", ttft[served]),
            **_percentiles("tpot", tpot[served]),
        }

    whole = figures(np.ones(len(trace), dtype=bool))
    whole |= {
        "activations": sum(outcome.activations),
        "migrations": sum(outcome.migrations),
        "gpu_seconds": round(outcome.held_gpu_s, 3),
        "gpu_busy_seconds": round(outcome.busy_gpu_s, 3),
        "duration_s": round(duration, 3),
        "end_s": round(outcome.end_s, 3),
        "longest_queue": outcome.longest_queue,
        "retracted": outcome.retracted,
        "plans": outcome.plans,
        "admission_decisions": outcome.decisions,
        "failed_commands": outcome.failed_commands,
    }
    by_model = {model.name: figures(model_of == model.index) for model in outcome.models}
    whole["models"] = {
        model.name: {
            **by_model[model.name],
            "ttft_slo_ms": round(model.ttft_slo_s * 1e3, 3),
            "tpot_slo_ms": round(model.tpot_slo_s * 1e3, 4),
            "activations": outcome.activations[model.index],
            "migrations": outcome.migrations[model.index],
            "gpu_seconds": round(outcome.active_s[model.index], 3),
            **_note(by_model[model.name], outcome.notes.get(model.name)),
        }
        for model in outcome.models
    }
    return whole


def _note(figures: dict[str, Any], note: str | None) -> dict[str, str]:
    """Why requests of a model were not served, as its scheduler said last."""
    return {"note": note} if note and figures["completed"] < figures["requests"] else {}


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def _percentiles(name: str, values: Any) -> dict[str, float | None]:
    return {
        f"p{percent}_{name}_ms": round(float(np.percentile(values, percent)) * 1e3, 4)
        if len(values)
        else None
        for percent in (50, 99)
    } | {f"mean_{name}_ms": round(float(values.mean()) * 1e3, 4) if len(values) else None}
