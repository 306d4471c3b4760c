"""An engine without a model: sleeps by a cost model and says numbered tokens, over the real engine protocol.

Run as `python -m prism.gpu_worker.devices.simulated_engine FD COSTS`. It leases the model's checkpoint from
the store and holds a copy of it as its weights, so that staging, dozing, waking and their memory are real;
only the computing is not.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import time

import msgspec
from setproctitle import setproctitle

from prism.common.errors import ErrorBody, ErrorCode, PrismError
from prism.common.memfd import create_memfd
from prism.common.messages.store import LeaseRequest
from prism.common.process import die_with_parent
from prism.common.store_client import Lease, lease
from prism.gpu_worker.devices.simulated_batch import SimulatedBatch
from prism.gpu_worker.devices.simulated_costs import Script, SimulatedCosts
from prism.gpu_worker.devices.simulated_tokens import NumberedTokens, StampedTokens, TokenSource
from prism.gpu_worker.engine.link import EngineLink, WorkerGone
from prism.gpu_worker.engine_logs import configure_engine_logging
from prism.gpu_worker.engine_protocol import (
    Abort,
    Done,
    Doze,
    Dying,
    Failed,
    Generate,
    Outputs,
    PrepareFreeze,
    Progress,
    QuotaSet,
    Ready,
    SetQuota,
    StartEngine,
    ToEngine,
    TokenOutput,
    Wake,
    WeightsGranted,
    WeightsSized,
)

log = logging.getLogger(__name__)

COPY_CHUNK_BYTES = 16 * 1024 * 1024
EXIT_FAILED = 3


class SimulatedMemory:
    """Weights and KV cache as the kernel sees them: real memory, with nothing in it that anybody reads."""

    def __init__(self, image: Lease, kv_bytes: int, kv_bytes_per_token: int) -> None:
        self._image = image
        self._kv_bytes = kv_bytes
        self._kv_bytes_per_token = kv_bytes_per_token
        self._kv_taken = 0
        self.weights_fd = create_memfd("prism-weights", 0)
        self.kv_fd = create_memfd("prism-kv", 0)

    def take_weights(self) -> None:
        """Copy the image. Raises PrismError; nothing is held then."""
        try:
            offset = 0
            while offset < self._image.nbytes:
                part = os.pread(self._image.fd, COPY_CHUNK_BYTES, offset)
                if not part:
                    raise OSError(f"image ends at {offset} of {self._image.nbytes} bytes")
                offset += os.pwrite(self.weights_fd, part, offset)
        except OSError as error:
            self.give_back()
            raise PrismError(ErrorCode.STORE_UNAVAILABLE, f"copying the weights failed: {error}") from error

    def use_kv(self, tokens: int) -> None:
        """Have memory behind so many tokens' KV; more is given back only by a doze, as SGLang's pools do."""
        wanted = min(tokens * self._kv_bytes_per_token, self._kv_bytes)
        if wanted > self._kv_taken:
            os.posix_fallocate(self.kv_fd, 0, wanted)
            self._kv_taken = wanted

    def set_quota(self, kv_bytes: int) -> None:
        """Bound the KV cache; what is beyond is given back."""
        self._kv_bytes = kv_bytes
        if self._kv_taken > kv_bytes:
            os.ftruncate(self.kv_fd, kv_bytes)
            self._kv_taken = kv_bytes

    def give_back(self) -> None:
        """Hold nothing any more."""
        os.ftruncate(self.weights_fd, 0)
        os.ftruncate(self.kv_fd, 0)
        self._kv_taken = 0


class SimulatedEngine:
    """One engine, from its start message on."""

    def __init__(self, link: EngineLink, start: StartEngine, costs: SimulatedCosts) -> None:
        self._link = link
        self._costs = costs
        self._dozing = False
        self._batch = SimulatedBatch(
            self._tokens, max_running=start.max_running_requests, chunk_tokens=start.chunked_prefill_tokens
        )
        began = time.perf_counter()
        image = lease(
            start.store_socket,
            LeaseRequest(start.model, start.model_path, version=start.version),
            deadline_s=start.store_deadline_s,
            on_progress=lambda done, total: link.send(Progress(done, total)),
        )
        staged = time.perf_counter()
        link.send(WeightsSized(image.nbytes))
        granted = link.receive()
        if not isinstance(granted, WeightsGranted) or not granted.granted:
            raise PrismError(
                ErrorCode.OUT_OF_MEMORY,
                f"{start.model} needs {image.nbytes} bytes for its weights, more than the worker has free",
                retry=True,
            )
        self._kv_tokens = start.kv_bytes // costs.kv_bytes_per_token
        self._cap_tokens = max(start.kv_bytes, start.kv_cap_bytes) // costs.kv_bytes_per_token
        self._batch.limit_tokens = self._kv_tokens
        self._memory = SimulatedMemory(image, start.kv_bytes, costs.kv_bytes_per_token)
        self._memory.take_weights()
        time.sleep(costs.start_ms / 1000)
        link.send(
            Ready(
                call=start.call,
                pid=os.getpid(),
                weights_fd=self._memory.weights_fd,
                kv_fd=self._memory.kv_fd,
                kv_tokens=self._kv_tokens,
                kv_bytes_per_token=costs.kv_bytes_per_token,
                imaged=True,
                kv_page_bytes=costs.kv_bytes_per_token,
                seconds={"stage": staged - began, "build": time.perf_counter() - staged},
            )
        )

    def _tokens(self, prompt_tokens: int) -> TokenSource:
        if self._costs.script is Script.STAMPED:
            return StampedTokens(self._costs.printable_id)
        return NumberedTokens(prompt_tokens, self._costs.printable_id)

    def run(self) -> None:
        """Serve until the worker is gone. Raises WorkerGone."""
        ends_at = time.monotonic()
        while True:
            busy = self._batch.running or self._batch.waiting
            first = [] if busy else [self._link.receive()]
            for message in [*first, *self._link.receive_waiting()]:
                self._take(message)
            if not (self._batch.running or self._batch.waiting):
                continue
            prefill = self._batch.prefill_tokens
            cost = self._costs.prefill_s(prefill) if prefill else self._costs.decode_s
            # Counted from the end of the step before, with our own work done within the step's time.
            ends_at = max(ends_at + cost, time.monotonic())
            told = self._message(self._batch.step(time.monotonic_ns() // 1000))
            time.sleep(max(0.0, ends_at - time.monotonic()))
            self._batch.restamp(time.monotonic_ns() // 1000)
            self._link.send(told)

    def _tell(self, outputs: list[TokenOutput]) -> None:
        self._link.send(self._message(outputs))

    def _message(self, outputs: list[TokenOutput]) -> Outputs:
        batch = self._batch
        held = batch.kv_tokens
        self._memory.use_kv(held)
        return Outputs(outputs, batch.running, batch.waiting, held, batch.steps)

    def _take(self, message: ToEngine) -> None:
        match message:
            case Generate():
                if error := self._refusal(message):
                    self._tell([TokenOutput(message.rid, [], "abort", error=error)])
                else:
                    self._batch.add(message)
            case Abort():
                if outputs := self._batch.abort(message.rid):
                    self._tell(outputs)
            case Doze():
                self._doze(message.call)
            case Wake():
                self._wake(message.call)
            case SetQuota():
                self._set_quota(message)
            case PrepareFreeze():
                self._prepare_freeze(message.call)
            case _:
                raise TypeError(f"{type(message).__name__} is not for an engine that runs")

    def _refusal(self, request: Generate) -> ErrorBody | None:
        if self._dozing:
            return ErrorBody(ErrorCode.MOVED, "the model is asleep", retry=True)
        if not 0 < len(request.input_ids) < self._cap_tokens:
            return ErrorBody(
                ErrorCode.INVALID_REQUEST,
                f"the prompt has {len(request.input_ids)} tokens, 1 to {self._cap_tokens - 1} fit",
            )
        return None

    def _set_quota(self, message: SetQuota) -> None:
        per_token = self._costs.kv_bytes_per_token
        self._batch.limit_tokens = message.kv_bytes // per_token
        retracted = self._batch.make_room()
        # One request goes on in any case; what it has taken is not free.
        tokens = max(self._batch.limit_tokens, min(self._batch.kv_tokens, self._kv_tokens))
        self._kv_tokens = self._batch.limit_tokens = tokens
        kv_bytes = max(message.kv_bytes, tokens * per_token)
        self._memory.set_quota(kv_bytes)
        self._tell([])
        self._link.send(QuotaSet(message.call, kv_bytes, tokens, retracted))

    def _doze(self, call: int) -> None:
        if self._batch.running or self._batch.waiting:
            busy = ErrorBody(ErrorCode.INTERNAL, "asked to doze with requests in the engine", retry=True)
            self._link.send(Done(call, {}, busy))
            return
        if self._dozing:
            self._link.send(Done(call, {}))
            return
        began = time.perf_counter()
        self._memory.give_back()
        time.sleep(self._costs.doze_ms / 1000)
        self._dozing = True
        self._link.send(Done(call, {"unmap": time.perf_counter() - began}))

    def _prepare_freeze(self, call: int) -> None:
        awake = ErrorBody(ErrorCode.INTERNAL, "asked to be frozen while awake", retry=True)
        self._link.send(Done(call, {}, None if self._dozing else awake))

    def _wake(self, call: int) -> None:
        began = time.perf_counter()
        try:
            self._memory.take_weights()
        except PrismError as error:
            self._link.send(Done(call, {}, error.body))
            return
        time.sleep(self._costs.wake_ms / 1000)
        self._dozing = False
        self._link.send(Done(call, {"copy": time.perf_counter() - began}))


def serve(connection: socket.socket, costs: SimulatedCosts) -> int:
    """Serve one model over `connection` until the worker closes it. Returns the exit status."""
    link = EngineLink(connection)
    try:
        start = link.receive()
        if not isinstance(start, StartEngine):
            raise TypeError(f"the first message must be StartEngine, not {type(start).__name__}")
        setproctitle(f"prism-engine {start.model} (simulated)")
        configure_engine_logging(start.model)
        try:
            engine = SimulatedEngine(link, start, costs)
        except (PrismError, OSError) as error:
            told = error if isinstance(error, PrismError) else PrismError(ErrorCode.MODEL_FAILED, str(error))
            link.send(Failed(start.call, told.body))
            return EXIT_FAILED
        engine.run()
    except WorkerGone:
        return 0
    except Exception as error:
        log.info("what ends this engine", exc_info=error)
        with contextlib.suppress(WorkerGone):
            link.send(Dying(f"{type(error).__name__}: {error}"))
    return EXIT_FAILED


def main() -> None:
    """Be an engine on the inherited socket that the first argument names."""
    configure_engine_logging()
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    costs = msgspec.json.decode(sys.argv[2], type=SimulatedCosts)
    sys.exit(serve(socket.socket(fileno=int(sys.argv[1])), costs))


if __name__ == "__main__":
    main()
