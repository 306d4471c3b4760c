"""Requests over time, for some models: columns, and what can be done to them."""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prism.common.errors import ErrorCode, PrismError


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival, a column a field: seconds from the start of the trace, index
    into `models`, tokens of the prompt, tokens generated (at least 1 each)."""

    models: tuple[str, ...]
    arrival_s: "array[float]"
    model: "array[int]"
    prompt_tokens: "array[int]"
    output_tokens: "array[int]"

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """From the start to the last arrival."""
        return self.arrival_s[-1] if self.arrival_s else 0.0

    def counts(self) -> dict[str, int]:
        """Requests of each model."""
        found = Counter(self.model)
        return {name: found[index] for index, name in enumerate(self.models)}


def trace_of(
    models: Sequence[str], rows: Sequence[tuple[float, int, int, int]], *, sort: bool = True
) -> Trace:
    """A trace of `rows`: arrival, index of the model, prompt tokens, output tokens."""
    ordered = sorted(rows) if sort else rows
    return Trace(
        tuple(models),
        array("d", (row[0] for row in ordered)),
        array("l", (row[1] for row in ordered)),
        array("l", (row[2] for row in ordered)),
        array("l", (row[3] for row in ordered)),
    )


def scaled(trace: Trace, rate_scale: float) -> Trace:
    """The same requests with every gap between arrivals divided by `rate_scale`."""
    if not rate_scale > 0:
        raise PrismError(ErrorCode.INVALID_REQUEST, f"a rate scale of {rate_scale}: must be above 0")
    if rate_scale == 1:
        return trace
    arrivals = array("d", (arrival / rate_scale for arrival in trace.arrival_s))
    return Trace(trace.models, arrivals, trace.model, trace.prompt_tokens, trace.output_tokens)


def replicated(trace: Trace, copies: int) -> Trace:
    """`copies` of the trace at once, each later than the one before by an equal part of the mean gap, so that
    copies of a request do not arrive at one instant: the rate is `copies` times as high."""
    if copies < 1:
        raise PrismError(ErrorCode.INVALID_REQUEST, f"{copies} copies of a trace: must be at least 1")
    shift = trace.duration_s / max(1, len(trace)) / copies
    rows = [
        (trace.arrival_s[i] + copy * shift, trace.model[i], trace.prompt_tokens[i], trace.output_tokens[i])
        for copy in range(copies)
        for i in range(len(trace))
    ]
    return trace_of(trace.models, rows)


def head(trace: Trace, seconds: float) -> Trace:
    """The requests of the first `seconds`."""
    rows = [row for row in _rows(trace) if row[0] < seconds]
    return trace_of(trace.models, rows, sort=False)


def mapped(trace: Trace, names: Sequence[str], mapping: Mapping[str, str] | None = None) -> Trace:
    """The trace with its models' names replaced by those of `names`, the models that are to serve it.

    By `mapping` where it says so; a name that is among `names` stays; the rest go by rank: the most asked for
    of the trace to the first of `names` that nobody has yet, and so on, beginning again when there are more.
    Raises PrismError(invalid_request) for a mapping that names what is not there.
    """
    mapping = dict(mapping or {})
    for source, target in mapping.items():
        if source not in trace.models or target not in names:
            where = "the trace" if source not in trace.models else "the placement file"
            name = source if source not in trace.models else target
            raise PrismError(ErrorCode.INVALID_REQUEST, f"model mapping: {where} has no model {name!r}")
    target_of = {name: mapping.get(name, name) for name in trace.models if name in mapping or name in names}
    taken = set(target_of.values())
    counts = trace.counts()
    rest = sorted(
        (name for name in trace.models if name not in target_of), key=lambda name: (-counts[name], name)
    )
    open_names = [name for name in names if name not in taken] or list(names)
    for rank, name in enumerate(rest):
        target_of[name] = open_names[rank % len(open_names)]
    index = {name: position for position, name in enumerate(names)}
    model = array("l", (index[target_of[trace.models[m]]] for m in trace.model))
    return Trace(tuple(names), trace.arrival_s, model, trace.prompt_tokens, trace.output_tokens)


def only(trace: Trace, model: int) -> Trace:
    """The requests of one model, by its index."""
    return trace_of(trace.models, [row for row in _rows(trace) if row[1] == model], sort=False)


def _rows(trace: Trace) -> list[tuple[float, int, int, int]]:
    return list(zip(trace.arrival_s, trace.model, trace.prompt_tokens, trace.output_tokens, strict=True))
