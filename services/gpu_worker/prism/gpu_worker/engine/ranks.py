"""The ranks of one engine under tensor parallelism: a process each, of which rank 0 speaks to the worker.

Whatever the worker says reaches the other ranks through SGLang's own broadcast of requests; what all of them
have to come to together (memory, doze, wake) is agreed on over the group's CPU channel.
"""

import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import torch
from sglang.srt.distributed import parallel_state

from prism.common.errors import ErrorCode, PrismError
from prism.common.process import die_with_parent
from prism.gpu_worker.engine_protocol import FromEngine, StartEngine, ToEngine, pack


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
    They share the memory that was reserved for all of them.
    """
    size = max(1, len(start.rank_layouts))
    rank = 0
    for other in range(1, size):
        if os.fork() == 0:
            die_with_parent(signal.SIGKILL)
            connection.close()
            rank = other
            break
    part = _part_of(start, rank)
    return Ranks(rank, size), msgspec.structs.replace(part, kv_bytes=start.kv_bytes // size)


def lead_ranks(
    others: Sequence[socket.socket], start: StartEngine, _connection: socket.socket
) -> tuple[Ranks, StartEngine]:
    """Be rank 0 of ranks that run already, at the other ends of `others`: hand on what was asked for.

    Each has a GPU of its own, and there what was reserved on every one. Raises PrismError(unsupported) when
    the engine is for another number of GPUs.
    """
    size = max(1, len(start.rank_layouts))
    if size != len(others) + 1:
        raise PrismError(
            ErrorCode.UNSUPPORTED,
            f"{start.model} wants tp_size {size}; the engines of this worker have {len(others) + 1} rank(s)",
        )
    for other in others:
        other.sendall(pack(start))
    return Ranks(0, size), _part_of(start, 0)


def follow_ranks(rank: int, start: StartEngine, _connection: socket.socket) -> tuple[Ranks, StartEngine]:
    """Be rank `rank`, told by rank 0 what was asked for."""
    return Ranks(rank, len(start.rank_layouts)), _part_of(start, rank)


def _part_of(start: StartEngine, rank: int) -> StartEngine:
    if len(start.rank_layouts) < 2:
        return start
    return msgspec.structs.replace(start, layout=start.rank_layouts[rank])
