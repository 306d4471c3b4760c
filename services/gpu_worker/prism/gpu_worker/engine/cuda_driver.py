"""The CUDA driver's memory calls that engines need, with errors that say what was asked for.

Addresses and sizes are bytes. The context is the process's primary one, which torch has made.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cuda.bindings import driver

from prism.common.errors import ErrorCode, PrismError


def check(result: tuple[Any, ...], what: str) -> Any:
    """The values of a driver call without its status.

    Raises PrismError: out_of_memory (retry) when the device has too little, else internal.
    """
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(status)
        text = f"{what}: {name.decode() if name else status}"
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            too_little = f"the GPU has too little free memory for {text}"
            raise PrismError(ErrorCode.OUT_OF_MEMORY, too_little, retry=True)
        raise PrismError(ErrorCode.INTERNAL, text)
    return values[0] if len(values) == 1 else tuple(values)


COUNTER_BYTES = 4
MOST_COUNTED = 0x7FFF_FFFF
_FILE_DESCRIPTOR = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _properties(device: int, *, exportable: bool = False) -> Any:
    properties = driver.CUmemAllocationProp()
    if exportable:
        properties.requestedHandleTypes = _FILE_DESCRIPTOR
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device
    return properties


def granularity(device: int) -> int:
    """What sizes of physical memory are multiples of."""
    flag = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(check(driver.cuMemGetAllocationGranularity(_properties(device), flag), "granularity"))


def reserve_addresses(nbytes: int) -> int:
    """Address space without memory behind it, for as long as the process lives."""
    return int(check(driver.cuMemAddressReserve(nbytes, 0, 0, 0), f"reserving {nbytes} bytes of addresses"))


def map_memory(device: int, address: int, nbytes: int, *, exportable: bool = False) -> Any:
    """Put fresh memory of `device` behind `nbytes` from `address`; returns the handle to unmap it with.
    `exportable` memory can be given to other processes.

    All or nothing. Raises PrismError(out_of_memory).
    """
    handle = check(
        driver.cuMemCreate(nbytes, _properties(device, exportable=exportable), 0), f"{nbytes} bytes"
    )
    return _mapped(device, address, nbytes, handle)


def _mapped(device: int, address: int, nbytes: int, handle: Any) -> Any:
    """Put the memory of `handle`, which is released on failure, behind `nbytes` from `address`, for
    `device` to use."""
    try:
        check(driver.cuMemMap(address, nbytes, 0, handle, 0), f"mapping {nbytes} bytes")
        try:
            access = driver.CUmemAccessDesc()
            access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            access.location.id = device
            access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            check(driver.cuMemSetAccess(address, nbytes, [access], 1), f"access to {nbytes} bytes")
        except BaseException:
            driver.cuMemUnmap(address, nbytes)
            raise
    except BaseException:
        driver.cuMemRelease(handle)
        raise
    return handle


def unmap_memory(address: int, nbytes: int, handle: Any) -> None:
    """Take the memory of a `map_memory` away again and free it; nothing may be using it."""
    check(driver.cuMemUnmap(address, nbytes), f"unmapping {nbytes} bytes")
    check(driver.cuMemRelease(handle), f"releasing {nbytes} bytes")


@contextmanager
def exported(handle: Any) -> Iterator[int]:
    """A file descriptor of memory, for other processes; closed at the end, theirs are valid on."""
    fd = int(check(driver.cuMemExportToShareableHandle(handle, _FILE_DESCRIPTOR, 0), "exporting memory"))
    try:
        yield fd
    finally:
        os.close(fd)


def map_imported(device: int, fd: int, nbytes: int) -> tuple[int, Any]:
    """Another process's memory, of any GPU, for `device` to use: its address here, and what to unmap it
    with."""
    handle = check(driver.cuMemImportFromShareableHandle(fd, _FILE_DESCRIPTOR), "importing memory")
    try:
        address = reserve_addresses(nbytes)
    except BaseException:
        driver.cuMemRelease(handle)
        raise
    try:
        return address, _mapped(device, address, nbytes, handle)
    except BaseException:
        driver.cuMemAddressFree(address, nbytes)
        raise


def unmap_imported(address: int, nbytes: int, handle: Any) -> None:
    """Undo `map_imported`."""
    unmap_memory(address, nbytes, handle)
    check(driver.cuMemAddressFree(address, nbytes), f"giving {nbytes} bytes of addresses back")


def primary_context(device: int) -> Any:
    """The primary context of `device`, which the calling thread uses from here on."""
    check(driver.cuInit(0), "starting the driver")
    context = check(driver.cuDevicePrimaryCtxRetain(check(driver.cuDeviceGet(device), "GPU")), "a context")
    use_context(context)
    return context


def current_context() -> Any:
    """The context of the calling thread."""
    return check(driver.cuCtxGetCurrent(), "asking for the context")


def use_context(context: Any) -> None:
    """Make `context` that of the calling thread."""
    check(driver.cuCtxSetCurrent(context), "setting the context")


def limit_stack(nbytes: int) -> None:
    """Have the current context set aside `nbytes` of stack a thread; a kernel that needs more gets more, and
    that stays."""
    limit = driver.CUlimit.CU_LIMIT_STACK_SIZE
    check(driver.cuCtxSetLimit(limit, nbytes), f"a stack of {nbytes} bytes a thread")


def register_host(address: int, nbytes: int) -> None:
    """Pin host memory, so that copies of it run at the speed of the bus."""
    flags = driver.CU_MEMHOSTREGISTER_PORTABLE
    check(driver.cuMemHostRegister(address, nbytes, flags), f"registering {nbytes} bytes of host memory")


def unregister_host(address: int) -> None:
    """Undo `register_host`."""
    check(driver.cuMemHostUnregister(address), "unregistering host memory")


def copy_to_device(target: int, source: int, nbytes: int, stream: int) -> None:
    """Enqueue a copy from registered host memory."""
    check(driver.cuMemcpyHtoDAsync(target, source, nbytes, stream), f"copying {nbytes} bytes to the GPU")


def copy_to_host(target: int, source: int, nbytes: int, stream: int) -> None:
    """Enqueue a copy to registered host memory."""
    check(driver.cuMemcpyDtoHAsync(target, source, nbytes, stream), f"copying {nbytes} bytes from the GPU")


def fill_words(target: int, word: int, nbytes: int) -> None:
    """Set `nbytes` (a multiple of 4) to a 32-bit pattern."""
    check(driver.cuMemsetD32(target, word, nbytes // 4), f"filling {nbytes} bytes")


def create_stream() -> Any:
    """A stream that waits for no other."""
    flag = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
    return check(driver.cuStreamCreate(flag), "creating a stream")


def destroy_stream(stream: Any) -> None:
    """Give a stream back; what it has to do is done first."""
    check(driver.cuStreamDestroy(stream), "destroying a stream")


def host_counter() -> int:
    """The address of a counter in host memory that streams can wait for, at 0."""
    flags = driver.CU_MEMHOSTALLOC_PORTABLE | driver.CU_MEMHOSTALLOC_DEVICEMAP
    address = int(check(driver.cuMemHostAlloc(COUNTER_BYTES, flags), "a counter"))
    set_counter(address, 0)
    return address


def set_counter(address: int, value: int) -> None:
    """Let go of who waits for `value` or less."""
    ctypes.c_int32.from_address(address).value = value


def free_counter(address: int) -> None:
    """Give a counter back; no stream waits for it."""
    check(driver.cuMemFreeHost(address), "freeing a counter")


def hold_until(stream: int, counter: int, value: int) -> None:
    """Have what is enqueued on the stream from here on begin once the counter is at `value` or above."""
    flag = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
    check(driver.cuStreamWaitValue32(stream, counter, value, int(flag)), "waiting for a counter on a stream")


def create_event(*, timed: bool = False) -> Any:
    """An event to record and wait for; `timed`, it remembers when it happened."""
    flags = driver.CUevent_flags
    flag = flags.CU_EVENT_DEFAULT if timed else flags.CU_EVENT_DISABLE_TIMING
    return check(driver.cuEventCreate(flag), "creating an event")


def seconds_between(first: Any, last: Any) -> float:
    """From one timed event to another, both of which have happened, by the GPU's clock."""
    return float(check(driver.cuEventElapsedTime(first, last), "timing two events")) / 1000


def record_event(event: Any, stream: int) -> None:
    """Have `event` happen when the stream gets here."""
    check(driver.cuEventRecord(event, stream), "recording an event")


def wait_for_event(event: Any) -> None:
    """Wait until what was recorded last has happened."""
    check(driver.cuEventSynchronize(event), "waiting for an event")


def hold_back(stream: int, event: Any) -> None:
    """Have what is enqueued on the stream from here on begin once the event has happened."""
    check(driver.cuStreamWaitEvent(stream, event, 0), "waiting for an event on a stream")


def destroy_event(event: Any) -> None:
    """Give an event back."""
    check(driver.cuEventDestroy(event), "destroying an event")
