"""From readings to rows: what each figure is, and what was aimed at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from prism.bench.gateway.cores import ALL, PINNED
from prism.bench.gateway.measuring import Measured, percentile
from prism.bench.results import Row, row

TARGET_P50_MS = 2.0
TARGET_TOKENS_PER_S = 50_000
TARGET_OVER_LITELLM = 5.0

ADDED = (
    "from the simulated engine's emission of a token to its arrival at the client; "
    "worker and bus are part of it"
)
ADDED_BY_OTHERS = "from the backend's emission of a token to its arrival at the client"
DIRECT = "the same measurement without any gateway: what the backend and the client cost"
CPU_OF = {
    "prism": "simulated engines; per CPU second of the gateway process",
    "direct": "per CPU second of the backend's process: there is no gateway",
    "litellm": "per CPU second of the proxy's processes",
    "router": "per CPU second of the router's processes, whose threads may use several cores",
}
MERGED = "met where waiting frames merge: what is there for a stream leaves in one write, an event each"


@dataclass(slots=True)
class Readings:
    """What was measured, by stack and load; `absent` says why a stack was not."""

    taken: dict[str, dict[str, Measured]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def taker(self, stack: str) -> Callable[[str, Measured], None]:
        """Takes the readings of `stack`."""
        of_stack = self.taken.setdefault(stack, {})

        def take(name: str, measured: Measured) -> None:
            of_stack[name] = measured
            print(f"{stack} {name}: {_short(measured)}", flush=True)

        return take

    def get(self, stack: str, name: str) -> Measured | None:
        """A reading, None when there is none."""
        return self.taken.get(stack, {}).get(name)

    def summary(self) -> dict[str, dict[str, dict[str, object]]]:
        """All of it, for whoever wants to recompute a figure."""
        return {
            stack: {name: _summary(measured) for name, measured in taken.items()}
            for stack, taken in self.taken.items()
        }


def _summary(measured: Measured) -> dict[str, object]:
    return {
        "requests": measured.requests,
        "tokens": measured.tokens,
        "failures": len(measured.failures),
        "first_failure": measured.failures[0] if measured.failures else "",
        "lag_samples": len(measured.lags_ms),
        "gateway_cpu_s": round(measured.cpu_s, 3),
        "wall_s": round(measured.wall_s, 3),
        "load_processes": measured.load_processes,
    }


def _short(measured: Measured) -> str:
    parts = [f"{measured.requests} requests, {measured.tokens} tokens in {measured.wall_s:.1f} s"]
    parts.append(f"{measured.busy:.2f} cores, {measured.tokens_per_cpu_s:.0f} tokens/CPU s")
    if measured.lags_ms:
        parts.append(f"lag p50 {_at(measured, 0.5):.2f} ms, p99 {_at(measured, 0.99):.2f} ms")
    if measured.failures:
        parts.append(f"{len(measured.failures)} FAILED, e.g. {measured.failures[0]}")
    return "; ".join(parts)


def _at(measured: Measured, share: float) -> float:
    value = percentile(measured.lags_ms, share)
    return -1.0 if value is None else value


def rows_of(readings: Readings, streams: Sequence[int]) -> list[Row]:
    """All figures. Those of other stacks begin with their name."""
    rows = _rows_of_stack(readings, "prism", "", streams)
    coalesced = readings.get("prism", "tokens_coalesced")
    rows.append(
        row(
            "tokens_per_s_coalesced_20ms",
            None if coalesced is None else round(coalesced.tokens_per_cpu_s),
            "tokens/s",
            note=f"{CPU_OF['prism']}; 20 ms of tokens in a frame",
        )
    )
    for stack in ("direct", "litellm", "router"):
        rows += _rows_of_stack(readings, stack, f"{stack}_", streams)
    own = readings.get("prism", "requests")
    for stack, target in (("litellm", TARGET_OVER_LITELLM), ("router", None)):
        other = readings.get(stack, "requests")
        value = None
        if own is not None and other is not None and other.requests:
            value = round(own.requests_per_cpu_s / other.requests_per_cpu_s, 2)
        note = readings.absent.get(stack, "simulated engines; same run, same machine, same text and pace")
        rows.append(
            row(f"requests_per_core_over_{stack}", value, "times", target=target, better="higher", note=note)
        )
    failures = [failure for each in readings.taken.get("prism", {}).values() for failure in each.failures]
    note = f"e.g. {failures[0]}" if failures else ""
    rows.append(row("failed_requests", len(failures), "requests", target=0, better="equal", note=note))
    return [_with_reason(each) for each in rows]


def _with_reason(judged: Row) -> Row:
    """A row that missed its target says why, as far as this run can tell."""
    if judged.met is not False:
        return judged
    why = "not measured" if judged.value is None else f"missed {_circumstances()}"
    if judged.figure == "added_p50_ms_64":
        why += ": see 'What falls short' in docs/gateway-performance.md"
    return replace(judged, note="; ".join(part for part in (judged.note, why) if part))


def _rows_of_stack(readings: Readings, stack: str, prefix: str, streams: Sequence[int]) -> list[Row]:
    ours = stack == "prism"
    absent = readings.absent.get(stack, "")
    rows = []
    first = readings.get(stack, "first")
    rows.append(
        row(
            f"{prefix}added_first_token_p50_ms_1",
            None if first is None else _rounded(percentile(first.first_ms, 0.5)),
            "ms",
            note=absent or "from request to first token, with a simulated engine that takes no time",
        )
    )
    for count in streams:
        measured = readings.get(stack, f"latency_{count}")
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            value = None if measured is None else _rounded(percentile(measured.lags_ms, share))
            target = TARGET_P50_MS if ours and name == "p50" and count == 64 else None
            note = absent or (DIRECT if stack == "direct" else ADDED if ours else ADDED_BY_OTHERS)
            if measured is not None and measured.failures:
                note += f"; {len(measured.failures)} failures, e.g. {measured.failures[0]}"
            rows.append(row(f"{prefix}added_{name}_ms_{count}", value, "ms", target=target, note=note))
    tokens = readings.get(stack, "tokens")
    per_core = CPU_OF[stack]
    note = absent or per_core
    if tokens is not None:
        rate = tokens.tokens / tokens.wall_s
        note = f"{per_core}; {rate:.0f} tokens/s went through at {tokens.busy:.2f} cores"
        if ours:
            note += f"; {MERGED}"
    rows.append(
        row(
            f"{prefix}tokens_per_s_one_token_frames",
            None if tokens is None else round(tokens.tokens_per_cpu_s),
            "tokens/s",
            target=TARGET_TOKENS_PER_S if ours else None,
            better="higher",
            note=note,
        )
    )
    paced = readings.get(stack, f"latency_{streams[-1]}")
    rows.append(
        row(
            f"{prefix}tokens_per_s_one_token_writes",
            None if paced is None else round(paced.tokens_per_cpu_s),
            "tokens/s",
            note=absent or f"{per_core}, at {streams[-1]} streams' pace: each token is a write of its own",
        )
    )
    requests = readings.get(stack, "requests")
    rows.append(
        row(
            f"{prefix}requests_per_core",
            None if requests is None else round(requests.requests_per_cpu_s, 1),
            "requests/s",
            note=absent or f"{per_core}; streamed chat completions of 16 tokens",
        )
    )
    return rows


def _circumstances() -> str:
    if PINNED:
        return "with a core for the gateway alone"
    return f"on {len(ALL)} cores that gateway, load, engine and bus share"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
