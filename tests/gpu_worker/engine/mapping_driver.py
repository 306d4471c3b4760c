"""The driver's memory calls, stood in for by host memory; other processes' memory is of this one too."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tests.gpu_worker.engine.host_driver import HostDriver

from prism.common.errors import ErrorCode, PrismError
from prism.common.memfd import memfd_of
from prism.gpu_worker.engine import bounced_copies, cuda_arena, registered_image

PAGE = 1 << 16
PIECE = 2 * PAGE
LENDING_STREAM = 99


class MappingDriver(HostDriver):
    """Maps memory as well: `room` bytes of it at most. Copies go where there is some."""

    def __init__(self) -> None:
        super().__init__()
        self.room = 1 << 40
        self.mapped: dict[int, int] = {}
        self.imported: list[int] = []
        self.counters: list[int] = []
        self.freed: set[int] = set()
        self.holds: list[tuple[int, int]] = []
        self.streams: list[int] = []
        self._ranges: list[mmap.mmap] = []

    def granularity(self, device: int) -> int:
        return PAGE

    def reserve_addresses(self, nbytes: int) -> int:
        self._ranges.append(mmap.mmap(-1, nbytes))
        return ctypes.addressof((ctypes.c_char * nbytes).from_buffer(self._ranges[-1]))

    def fill_words(self, target: int, word: int, nbytes: int) -> None:
        assert self.mapped[target] == nbytes

    def map_memory(self, device: int, address: int, nbytes: int, *, exportable: bool = False) -> int:
        if sum(self.mapped.values()) + nbytes > self.room:
            raise PrismError(ErrorCode.OUT_OF_MEMORY, "the GPU is full")
        self.mapped[address] = nbytes
        return address

    def unmap_memory(self, address: int, nbytes: int, handle: int) -> None:
        assert self.mapped.pop(address) == nbytes

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        assert any(begin <= target and target + nbytes <= begin + size for begin, size in self.joined())
        self.streams.append(stream)
        super().copy_to_device(target, source, nbytes, stream)

    def joined(self) -> list[tuple[int, int]]:
        """Ranges with memory behind them, neighbours as one."""
        found: list[tuple[int, int]] = []
        for address in sorted(self.mapped):
            if found and sum(found[-1]) == address:
                found[-1] = (found[-1][0], found[-1][1] + self.mapped[address])
            else:
                found.append((address, self.mapped[address]))
        return found

    @contextmanager
    def exported(self, handle: int) -> Iterator[int]:
        """A descriptor that says where the memory is."""
        fd = memfd_of("exported", str(handle).encode())
        try:
            yield fd
        finally:
            os.close(fd)

    def map_imported(self, device: int, fd: int, nbytes: int) -> tuple[int, int]:
        address = int(os.pread(fd, 64, 0))
        assert self.mapped[address] == nbytes
        self.imported.append(address)
        return address, address

    def unmap_imported(self, address: int, nbytes: int, handle: int) -> None:
        self.imported.remove(address)

    def primary_context(self, device: int) -> str:
        return "primary"

    def limit_stack(self, nbytes: int) -> None: ...

    def create_stream(self) -> int:
        return LENDING_STREAM

    def destroy_stream(self, stream: int) -> None:
        assert stream == LENDING_STREAM

    def host_counter(self) -> int:
        self.counters.append(0)
        return len(self.counters) - 1

    def set_counter(self, counter: int, value: int) -> None:
        assert value > self.counters[counter]
        self.counters[counter] = value

    def free_counter(self, counter: int) -> None:
        self.freed.add(counter)

    def hold_until(self, stream: int, counter: int, value: int) -> None:
        self.holds.append((counter, value))


def standing_in(monkeypatch: pytest.MonkeyPatch) -> MappingDriver:
    """One in the place of the driver and of torch's streams, with images and arenas in small pieces."""
    fake = MappingDriver()
    fake.stand_in(monkeypatch)
    stream = SimpleNamespace(cuda_stream=7, synchronize=fake.copy_all)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=8))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(cuda_arena, "REMAPPED_BYTES", PIECE)
    monkeypatch.setattr(registered_image, "CHUNK_BYTES", PIECE)
    monkeypatch.setattr(bounced_copies, "BUFFER_BYTES", PAGE)
    return fake
