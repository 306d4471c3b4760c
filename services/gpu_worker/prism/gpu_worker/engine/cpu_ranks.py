"""What SGLang's tensor parallelism needs changed where there is no GPU: its ranks meet over gloo."""

import contextlib
import os
from typing import Any

import torch
from sglang.srt.distributed.device_communicators import pynccl
from sglang.srt.layers import sampler


class _NoNccl:
    """Stands in for SGLang's NCCL communicator, which it makes for CPUs as well."""

    disabled = True
    available = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def change_state(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        """Nothing changes."""
        return contextlib.nullcontext()


def prepare(size: int) -> None:
    """Before the scheduler of one of `size` ranks is made."""
    os.environ.update(
        # The name of a host may lead anywhere; ranks are in this one.
        GLOO_SOCKET_IFNAME="lo",
        # Broadcasts through shared memory would leave segments behind an engine that is killed.
        SGLANG_USE_MESSAGE_QUEUE_BROADCASTER="false",
        SGLANG_CPU_OMP_THREADS_BIND="|".join(_cores(size)),
    )
    pynccl.PyNcclCommunicator = _NoNccl
    # Sums over ranks are rounded alike on all of them, but draws should not depend on it.
    sampler.SYNC_TOKEN_IDS_ACROSS_TP = True
    # The sharded embedding is compiled otherwise, for half a minute.
    torch.compiler.set_stance("force_eager")


def _cores(size: int) -> list[str]:
    """The cores of each rank: shares of ours, or all of them where there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank::size] or cores for rank in range(size)]
    return [",".join(map(str, share)) for share in shares]
