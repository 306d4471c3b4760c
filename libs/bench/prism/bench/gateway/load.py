"""One process of load: many connections, each asking again as soon as it is answered.

Run as `python -m prism.bench.gateway.load`; a `LoadOrder` comes on stdin as one line of JSON, "ready" goes
out once all connections stand, any further line starts the load, and a `LoadReport` ends it. What it reads
is `stamped` text (`prism.common.simulated_text`), so each group of characters tells how long it took.
"""

import asyncio
import sys
import time
from typing import cast

import msgspec
import uvloop

from prism.bench.gateway.http_stream import StreamedAnswer, post
from prism.common.simulated_text import STAMPED_GROUP, stamp_age_us

CONNECT_DEADLINE_S = 20.0
ANSWER_DEADLINE_S = 60.0
WARM_GROUPS = 2
"""Groups of each answer that do not count: they carry the rush of all streams' beginning."""


class LoadOrder(msgspec.Struct, frozen=True):
    """`streams` connections to `host`:`port` that ask for `tokens` tokens again and again until `seconds`
    have passed, or `rounds` times each where that is not 0."""

    host: str
    port: int
    model: str
    streams: int
    tokens: int
    rounds: int = 0
    seconds: float = 0.0


class LoadReport(msgspec.Struct):
    """What came. Times in microseconds; `tokens` and `requests` count only what came before the time was up,
    `failures` says how requests failed."""

    tokens: int = 0
    requests: int = 0
    lags_us: list[int] = []
    first_us: list[int] = []
    failures: list[str] = []


def now_us() -> int:
    """Microseconds on the machine's monotonic clock, as the engines' stamps."""
    return time.monotonic_ns() // 1000


class Connection(asyncio.Protocol):
    """One connection. `done` is set when it has nothing more to do."""

    def __init__(self, order: LoadOrder, report: LoadReport) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._report = report
        self._rounds = order.rounds
        self._until_us = 0
        self._transport: asyncio.Transport | None = None
        body = {
            "model": order.model,
            "messages": [{"role": "user", "content": "Say numbers."}],
            "max_tokens": order.tokens,
            "stream": True,
        }
        self._request = post(f"{order.host}:{order.port}", "/v1/chat/completions", msgspec.json.encode(body))
        self._expected = order.tokens
        self._answer = StreamedAnswer()
        self._asked_us = 0
        self._length = 0
        self._group = b""
        self._group_us = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected; nothing is asked before `begin`."""
        # uvloop's transports are none by their class.
        self._transport = cast(asyncio.Transport, transport)

    def begin(self, until_us: int) -> None:
        """Ask; the last answer that counts is whole by `until_us` (0: no end)."""
        self._until_us = until_us
        self._ask()

    def _ask(self) -> None:
        assert self._transport is not None
        self._answer = StreamedAnswer()
        self._length = 0
        self._group = b""
        self._asked_us = now_us()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Some of an answer."""
        now = now_us()
        text = self._answer.feed(data)
        if text:
            self._take(text, now)
        if self._answer.ended:
            self._end(now)

    def _take(self, text: bytes, now: int) -> None:
        report = self._report
        if not self._length and not self._group:
            report.first_us.append(now - self._asked_us)
        if not self._until_us or now < self._until_us:
            report.tokens += len(text)
        group = self._group
        if not group:
            self._group_us = now
        group += text
        while len(group) >= STAMPED_GROUP:
            if self._length >= WARM_GROUPS * STAMPED_GROUP:
                report.lags_us.append(stamp_age_us(group[:STAMPED_GROUP].decode(), self._group_us))
            self._length += STAMPED_GROUP
            group = group[STAMPED_GROUP:]
            self._group_us = now
        self._group = group

    def _end(self, now: int) -> None:
        length = self._length + len(self._group)
        in_time = not self._until_us or now < self._until_us
        if self._answer.status != 200 or length != self._expected:
            self._report.failures.append(f"status {self._answer.status} with {length} tokens")
        elif in_time:
            self._report.requests += 1
        self._rounds -= 1
        if in_time and self._rounds != 0:
            self._ask()
        else:
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        """The other side closed: a failure, if an answer was awaited."""
        if not self.done.done():
            self._report.failures.append(f"connection lost: {error or 'closed'}")
            self._finish()

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def close(self) -> None:
        """Hang up."""
        self._finish()
        if self._transport is not None:
            self._transport.abort()


async def run(order: LoadOrder) -> LoadReport:
    """Carry out `order`; waits for a line on stdin once connected."""
    loop = asyncio.get_running_loop()
    report = LoadReport()
    connections = []
    async with asyncio.timeout(CONNECT_DEADLINE_S):
        for _ in range(order.streams):
            _, connection = await loop.create_connection(
                lambda: Connection(order, report), order.host, order.port
            )
            connections.append(connection)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    until = now_us() + int(order.seconds * 1e6) if order.seconds else 0
    for connection in connections:
        connection.begin(until)
    limit_s = order.seconds if order.seconds else ANSWER_DEADLINE_S
    _, late = await asyncio.wait([connection.done for connection in connections], timeout=limit_s)
    if late and not order.seconds:
        report.failures.append(f"{len(late)} streams did not end within {limit_s:.0f} s")
    for connection in connections:
        connection.close()
    return report


def main() -> None:
    """Be one load process."""
    order = msgspec.json.decode(sys.stdin.readline(), type=LoadOrder)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(run(order))
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
