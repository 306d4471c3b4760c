"""`python -m prism.model_store`: run the model store of this node."""

import os
from pathlib import Path

import click

from prism.common.identity import instance_id, node_name
from prism.common.process import exit_with, run_service
from prism.common.store_client import default_socket_path
from prism.common.telemetry import LOG_FORMATS, LOG_LEVELS, configure_logging
from prism.model_store.service import StoreSettings, default_budget_bytes, default_disk_bytes, serve


@click.command()
@click.option(
    "--nats", default="nats://127.0.0.1:4222", envvar="PRISM_NATS_URL", show_envvar=True, show_default=True
)
@click.option("--node", default=node_name, envvar="PRISM_NODE", show_envvar=True, help="This node's name.")
@click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    default=default_socket_path,
    envvar="PRISM_STORE_SOCKET",
    show_envvar=True,
    help="Where engines of this node connect.",
)
@click.option(
    "--image-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: Path.home() / ".cache" / "prism" / "images",
    envvar="PRISM_IMAGE_DIR",
    show_envvar=True,
    help="Where images in engines' layouts persist.",
)
@click.option(
    "--memory-gb",
    type=click.FloatRange(min=0, min_open=True),
    envvar="PRISM_STORE_MEMORY_GB",
    show_envvar=True,
    help="Host memory for images, in GB of 10^9 bytes. [default: half of the memory]",
)
@click.option(
    "--disk-gb",
    type=click.FloatRange(min=0, min_open=True),
    envvar="PRISM_STORE_DISK_GB",
    show_envvar=True,
    help="What images may take in --image-dir, in GB of 10^9 bytes; those unused for longest go first. "
    "[default: half of the disk]",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=lambda: min(8, os.cpu_count() or 1),
    envvar="PRISM_STORE_THREADS",
    show_envvar=True,
    help="Threads that read one model.",
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
    nats: str,
    node: str,
    socket_path: Path,
    image_dir: Path,
    memory_gb: float | None,
    disk_gb: float | None,
    threads: int,
    log_level: str,
    log_format: str,
) -> None:
    """Stage the weights of this node's models in shared memory and lend them to engines."""
    instance = instance_id("store")
    configure_logging("model_store", log_level, log_format, store=instance)
    settings = StoreSettings(
        instance=instance,
        nats_url=nats,
        node=node,
        socket_path=socket_path,
        image_dir=image_dir,
        budget_bytes=int(memory_gb * 1e9) if memory_gb else default_budget_bytes(),
        disk_bytes=int(disk_gb * 1e9) if disk_gb else default_disk_bytes(image_dir),
        threads=threads,
    )
    exit_with(run_service("model_store", lambda stop: serve(settings, stop)))


if __name__ == "__main__":
    main()
