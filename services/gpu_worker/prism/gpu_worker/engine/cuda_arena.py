"""GPU memory that can be given back while its addresses stay, so that CUDA graphs over it stay valid.

The GPU's counterpart of `arena.py`: an address range of fixed size, grown piece by piece while a model is
built in it; dozing unmaps all of it, waking maps it again and fills it at the speed of the bus.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from prism.gpu_worker.engine import cuda_driver
from prism.gpu_worker.engine.arena import align
from prism.gpu_worker.engine.arrivals import Arrivals
from prism.gpu_worker.engine.bounced_copies import bounced_copies, bounced_copies_out, bouncing_threads
from prism.gpu_worker.engine.copied_piece import CopiedPiece
from prism.gpu_worker.engine.dealt_copies import DealtCopies
from prism.gpu_worker.engine.registered_image import RegisteredImage
from prism.gpu_worker.lent_bus.borrowing import Turn

TENSOR_ALIGNMENT = 256
GROWTH_BYTES = 256 * 1024 * 1024
REMAPPED_BYTES = 256 * 1024 * 1024
# Nothing is decoded while weights are copied in that pinning by several threads could hold up.
PINNING_THREADS = 4
# A larger tensor that comes late would take the room in front from all others.
MOST_IN_FRONT_BYTES = 256 * 1024
# Two halves of a NaN in every 16-bit float type; no checkpoint holds a page of it.
UNTOUCHED = 0x7FC57FC5
COMPARED_WORDS = 1 << 26


class CudaArena:
    """`capacity` bytes of GPU address space, of which the first `mapped_bytes` have memory behind them. It
    grows with memory full of the 32-bit `filler`. The first `front_bytes` are for small tensors that come
    late: behind all else, whoever needs them would wait for all of the weights. Of an `exportable` one, buses
    of other GPUs can bring a part of the content.
    """

    def __init__(
        self,
        device: int,
        capacity: int,
        filler: int = UNTOUCHED,
        *,
        front_bytes: int = 0,
        exportable: bool = False,
    ) -> None:
        self._device = device
        self._exportable = exportable
        self._filler = filler
        self._granularity = cuda_driver.granularity(device)
        self.capacity = align(max(capacity, 1), self._granularity)
        self.address = cuda_driver.reserve_addresses(self.capacity)
        self._front_bytes = min(front_bytes, self.capacity)
        self._front_used = 0
        self.used = self._front_bytes
        self.mapped_bytes = 0
        self._pieces: list[tuple[int, int, Any]] = []
        self._stream = torch.cuda.Stream(device)

    @property
    def mapped(self) -> bool:
        """Whether memory stands behind the arena."""
        return self.mapped_bytes > 0

    def place(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over the next free bytes, which hold the filler.

        Raises PrismError(out_of_memory) when the device, MemoryError when the address range is full.
        """
        offset = align(self.used, TENSOR_ALIGNMENT)
        end = offset + math.prod(shape) * dtype.itemsize
        self.grow(end)
        self.used = end
        return self.view(offset, shape, dtype)

    def place_in_front(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As `place`, but before all others where there is room left for such."""
        offset = align(self._front_used, TENSOR_ALIGNMENT)
        end = offset + math.prod(shape) * dtype.itemsize
        if end - offset > MOST_IN_FRONT_BYTES or end > self._front_bytes:
            return self.place(shape, dtype)
        self.grow(end)
        self._front_used = end
        return self.view(offset, shape, dtype)

    def grow(self, nbytes: int) -> None:
        """Have memory behind the first `nbytes` at least."""
        if nbytes <= self.mapped_bytes:
            return
        if nbytes > self.capacity:
            raise MemoryError(f"the arena has addresses for {self.capacity} bytes, {nbytes} are asked for")
        wanted = min(max(nbytes - self.mapped_bytes, GROWTH_BYTES), self.capacity - self.mapped_bytes)
        self._map_piece(align(wanted, self._granularity))
        offset, size, _ = self._pieces[-1]
        cuda_driver.fill_words(self.address + offset, self._filler, size)

    def _map_piece(self, nbytes: int) -> None:
        offset = self.mapped_bytes
        handle = cuda_driver.map_memory(
            self._device, self.address + offset, nbytes, exportable=self._exportable
        )
        self._pieces.append((offset, nbytes, handle))
        self.mapped_bytes += nbytes

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over the mapped bytes at `offset`."""
        nbytes = math.prod(shape) * dtype.itemsize
        device = torch.device("cuda", self._device)
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype, device=device)
        flat = torch.as_tensor(_DeviceBytes(self.address + offset, nbytes), device=device)
        return flat.view(dtype).view(shape)

    def untouched_bytes(self, offset: int, nbytes: int) -> int:
        """Bytes of this part that nothing has been written to since it was mapped; 0 if that is less than
        a page, which a few weights may look like by chance."""
        begin = align(offset, 4)
        words = self.view(begin, ((offset + nbytes - begin) // 4,), torch.int32)
        untouched = sum(int((part == UNTOUCHED).sum().item()) for part in words.split(COMPARED_WORDS))
        return untouched * 4 if untouched * 4 >= 4096 else 0

    def unmap(self) -> None:
        """Give all memory back once the GPU is done with it; the addresses stay reserved."""
        torch.cuda.synchronize(self._device)
        for offset, nbytes, handle in self._pieces:
            cuda_driver.unmap_memory(self.address + offset, nbytes, handle)
        self._pieces.clear()
        self.mapped_bytes = 0

    def copy_in(self, source: RegisteredImage, nbytes: int) -> None:
        """Fill the first `nbytes` from the image, as `begin_copy_in` does; done when this returns."""
        self.begin_copy_in(source, nbytes).finish()

    def begin_copy_in(self, source: RegisteredImage, nbytes: int, turns: Sequence[Turn] = ()) -> Arrivals:
        """Have the first `nbytes` filled from the image, with memory behind them where there is none yet;
        there is memory behind all when this returns, and every copy is enqueued.

        Mapping goes on while the pieces before are copied. What is not pinned goes through pinned buffers
        where there are cores enough for that, else it is pinned on the way. On failure what was mapped stays
        so, and nothing is copied any more. Raises PrismError(out_of_memory).

        With `turns` on other buses, of an image that is all pinned, each brings as many pieces as this GPU's
        own; they end with what is given back.
        """
        if turns:
            return self._begin_shared_copy_in(source, nbytes, turns)
        began = time.perf_counter()
        stream = self._stream.cuda_stream
        context = cuda_driver.current_context()
        pieces: list[tuple[int, CopiedPiece]] = []
        first = cuda_driver.create_event(timed=True)
        cuda_driver.record_event(first, stream)

        def reached(bytes_there: int) -> None:
            event = cuda_driver.create_event(timed=bytes_there == nbytes)
            pieces.append((bytes_there, CopiedPiece(event, self._device, context)))
            cuda_driver.record_event(event, stream)

        def end() -> None:
            self._stream.synchronize()
            for event in (first, *(piece.event for _, piece in pieces)):
                cuda_driver.destroy_event(event)

        try:
            threads = 0 if source.pinned_bytes == source.nbytes else bouncing_threads()
            if threads:
                with bounced_copies(threads, stream) as copy:
                    for offset, size in self._mapping(source.pieces(), nbytes):
                        target, begin = self.address + offset, source.address + offset
                        if source.is_pinned(offset):
                            cuda_driver.copy_to_device(target, begin, size, stream)
                        else:
                            copy(target, begin, size)
                # Its threads enqueue in no order.
                reached(nbytes)
            else:
                for offset, size in self._mapping(source.pinned_pieces(PINNING_THREADS), nbytes):
                    begin = source.address + offset
                    cuda_driver.copy_to_device(self.address + offset, begin, size, stream)
                    reached(offset + size)
        except BaseException:
            end()
            raise
        return Arrivals(pieces, began, end, lambda: cuda_driver.seconds_between(first, pieces[-1][1].event))

    def _begin_shared_copy_in(self, source: RegisteredImage, nbytes: int, turns: Sequence[Turn]) -> Arrivals:
        began = time.perf_counter()
        dealt = DealtCopies(self.address, source.address, self._device, self._stream, turns)
        try:
            dealt.begin()
            for offset, size in self._mapping(source.pieces(), nbytes):
                dealt.deal(offset, size, self._pieces[-1])
            dealt.all_dealt()
        except BaseException:
            dealt.end()
            raise
        return Arrivals(dealt.pieces, began, dealt.end)

    def _mapping(self, pieces: Iterator[tuple[int, int]], nbytes: int) -> Iterator[tuple[int, int]]:
        """The parts of `pieces` within `nbytes`, each once there is memory behind it."""
        for offset, whole in pieces:
            size = min(whole, nbytes - offset)
            while self.mapped_bytes < offset + size:
                left = align(max(self.used, nbytes), self._granularity) - self.mapped_bytes
                # As much again as there is: it stays ahead of the copy, and few pieces are unmapped sooner.
                self._map_piece(min(left, max(REMAPPED_BYTES, self.mapped_bytes)))
            yield offset, size

    def copy_out(self, target: RegisteredImage, nbytes: int) -> None:
        """Copy the first `nbytes` into host memory; done when this returns. Nothing of it is pinned."""
        with bounced_copies_out(self._stream.cuda_stream) as copy:
            for offset, size in target.pieces():
                copy(target.address + offset, self.address + offset, min(size, nbytes - offset))


class _DeviceBytes:
    """Bytes of GPU memory as the array interface that torch takes without a copy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }
