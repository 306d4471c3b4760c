"""`python -m prism.gpu_worker`: hosts the engines of one node's GPUs; `... doctor` examines the host."""

import asyncio
import logging
import os
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import click

from prism.common.bus import connect_bus
from prism.common.identity import instance_id, node_name
from prism.common.messages.placement import GpuIdClaim
from prism.common.micro import micro_service
from prism.common.modes import DEFAULT_MODE, MODES, keeps_kv_quotas
from prism.common.process import run_service
from prism.common.telemetry import LOG_FORMATS, LOG_LEVELS, configure_logging
from prism.gpu_worker.devices.cpu import cpu_device
from prism.gpu_worker.devices.device import Device
from prism.gpu_worker.devices.simulated import simulated_device
from prism.gpu_worker.devices.simulated_costs import costs_from
from prism.gpu_worker.engine_logs import logging_environment
from prism.gpu_worker.engine_protocol import EngineOptions
from prism.gpu_worker.frames import frame_publisher
from prism.gpu_worker.gpu_id_claims import claimed_gpu_ids
from prism.gpu_worker.model_instance import EngineLimits
from prism.gpu_worker.worker import WorkerIdentity, run_worker
from prism.scheduling.admission import DEFAULT_POLICY, Bounds, make_policy
from prism.scheduling.admission import policies as admission_policies

log = logging.getLogger(__name__)

GB = 1_000_000_000
AUTO = "auto"
CPU_LIMITS = EngineLimits(max_running_requests=16, chunked_prefill_tokens=512)
# As many as there are CUDA graphs for; chunks that let an 8B model decode on every 80 ms.
USUAL_LIMITS = {"cuda": EngineLimits(max_running_requests=64, chunked_prefill_tokens=2048)}


def _gpu_id_option(_context: click.Context, _option: click.Parameter, text: str) -> int | None:
    """The value of --first-gpu-id, None for AUTO."""
    if text == AUTO:
        return None
    if text.isdecimal():
        return int(text)
    raise click.BadParameter(f"{text!r} is neither {AUTO!r} nor a number from 0 on")


def _gpus_option(_context: click.Context, _option: click.Parameter, text: str) -> list[int]:
    """The value of --gpu."""
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
        raise click.BadParameter(f"{text!r} is not made of different numbers with commas between them")
    return [int(number) for number in numbers]


def _graph_sizes_option(_context: click.Context, _option: click.Parameter, text: str) -> list[int]:
    """The value of --decode-graph-sizes; empty for none."""
    if text == "none":
        return []
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise click.BadParameter(f"{text!r} is neither 'none' nor numbers from 1 on with commas between them")
    return [int(size) for size in sizes]


