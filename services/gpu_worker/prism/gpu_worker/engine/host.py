"""An engine host's life: take a model when told, serve it, end with the worker."""

import contextlib
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from setproctitle import setproctitle
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.managers import mm_utils
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.server_args import PortArgs, ServerArgs

from prism.common.errors import ErrorBody, ErrorCode, PrismError, shortened
from prism.common.messages.generation import SamplingParams
from prism.gpu_worker.engine import build_steps, footprint, seeds
from prism.gpu_worker.engine.link import EngineLink, WorkerGone
from prism.gpu_worker.engine.platform import Platform, platform_for
from prism.gpu_worker.engine.ranks import Link, Ranks, SilentLink, fork_ranks
from prism.gpu_worker.engine.scheduler import EngineScheduler
from prism.gpu_worker.engine.uncompiled import penalties_uncompiled
from prism.gpu_worker.engine.weights import ModelWeights, loader_for
from prism.gpu_worker.engine_logs import configure_engine_logging
from prism.gpu_worker.engine_protocol import (
    Dying,
    Failed,
    Generate,
    Imaged,
    RankMemory,
    Ready,
    StartEngine,
    WeightsGranted,
    WeightsSized,
)

log = logging.getLogger(__name__)

EXIT_FAILED = 3
# What kvcached and SGLang make their address ranges from; how much of it is used is the quota's business.
# SGLang would compute it: less than nothing, for long chunks on hosts with little memory a NUMA node.
ADDRESSED_SHARE = 0.9
PRIMING_RID = "priming"
PRIMING_PROMPT_TOKENS = 128
# One by the prompt, one by a decode step.
PRIMING_NEW_TOKENS = 2

# Prompts are token ids, never images. Left unset, the first request of each engine would import SGLang's
# tokenizer manager only to find this out.
mm_utils._is_default_tensor_transport = True


Join = Callable[[StartEngine, socket.socket], tuple[Ranks, StartEngine]]
"""Makes an engine's ranks; returns who this process is among them, and its part of what was asked for."""


def serve(connection: socket.socket, join: Join = fork_ranks) -> int:
    """Serve one model over `connection` until the worker closes it. Returns the exit status."""
    link = EngineLink(connection)
    try:
        start = link.receive()
        if not isinstance(start, StartEngine):
            raise TypeError(f"the first message must be StartEngine, not {type(start).__name__}")
        try:
            ranks, start = join(start, connection)
        except PrismError as error:
            link.send(Failed(start.call, error.body))
            return EXIT_FAILED
        setproctitle(f"prism-engine {start.model}" + (f" rank {ranks.rank}" if ranks.rank else ""))
        configure_engine_logging(start.model)
        try:
            scheduler = _build(SilentLink() if ranks.rank else link, link, start, ranks)
        except WorkerGone:
            raise
        except Exception as error:
            link.send(Failed(start.call, _reason(error, start)))
            return EXIT_FAILED
        scheduler.run_event_loop()
    except WorkerGone:
        return 0
    except Exception as error:
        # The worker tells of its end, with the reason; here is where it came from.
        log.info("what ends this engine", exc_info=error)
        with contextlib.suppress(WorkerGone):
            link.send(Dying(_first_line(error)))
        return EXIT_FAILED
    return 0


