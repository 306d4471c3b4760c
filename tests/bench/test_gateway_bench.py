"""The gateway's benchmark measures what it says: its reader, its backend, its figures."""

import asyncio
import sys

import msgspec
import pytest

from prism.bench.gateway.figures import Readings, rows_of
from prism.bench.gateway.http_stream import StreamedAnswer
from prism.bench.gateway.measuring import Measured, measure, percentile, processes_for, reported
from prism.bench.gateway.stacks import openai_backend

pytestmark = pytest.mark.core


def events(*contents: str) -> bytes:
    told = [{"choices": [{"delta": {"content": content}}]} for content in contents]
    return b"".join(b"data: " + msgspec.json.encode(each) + b"\n\n" for each in told) + b"data: [DONE]\n\n"


def chunked(body: bytes, size: int) -> bytes:
    cut = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in cut) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
@pytest.mark.parametrize("received", [1, 13, 100_000])
def test_the_reader_finds_the_text_however_it_was_cut(size: int, received: int) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = head + chunked(events("", "1", "23", "."), size)
    answer = StreamedAnswer()
    text = b"".join(answer.feed(data[start : start + received]) for start in range(0, len(data), received))
    assert (answer.status, text, answer.ended) == (200, b"123.", True)


def test_the_reader_takes_an_answer_of_known_length() -> None:
    answer = StreamedAnswer()
    assert answer.feed(b"HTTP/1.1 503 Unavailable\r\nContent-Length: 5\r\n\r\nso") == b""
    assert not answer.ended
    answer.feed(b"rry")
    assert (answer.status, answer.ended) == (503, True)


async def test_lags_of_the_backend_alone_are_measured_and_no_token_is_missed() -> None:
    async with openai_backend() as backend:
        await backend.pace(1)
        measured = await measure(backend.alone(), 4, 60, rounds=2)
    assert measured.failures == []
    assert (measured.requests, measured.tokens) == (8, 480)
    # Five groups an answer, of which the first two warm up.
    assert len(measured.lags_ms) == 8 * 3
    assert 0 <= min(measured.lags_ms) < 10_000
    assert len(measured.first_ms) == 8


@pytest.mark.parametrize(
    ("program", "failure"),
    [
        ("raise SystemExit(3)", "ended without its report, with status 3"),
        ("import os; os.kill(os.getpid(), 9)", "ended without its report, with status -9"),
        ("""print('{"tokens": 1', end='')""", "ended without its report, with status 0"),
        ("print('Traceback')", "said what is no report"),
    ],
)
async def test_a_load_process_that_does_not_report_is_a_failure_of_the_reading(
    program: str, failure: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    report = await reported(process)
    await process.wait()
    assert (report.tokens, len(report.failures)) == (0, 1)
    assert failure in report.failures[0]


def test_figures_that_could_not_be_measured_stay_with_the_reason() -> None:
    readings = Readings(absent={"litellm": "not installed"})
    own = Measured(1000, 100, [1.0, 3.0, 2.5], [5.0], [], cpu_s=0.01, wall_s=1.0, load_processes=2)
    for name in ("latency_64", "tokens", "requests"):
        readings.taken.setdefault("prism", {})[name] = own
    rows = {row.figure: row for row in rows_of(readings, (1, 64))}
    assert (rows["added_p50_ms_64"].value, rows["added_p50_ms_64"].met) == (2.5, False)
    assert (rows["tokens_per_s_one_token_frames"].value, rows["tokens_per_s_one_token_frames"].met) == (
        100_000,
        True,
    )
    over = rows["requests_per_core_over_litellm"]
    assert (over.value, over.met, over.note) == (None, False, "not installed; not measured")


def test_a_missed_target_keeps_its_reason_beside_the_failures() -> None:
    slow = Measured(10, 1, [9.0], [9.0], ["status 500"], cpu_s=1.0, wall_s=1.0, load_processes=2)
    readings = Readings(taken={"prism": {"latency_64": slow, "tokens": slow, "requests": slow}})
    rows = {row.figure: row for row in rows_of(readings, (64,))}
    assert all(row.note for row in rows.values() if row.met is False)
    note = rows["added_p50_ms_64"].note
    assert "simulated" in note
    assert "1 failures, e.g. status 500" in note
    assert "What falls short" in note
    assert "merge" in rows["tokens_per_s_one_token_frames"].note
    assert "status 500" in rows["failed_requests"].note


def test_cpu_time_is_told_of_the_process_that_it_is_of() -> None:
    some = Measured(10, 1, [1.0], [1.0], [], cpu_s=1.0, wall_s=1.0, load_processes=2)
    stacks = ("prism", "direct", "litellm", "router")
    rows = {
        row.figure: row for row in rows_of(Readings({stack: {"requests": some} for stack in stacks}), (1,))
    }
    assert "gateway process" in rows["requests_per_core"].note
    assert "there is no gateway" in rows["direct_requests_per_core"].note
    assert "router's processes" in rows["router_requests_per_core"].note


def test_several_streams_are_never_read_by_one_process_alone() -> None:
    assert processes_for(1, 1) == 1
    assert processes_for(2, 1) == 2
    assert processes_for(64, 1) >= 2
    assert processes_for(64, 5) >= 5


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([], 0.5) is None
    assert [percentile([3.0, 1.0, 2.0, 4.0], share) for share in (0.0, 0.5, 0.99)] == [1.0, 3.0, 4.0]
