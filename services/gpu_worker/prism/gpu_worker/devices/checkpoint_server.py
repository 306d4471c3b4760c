"""A process that checkpoints others: the driver is loaded here, so that the worker need not.

Run as `python -m prism.gpu_worker.devices.checkpoint_server`, with the GPU in CUDA_VISIBLE_DEVICES: the
worker hides its GPUs from itself, and the driver refuses to start without one. A call that hangs in the
driver is ended with this process. Lines of JSON: a `Hello` first, then an `Answer` for each `Order`.
"""

import signal
import sys
from typing import BinaryIO

import msgspec

from prism.common.process import die_with_parent
from prism.gpu_worker.devices.cuda_checkpoint import (
    CheckpointDriver,
    CheckpointFailed,
    CheckpointUnsupported,
)


class Hello(msgspec.Struct, frozen=True):
    """Ready; or `unsupported` says why nothing can be frozen."""

    unsupported: str = ""


class Order(msgspec.Struct, frozen=True):
    """Freeze the process `pid`, or thaw it."""

    pid: int
    thaw: bool = False
    lock_timeout_ms: int = 0


class Answer(msgspec.Struct, frozen=True):
    """What came of an order: seconds by phase, or an `error`, and whether the process `runs` as before
    then."""

    seconds: dict[str, float] = {}
    error: str = ""
    runs: bool = True


def serve(driver: CheckpointDriver, orders: BinaryIO, answers: BinaryIO) -> None:
    """Carry out orders until there are no more."""
    for line in orders:
        order = msgspec.json.decode(line, type=Order)
        try:
            if order.thaw:
                answer = Answer(driver.thaw(order.pid))
            else:
                answer = Answer(driver.freeze(order.pid, order.lock_timeout_ms))
        except CheckpointFailed as error:
            answer = Answer(error=str(error), runs=error.runs)
        _say(answers, answer)


def _say(answers: BinaryIO, what: Hello | Answer) -> None:
    answers.write(msgspec.json.encode(what) + b"\n")
    answers.flush()


def main() -> int:
    """Serve on stdin and stdout; the exit status is 1 where nothing can be frozen."""
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        driver = CheckpointDriver()
    except CheckpointUnsupported as error:
        _say(sys.stdout.buffer, Hello(str(error)))
        return 1
    _say(sys.stdout.buffer, Hello())
    serve(driver, sys.stdin.buffer, sys.stdout.buffer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
