"""Trace files: Prism's own columns, Azure's LLM inference traces, BurstGPT. The header says which it is."""

import csv
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path

from prism.bench.traces.trace import Trace, trace_of
from prism.common.errors import ErrorCode, PrismError

PLAIN = ("arrival_s", "model", "prompt_tokens", "output_tokens")
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT = ("Timestamp", "Model", "Request tokens", "Response tokens")
FORMATS = f"{','.join(PLAIN)} | {','.join(AZURE)} | {','.join(BURSTGPT)},..."

Row = tuple[float, str, int, int]


def read_trace(paths: Sequence[Path]) -> Trace:
    """The requests of all `paths` as one trace that begins with the first of them.

    A file in Azure's format holds one service, whose name is that of the file. Requests without a generated
    token (BurstGPT holds failed ones) are left out. Raises PrismError(invalid_request) that names the file,
    the line and what is wrong with it.
    """
    rows: list[Row] = []
    for path in paths:
        rows += _read_file(path)
    if not rows:
        named = ", ".join(str(path) for path in paths)
        raise PrismError(ErrorCode.INVALID_REQUEST, f"{named}: no requests in it")
    names = tuple(dict.fromkeys(sorted(row[1] for row in rows)))
    index = {name: position for position, name in enumerate(names)}
    # Wall-clock times count from the first request; the project's own times are seconds from a start.
    start = min(row[0] for row in rows) if max(row[0] for row in rows) > 1e8 else 0.0
    return trace_of(names, [(row[0] - start, index[row[1]], row[2], row[3]) for row in rows])


def write_trace(trace: Trace, path: Path) -> None:
    """Write `trace` in Prism's own columns, times to the tenth of a millisecond."""
    columns = zip(trace.arrival_s, trace.model, trace.prompt_tokens, trace.output_tokens, strict=True)
    lines = [f"{arrival:.4f},{trace.models[m]},{prompt},{output}" for arrival, m, prompt, output in columns]
    path.write_text("\n".join([",".join(PLAIN), *lines]) + "\n")


def _read_file(path: Path) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = [name.strip() for name in next(lines, [])]
            parse = _parser(path, header)
            return list(_rows(path, lines, len(header), parse))
    except OSError as error:
        raise PrismError(ErrorCode.INVALID_REQUEST, f"trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PrismError(ErrorCode.INVALID_REQUEST, f"trace {path} is not text: {error.reason}") from error
    except csv.Error as error:
        raise PrismError(ErrorCode.INVALID_REQUEST, f"trace {path} is not CSV: {error}") from error


def _rows(
    path: Path, lines: Iterable[list[str]], columns: int, parse: Callable[[list[str]], Row]
) -> Iterable[Row]:
    for number, fields in enumerate(lines, 2):
        if not fields:
            continue
        try:
            if len(fields) < columns:
                raise ValueError(f"{len(fields)} fields where the header has {columns}")
            row = parse(fields)
        except ValueError as error:
            raise PrismError(ErrorCode.INVALID_REQUEST, f"trace {path}, line {number}: {error}") from error
        if row[3] > 0:
            yield row


def _parser(path: Path, header: list[str]) -> Callable[[list[str]], Row]:
    for columns in (PLAIN, BURSTGPT, AZURE):
        if set(columns) <= set(header):
            places = [header.index(name) for name in columns]
            break
    else:
        shown = ",".join(header) or "nothing"
        raise PrismError(
            ErrorCode.INVALID_REQUEST, f"trace {path}, line 1: columns {shown}; known are {FORMATS}"
        )
    if columns is AZURE:
        when, prompt, output = places

        def parse_azure(fields: list[str]) -> Row:
            return _time(fields[when]), path.stem, _count(fields[prompt], 1), _count(fields[output], 0)

        return parse_azure
    when, model, prompt, output = places

    def parse(fields: list[str]) -> Row:
        name = fields[model].strip()
        if not name:
            raise ValueError("no model")
        return _seconds(fields[when]), name, _count(fields[prompt], 1), _count(fields[output], 0)

    return parse


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"time {text!r} is not a number of seconds") from None
    if not 0 <= value < float("inf"):
        raise ValueError(f"time {text!r}: must be a number from 0 on")
    return value


def _time(text: str) -> float:
    text = text.strip()
    try:
        # Azure writes seven digits of a second, one more than Python reads.
        moment, dot, fraction = text.partition(".")
        return datetime.fromisoformat(f"{moment}{dot}{fraction[:6]}").timestamp()
    except ValueError:
        try:
            return _seconds(text)
        except ValueError:
            raise ValueError(f"TIMESTAMP {text!r} is neither a date with a time nor seconds") from None


def _count(text: str, least: int) -> int:
    try:
        value = int(float(text))
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a number of tokens") from None
    if value < 0:
        raise ValueError(f"{value} tokens: must not be negative")
    return max(value, least)
