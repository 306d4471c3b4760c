"""The ranks of one engine under tensor parallelism: a process each, of which rank 0 speaks to the worker.

Whatever the worker says reaches the other ranks through SGLang's own broadcast of requests; what all of them
have to come to together (memory, doze, wake) is agreed on over the group's CPU channel.
"""

import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import torch
from sglang.srt.distributed import parallel_state

from prism.common.errors import PrismError
from prism.common.process import die_with_parent
from prism.gpu_worker.engine_protocol import FromEngine, StartEngine, ToEngine


class Link(Protocol):
    """What an engine needs of its way to the worker."""

    def send(self, message: FromEngine) -> None:
        """Tell the worker. Raises WorkerGone."""
        ...

    def receive_waiting(self) -> list[ToEngine]:
        """What the worker has said. Raises WorkerGone."""
        ...

    def wait(self) -> None:
        """Sleep until the worker says something, or is gone."""
        ...


class SilentLink:
    """The link of a rank that nobody speaks to: what it says, rank 0 says too."""

    def send(self, message: FromEngine) -> None:
        """Dropped."""

    def receive_waiting(self) -> list[ToEngine]:
        """Never anything: it comes by SGLang's broadcast."""
        return []

    def wait(self) -> None:
        """Its next broadcast is waited for anyway."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the ranks of its engine."""

    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """The values that all ranks give, by rank. Every rank calls it, once SGLang has its groups."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        group = parallel_state.get_tp_group().cpu_group
        torch.distributed.all_gather_object(values, value, group=group)
        return values

    def together(self, run: Callable[[], None], undo: Callable[[], None] | None = None) -> None:
        """Run on all ranks, or on none: where one fails, the others `undo`. Raises the first rank's
        PrismError on every one."""
        failure = None
        try:
            run()
        except PrismError as error:
            failure = error.body
        failures = [each for each in self.gather(failure) if each is not None]
        if failures:
            if failure is None and undo is not None:
                undo()
            raise PrismError.from_body(failures[0])


def fork_ranks(start: StartEngine, connection: socket.socket) -> tuple[Ranks, StartEngine]:
    """Fork the other ranks of an engine; returns who each process is, and its part of what was asked for.

    Only where nothing has threads or a CUDA context yet. The others die with rank 0, and have no connection.
    """
    size = max(1, len(start.rank_layouts))
    rank = 0
    for other in range(1, size):
        if os.fork() == 0:
            die_with_parent(signal.SIGKILL)
            connection.close()
            rank = other
            break
    if size == 1:
        return Ranks(), start
    part = msgspec.structs.replace(
        start,
        layout=start.rank_layouts[rank],
        kv_bytes=start.kv_bytes // size,
        weights_bytes=-(-start.weights_bytes // size),
    )
    return Ranks(rank, size), part


def meet_in_memory() -> None:
    """Have ranks find each other through memory instead of a TCP port: nothing to collide with, nothing that
    an engine killed here would leave on disk. Before they are forked: all use the same descriptor."""
    group = os.memfd_create("prism-process-group")
    os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file:///proc/self/fd/{group}"