def serve_and_exit(connection: int, join: Join = fork_ranks) -> NoReturn:
    """Be an engine host on the inherited socket, and end the process, whatever becomes of it.

    Without the interpreter's own end: tearing down torch takes seconds, and frees nothing the kernel won't.
    """
    status = 1
    try:
        status = serve(socket.socket(fileno=connection), join)
    except BaseException:
        log.exception("engine host failed")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _build(link: Link, worker: EngineLink, start: StartEngine, ranks: Ranks) -> EngineScheduler:
    began = time.perf_counter()

    def ask_for_memory(nbytes: int) -> bool:
        of_ranks = ranks.gather(nbytes)
        total = sum(of_ranks) if platform.one_memory else max(of_ranks)
        granted = False
        if ranks.rank == 0:
            worker.send(WeightsSized(total))
            answer = worker.receive()
            granted = isinstance(answer, WeightsGranted) and answer.granted
        return bool(ranks.gather(granted)[0])

    platform = platform_for(start, ranks)
    weights = platform.weights_class(start, ask_for_memory=ask_for_memory, on_progress=link.send)
    weights.stage()
    platform.prepare()
    seeds.install()
    penalties_uncompiled()

    def step_ended(step: str, seconds: float) -> None:
        weights.seconds[step] = seconds
        footprint.note(step)

    build_steps.follow(ModelRunner, build_steps.MODEL_RUNNER_STEPS, step_ended)
    configuring = time.perf_counter()
    server_args = _server_args(start, weights, platform, ranks)
    weights.seconds["configure"] = time.perf_counter() - configuring
    ports = PortArgs(
        tokenizer_ipc_name="",
        scheduler_input_ipc_name="",
        detokenizer_ipc_name="",
        nccl_port=0,
        rpc_ipc_name="",
        metrics_ipc_name="",
        tokenizer_worker_ipc_name=None,
        decoupled_spec_ipc_config=None,
    )
    scheduler = EngineScheduler(
        server_args,
        ports,
        link=link,
        weights=weights,
        platform=platform,
        ranks=ranks,
        options=start.options,
    )
    built = time.perf_counter()
    footprint.note("built")

    kv = scheduler.kv
    assert kv is not None

    def ready() -> None:
        weights.finish()
        primed = time.perf_counter()
        footprint.note("primed")
        weights_fd, kv_fd = platform.arenas(weights)
        memory = ranks.gather(RankMemory(os.getpid(), weights_fd, kv_fd))
        imaged = all(ranks.gather(weights.imaged))
        # Memory is counted for one GPU, unless all ranks share what there is.
        sharing = ranks.size if platform.one_memory else 1
        link.send(
            Ready(
                call=start.call,
                pid=os.getpid(),
                weights_fd=weights_fd,
                kv_fd=kv_fd,
                kv_tokens=kv.limit_tokens,
                kv_bytes_per_token=sharing * _per_token(scheduler.model_config, ranks),
                imaged=imaged,
                seconds={**weights.seconds, "prime": primed - built, "build": primed - began},
                weights_bytes=weights.nbytes,
                kv_page_bytes=kv.page_bytes,
                kv_overhead_bytes=kv.overhead_bytes,
                ranks=memory[1:],
            )
        )
        if weights.imaged and not imaged:
            # Another rank exports; a doze waits for it there.
            link.send(Imaged(0.0))
        weights.export_behind(lambda seconds, error: link.send(Imaged(seconds, error)))

    if start.options.prime:
        scheduler.on_primed = ready
        scheduler.handle_generate(_priming_request(scheduler))
    else:
        ready()
    return scheduler


def _priming_request(scheduler: EngineScheduler) -> Generate:
    """What has every kernel compiled and loaded that a request needs, before somebody waits for it."""
    length = min(PRIMING_PROMPT_TOKENS, scheduler.max_req_input_len - PRIMING_NEW_TOKENS - 1)
    sampling = SamplingParams(max_new_tokens=PRIMING_NEW_TOKENS, temperature=0.0, ignore_eos=True)
    return Generate(PRIMING_RID, [1] * max(1, length), sampling, None, 0)


def _server_args(start: StartEngine, weights: ModelWeights, platform: Platform, ranks: Ranks) -> ServerArgs:
    common = {
        "model_path": start.model_path,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "dtype": start.dtype,
        "page_size": 1,
        "skip_tokenizer_init": True,
        "sleep_on_idle": True,
        # Without it an idle engine whose memory once looked short stays "full" for ever.
        "enable_priority_scheduling": True,
        "load_format": loader_for(weights),
        "chunked_prefill_size": start.chunked_prefill_tokens,
        "mem_fraction_static": ADDRESSED_SHARE,
        "log_level": "warning",
        "host": "127.0.0.1",
        "tp_size": ranks.size,
        **platform.server_args(start),
    }
    config = ModelConfig(start.model_path, dtype=start.dtype)
    # A batch wider than the contexts that fit into the KV cache would only be retracted again.
    running = start.max_running_requests
    largest = max(start.kv_bytes, start.kv_cap_bytes)
    tables = _request_table_bytes(config.context_len, running)
    tokens = (largest - tables) // _per_token(config, ranks) - 1
    if tokens < 2:
        raise PrismError(
            ErrorCode.OUT_OF_MEMORY,
            f"{start.model}: a KV quota of {largest} bytes holds no token; raise max_memory_pool_size",
        )
    return ServerArgs(**common, max_total_tokens=tokens, max_running_requests=running)


def _request_table_bytes(context_length: int, running: int) -> int:
    # SGLang's table of KV slots: an int32 for each position of each request, with some room.
    return (running + 2) * (context_length + 64) * 4


def _per_token(config: ModelConfig, ranks: Ranks) -> int:
    """KV bytes of a token on one rank."""
    heads = int(config.get_num_kv_heads(ranks.size))
    element = int(config.dtype.itemsize)
    return 2 * int(config.num_hidden_layers) * heads * int(config.head_dim) * element


def _reason(error: Exception, start: StartEngine) -> ErrorBody:
    if isinstance(error, PrismError):
        return error.body
    where = traceback.extract_tb(error.__traceback__)[-1]
    log.debug("why it did not start", exc_info=error)
    why = shortened(f"{type(error).__name__}: {error}")
    return ErrorBody(
        ErrorCode.MODEL_FAILED,
        f"{start.model} from {start.model_path} failed to start: {why} "
        f"({Path(where.filename).name}:{where.lineno})",
    )
