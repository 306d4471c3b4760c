"""Queues and engines for tests of admission policies."""

from math import inf

from hypothesis import strategies as st

from prism.scheduling.admission import EngineCapacity, QueuedRequest

FOREVER = 1e9
RATE = 100.0
"""Prompt tokens per second of the engines here."""


def queued(
    rid: str,
    model: str = "a",
    arrival: float = 0.0,
    prompt: int = 100,
    slo: float = inf,
    *,
    output: int = 10,
    deadline: float = FOREVER,
    priority: int = 0,
    weight: float = 1.0,
    expected: int | None = None,
) -> QueuedRequest:
    """A request; 100 prompt tokens take a second."""
    return QueuedRequest(
        rid,
        model,
        arrival,
        prompt,
        output,
        deadline,
        priority,
        slo,
        expected,
        weight,
    )


def engine(
    running: int = 0,
    max_running: int = 1000,
    free: int = 10**9,
    *,
    accepting: bool = True,
    decoding: int = 0,
    step: float = 0.0,
    tpot: float = inf,
    fixed: float = 0.0,
    chunk: int = 10**9,
    waiting: int = 0,
    due: float = inf,
) -> EngineCapacity:
    """An engine that prefills RATE tokens a second; so many wait for its next pass, the first due then."""
    return EngineCapacity(
        running,
        max_running,
        free,
        accepting,
        RATE,
        fixed,
        decoding,
        step,
        tpot,
        pass_tokens=chunk,
        open_tokens=waiting,
        open_due_s=due,
    )


def queues(most: int, least: int = 0) -> st.SearchStrategy[list[QueuedRequest]]:
    """Queues of models a and b. Times are whole seconds, so that sums are exact."""
    drawn = st.tuples(
        st.sampled_from(["a", "b"]),
        st.integers(-6, 0),
        st.integers(1, 6),
        st.integers(1, 20),
    )
    return st.lists(drawn, min_size=least, max_size=most).map(
        lambda rows: [
            queued(f"{index:03}", model, float(arrival), seconds * int(RATE), float(slo))
            for index, (model, arrival, seconds, slo) in enumerate(rows)
        ]
    )
