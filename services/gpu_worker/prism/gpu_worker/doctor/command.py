"""The command: every check, one after the other."""

import json
import os
import sys
import sysconfig
from pathlib import Path

import click
import psutil

from prism.gpu_worker.doctor import host
from prism.gpu_worker.doctor.driver import check_driver_api, check_gpus, largest_gpu_bytes, load_nvml
from prism.gpu_worker.doctor.findings import Finding, as_json, fails, told
from prism.gpu_worker.doctor.packages import (
    Probe,
    check_attention_backends,
    check_autopatch,
    check_packages,
    run_probe,
)


def examine(nvml: object, probe: Probe, attention_backend: str) -> list[Finding]:
    """All findings on this host. `nvml` is the module pynvml, or None."""
    memory = psutil.virtual_memory()
    return [
        *check_gpus(nvml),
        *check_driver_api(),
        *check_packages(probe),
        check_autopatch(Path(sysconfig.get_path("purelib"))),
        check_attention_backends(attention_backend),
        host.check_bandwidth(probe),
        host.check_memfd(),
        host.check_shared_memory(),
        host.check_locked_memory(),
        host.check_huge_pages(),
        host.check_host_memory(memory.total, memory.available, largest_gpu_bytes(nvml)),
        *host.check_compiler(Path.home(), os.environ),
        host.check_mps(os.environ),
    ]


@click.command()
@click.option(
    "--attention-backend",
    envvar="PRISM_ATTENTION_BACKEND",
    show_envvar=True,
    default="triton",
    show_default=True,
    help="The one that engines are told to use.",
)
@click.option("--json", "as_object", is_flag=True, help="One JSON object instead of lines.")
def doctor(attention_backend: str, as_object: bool) -> None:
    """Say what this host lacks for engines on its GPUs, and how to fix it.

    Exit status 1 when something essential is missing.
    """
    findings = examine(load_nvml(), run_probe(), attention_backend)
    click.echo(json.dumps(as_json(findings), indent=2) if as_object else told(findings))
    sys.exit(1 if fails(findings) else 0)
