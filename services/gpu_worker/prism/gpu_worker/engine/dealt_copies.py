"""Pieces of the weights dealt out among buses: one to this GPU's own, one to each that is lent, and again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prism.gpu_worker.engine import cuda_driver
from prism.gpu_worker.engine.arrivals import Piece
from prism.gpu_worker.engine.copied_piece import CopiedPiece
from prism.gpu_worker.lent_bus.borrowing import Turn

Memory = tuple[int, int, Any]
"""A part of the arena with a handle of its own: where it begins there, its size, the handle."""


class DealtCopies:
    """Copies from an image in host memory at `source` to the arena at `target` on the GPU `device`, those of
    its own bus by `stream`. `begin`, `deal`..., `all_dealt`, then `end`, or `end` alone after an error.

    `pieces` are those dealt, for Arrivals: each is there once the last one of every bus so far is.
    """

    def __init__(self, target: int, source: int, device: int, stream: Any, turns: Sequence[Turn]) -> None:
        self.pieces: list[tuple[int, Piece]] = []
        self._target = target
        self._source = source
        self._device = device
        self._stream = stream
        self._turns = list(turns)
        self._latest: list[Piece | None] = [None] * (1 + len(turns))
        self._sent = [0] * len(turns)
        self._waiting: list[list[tuple[int, int]]] = [[] for _ in turns]
        self._memory: Memory | None = None
        self._events: list[Any] = []
        self._context: Any = None

    def begin(self) -> None:
        """Have the other buses ready. The calling thread has a context, as in `deal`."""
        self._context = cuda_driver.current_context()
        for turn in self._turns:
            turn.begin(self._copy_now)

    def deal(self, offset: int, size: int, memory: Memory) -> None:
        """The next piece, which ends in `memory`; its copy has begun by the next `memory`, or `all_dealt`."""
        if memory is not self._memory:
            self._send()
            self._memory = memory
        lane = len(self.pieces) % (1 + len(self._turns))
        # What begins in one piece of memory and ends in the next has no handle of its own.
        if lane == 0 or offset < memory[0]:
            self._latest[0] = self._copied(offset, size)
        else:
            other = lane - 1
            self._waiting[other].append((offset, size))
            self._latest[lane] = _CarriedPiece(self._turns[other], self._sent[other], self._device)
            self._sent[other] += 1
        so_far = tuple(piece for piece in self._latest if piece is not None)
        self.pieces.append((offset + size, _AllOf(so_far)))

    def all_dealt(self) -> None:
        """There are no more."""
        self._send()
        for turn in self._turns:
            turn.all_sent()

    def end(self) -> None:
        """Wait for what is under way, and give back what it needed."""
        for turn in self._turns:
            turn.finish()
        self._stream.synchronize()
        # Whatever was held back for a piece has gone on.
        torch.cuda.synchronize(self._device)
        for turn in self._turns:
            turn.end()
        for event in self._events:
            cuda_driver.destroy_event(event)

    def _send(self) -> None:
        for turn, parts in zip(self._turns, self._waiting, strict=True):
            if parts:
                assert self._memory is not None
                base, nbytes, handle = self._memory
                turn.carry(handle, base, nbytes, list(parts))
                parts.clear()

    def _copied(self, offset: int, size: int) -> CopiedPiece:
        self._copy(offset, size)
        event = cuda_driver.create_event()
        self._events.append(event)
        cuda_driver.record_event(event, self._stream.cuda_stream)
        return CopiedPiece(event, self._device, self._context)

    def _copy(self, offset: int, size: int) -> None:
        target, source = self._target + offset, self._source + offset
        cuda_driver.copy_to_device(target, source, size, self._stream.cuda_stream)

    def _copy_now(self, offset: int, size: int) -> None:
        self._copy(offset, size)
        self._stream.synchronize()


@dataclass(frozen=True)
class _CarriedPiece:
    """See arrivals.Piece: the part numbered `part` of what another bus brings."""

    turn: Turn
    part: int
    device: int

    def hold_back(self) -> None:
        self.turn.hold_back(torch.cuda.current_stream(self.device).cuda_stream, self.part)

    def wait(self) -> None:
        self.turn.wait(self.part)


@dataclass(frozen=True)
class _AllOf:
    """See arrivals.Piece: there once all of `pieces` are."""

    pieces: tuple[Piece, ...]

    def hold_back(self) -> None:
        for piece in self.pieces:
            piece.hold_back()

    def wait(self) -> None:
        for piece in self.pieces:
            piece.wait()