@click.command()
@click.option(
    "--nats", "nats_url", envvar="PRISM_NATS_URL", show_envvar=True, default="nats://127.0.0.1:4222"
)
@click.option("--node", envvar="PRISM_NODE", show_envvar=True, default=node_name, help="Name of this host.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "simulated"]),
    envvar="PRISM_DEVICE",
    show_envvar=True,
    default="cpu",
    show_default=True,
    help="What the engines run on. simulated: nothing; they say numbers, as PRISM_SIMULATED_* set.",
)
@click.option(
    "--first-gpu-id",
    metavar="NUMBER|auto",
    callback=_gpu_id_option,
    envvar="PRISM_FIRST_GPU_ID",
    show_envvar=True,
    default=AUTO,
    show_default=True,
    help="Cluster-wide id of this worker's first GPU. auto: the lowest that no other worker has.",
)
@click.option(
    "--gpu",
    "gpus",
    metavar="NUMBER[,NUMBER...]",
    callback=_gpus_option,
    envvar="PRISM_GPU",
    show_envvar=True,
    default="0",
    show_default=True,
    help="cuda: which of this machine's GPUs, as nvidia-smi numbers them. Several: for models whose tp_size "
    "is their number, and for no others.",
)
@click.option(
    "--warm-shells",
    type=click.IntRange(min=1),
    envvar="PRISM_WARM_SHELLS",
    show_envvar=True,
    default=1,
    show_default=True,
    help="cuda: engine processes that are started ahead of need.",
)
@click.option(
    "--attention-backend",
    envvar="PRISM_ATTENTION_BACKEND",
    show_envvar=True,
    default="triton",
    show_default=True,
    help="cuda: SGLang's attention backend (triton, fa3 where it is installed, flashinfer).",
)
@click.option(
    "--decode-graph-sizes",
    metavar="SIZES|none",
    callback=_graph_sizes_option,
    envvar="PRISM_DECODE_GRAPH_SIZES",
    show_envvar=True,
    default="1,2,4,8,16,24,32,48,64",
    show_default=True,
    help="cuda: batch sizes that are decoded with a CUDA graph; the largest batch always is one of them.",
)
@click.option(
    "--defer-graphs/--no-defer-graphs",
    envvar="PRISM_DEFER_GRAPHS",
    show_envvar=True,
    default=False,
    show_default=True,
    help="cuda: capture CUDA graphs once an engine is idle, not before its first token.",
)
@click.option(
    "--wake-lead-ms",
    type=click.FloatRange(min=0),
    envvar="PRISM_WAKE_LEAD_MS",
    show_envvar=True,
    default=150.0,
    show_default=True,
    help="How long before its last weights are there a woken engine takes requests; each layer waits for its "
    "own. 0: not before.",
)
@click.option(
    "--lend-bus/--no-lend-bus",
    envvar="PRISM_LEND_BUS",
    show_envvar=True,
    default=False,
    show_default=True,
    help="cuda: while nothing wakes on this GPU, models that wake on the node's others get a part of their "
    "weights through its bus; and ours through theirs. For workers with one GPU, over NVLink.",
)
@click.option(
    "--worker-memory-gb",
    type=click.FloatRange(min=0, min_open=True),
    envvar="PRISM_WORKER_MEMORY_GB",
    show_envvar=True,
    help="What weights, KV caches and (cuda) engines may take, in 10^9 bytes. "
    "[default: 4; cuda: the GPU's memory less room for activations]",
)
@click.option(
    "--store-socket",
    envvar="PRISM_STORE_SOCKET",
    show_envvar=True,
    required=True,
    help="Unix socket of this node's model store.",
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    envvar="PRISM_MODE",
    show_envvar=True,
    default=DEFAULT_MODE,
    show_default=True,
    help="static: every model keeps the KV cache that it was activated with. Else it moves between them.",
)
@click.option(
    "--admission",
    type=click.Choice(sorted(admission_policies)),
    envvar="PRISM_ADMISSION",
    show_envvar=True,
    default=DEFAULT_POLICY,
    show_default=True,
    help="Which queued request starts next.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=1),
    envvar="PRISM_PATIENCE",
    show_envvar=True,
    default=Bounds().patience,
    show_default=True,
    help="moore_hodgson: a request that has waited so many times its objective goes first.",
)
@click.option(
    "--max-running-requests",
    type=click.IntRange(min=1),
    envvar="PRISM_MAX_RUNNING_REQUESTS",
    show_envvar=True,
    help="Requests that one engine runs at once.  [default: 64 on cuda, else 16]",
)
@click.option(
    "--chunked-prefill-tokens",
    type=click.IntRange(min=1),
    envvar="PRISM_CHUNKED_PREFILL_TOKENS",
    show_envvar=True,
    help="Prompt tokens that one engine step takes at most.  [default: 2048 on cuda, else 512]",
)
@click.option(
    "--engine-stall-s",
    type=click.FloatRange(min=0, min_open=True),
    envvar="PRISM_ENGINE_STALL_S",
    show_envvar=True,
    default=10.0,
    show_default=True,
    help="An engine with requests that says nothing for so long is stuck, and ended.",
)
@click.option(
    "--coalesce-ms",
    type=click.FloatRange(0, 1000),
    envvar="PRISM_COALESCE_MS",
    show_envvar=True,
    default=0.0,
    show_default=True,
    help="Collect a request's tokens for so long into one frame; its first one never waits.",
)
@click.option(
    "--drain-s",
    type=click.FloatRange(min=0),
    envvar="PRISM_DRAIN_S",
    show_envvar=True,
    default=30.0,
    show_default=True,
    help="How long requests may finish after SIGTERM.",
)
@click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS, case_sensitive=False),
    envvar="PRISM_LOG_LEVEL",
    show_envvar=True,
    default="INFO",
    show_default=True,
)
@click.option(
    "--log-format",
    type=click.Choice(LOG_FORMATS),
    envvar="PRISM_LOG_FORMAT",
    show_envvar=True,
    default="text",
    show_default=True,
    help="json: one object a line.",
)
def main(
    nats_url: str,
    node: str,
    device: str,
    first_gpu_id: int | None,
    gpus: list[int],
    warm_shells: int,
    attention_backend: str,
    decode_graph_sizes: list[int],
    defer_graphs: bool,
    wake_lead_ms: float,
    lend_bus: bool,
    worker_memory_gb: float | None,
    store_socket: str,
    mode: str,
    admission: str,
    patience: float,
    max_running_requests: int | None,
    chunked_prefill_tokens: int | None,
    engine_stall_s: float,
    coalesce_ms: float,
    drain_s: float,
    log_level: str,
    log_format: str,
) -> None:
    """Host the engines of this node's GPUs. `doctor` as the first argument examines the host instead."""
    identity = WorkerIdentity(instance_id("worker"), node, [])
    configure_logging("gpu_worker", log_level, log_format, worker=identity.worker)
    os.environ.update(logging_environment(log_level, log_format, identity.worker))
    # The front holds no CUDA context, whatever its engines do.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def go_by(gpu_ids: list[int]) -> None:
        identity.gpu_ids = gpu_ids

    owned = len(gpus) if device == "cuda" else 1
    usual = USUAL_LIMITS.get(device, CPU_LIMITS)
    limits = EngineLimits(
        max_running_requests or usual.max_running_requests,
        chunked_prefill_tokens or usual.chunked_prefill_tokens,
        engine_stall_s,
    )

    async def serve(stop: asyncio.Event) -> None:
        async with (
            connect_bus(nats_url, name=identity.worker) as bus,
            # Engines begin their imports, which take longer than ids do.
            _device(
                device,
                gpus,
                warm_shells,
                attention_backend,
                decode_graph_sizes,
                defer_graphs,
                wake_lead_ms / 1000,
                Path(store_socket).with_suffix(".buses") if lend_bus else None,
            ) as engines,
            claimed_gpu_ids(bus, GpuIdClaim(identity.worker, node), go_by, first=first_gpu_id, count=owned),
            frame_publisher(bus, coalesce_ms / 1000) as publisher,
            run_worker(
                identity,
                bus,
                engines,
                publisher,
                drain_s=drain_s,
                admission=make_policy(admission, Bounds(patience)),
                bounds=Bounds(patience),
                memory_limit_bytes=_memory_limit(engines, worker_memory_gb),
                store_socket=store_socket,
                limits=limits,
                moves_kv_quotas=not keeps_kv_quotas(mode),
            ),
            micro_service(
                bus,
                "prism-gpu-worker",
                instance=identity.worker,
                description="Hosts the engines of one node's GPUs",
                # Without GPU ids: what stands here can't change, and they can. Load reports have them.
                metadata={
                    "node": node,
                    "device": device,
                    "memory_gb": f"{_memory_limit(engines, worker_memory_gb) / GB:g}",
                    "admission": admission,
                },
            ),
        ):
            limit_gb = _memory_limit(engines, worker_memory_gb) / GB
            ids = ", ".join(map(str, identity.gpu_ids))
            log.info("worker %s ready: %s, GPU ids %s, %.3f GB", identity.worker, device, ids, limit_gb)
            await stop.wait()

    sys.exit(run_service("gpu_worker", serve))


def _device(
    name: str,
    gpus: list[int],
    warm_shells: int,
    attention_backend: str,
    decode_graph_sizes: list[int],
    defer_graphs: bool,
    wake_lead_s: float,
    lent_buses: Path | None,
) -> AbstractAsyncContextManager[Device]:
    if name == "simulated":
        return simulated_device(costs_from(os.environ))
    if name == "cuda":
        # Its libraries are there where GPUs are.
        from prism.gpu_worker.devices.cuda import cuda_device

        return cuda_device(
            gpus,
            warm=warm_shells,
            attention_backend=attention_backend,
            decode_graph_sizes=decode_graph_sizes,
            defer_graphs=defer_graphs,
            wake_lead_s=wake_lead_s,
            lent_buses=lent_buses,
        )
    return cpu_device(EngineOptions(wake_lead_s=wake_lead_s))


def _memory_limit(device: Device, chosen_gb: float | None) -> int:
    return device.default_memory_bytes if chosen_gb is None else int(chosen_gb * GB)


if __name__ == "__main__":
    if sys.argv[1:2] == ["doctor"]:
        from prism.gpu_worker.doctor.command import doctor

        doctor(sys.argv[2:], prog_name="python -m prism.gpu_worker doctor")
    main()
