"""The Python packages that an engine on a GPU is made of, looked at without importing them here."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path

import msgspec

from prism.gpu_worker.doctor.findings import Finding, Verdict

PROBE_DEADLINE_S = 180.0
TESTED = {"torch": "2.11.0", "sglang": "0.5.15", "kvcached": "0.1.6"}
AUTOPATCH = "kvcached_autopatch.pth"
FLASH_OPS = "flash_ops*.so"
GPU_SETUP = "make setup PROFILE=gpu, or docs/gpu.md for a host without network"


class Probe(msgspec.Struct, frozen=True):
    """What `probe.py` saw in a process of its own. Bandwidth in bytes/s, None where it was not measured;
    `kvcached` says why its native part can't be loaded, nothing if it can."""

    torch_cuda: str | None = None
    cuda_available: bool = False
    kvcached: str = ""
    pinned_bytes_per_s: float | None = None
    error: str = ""


def run_probe(deadline_s: float = PROBE_DEADLINE_S, python: str = sys.executable) -> Probe:
    """Import torch and kvcached, and measure, in a process that leaves no context behind on the GPU."""
    try:
        run = subprocess.run(
            [python, "-m", "prism.gpu_worker.doctor.probe"],
            capture_output=True,
            text=True,
            timeout=deadline_s,
        )
    except subprocess.TimeoutExpired:
        return Probe(error=f"no answer within {deadline_s:.0f} s")
    try:
        return msgspec.convert(json.loads(run.stdout.strip().splitlines()[-1]), Probe)
    except (IndexError, ValueError):
        last = (run.stderr.strip().splitlines() or ["nothing said"])[-1]
        return Probe(error=f"exit status {run.returncode}: {last}")


def check_packages(probe: Probe, version: Callable[[str], str] = installed_version) -> list[Finding]:
    """Versions, torch's CUDA, kvcached's native part."""
    findings = [_versioned(package, version) for package in TESTED]
    if probe.error:
        findings.append(
            Finding("torch's CUDA", Verdict.MISSING, probe.error, "see the error", essential=True)
        )
    elif probe.torch_cuda is None:
        found = "this torch is built without CUDA"
        findings.append(Finding("torch's CUDA", Verdict.MISSING, found, GPU_SETUP, essential=True))
    elif not probe.cuda_available:
        found = f"CUDA {probe.torch_cuda}, but it reaches no GPU"
        fix = "see the driver above; is CUDA_VISIBLE_DEVICES empty?"
        findings.append(Finding("torch's CUDA", Verdict.MISSING, found, fix, essential=True))
    else:
        findings.append(Finding("torch's CUDA", Verdict.OK, f"CUDA {probe.torch_cuda}"))
    if probe.kvcached:
        fix = "build it on this host, it links against the driver: docs/gpu.md"
        findings.append(
            Finding("kvcached's native part", Verdict.MISSING, probe.kvcached, fix, essential=True)
        )
    elif not probe.error:
        findings.append(Finding("kvcached's native part", Verdict.OK, "loads"))
    return findings


def _versioned(package: str, version: Callable[[str], str]) -> Finding:
    try:
        found = version(package)
    except PackageNotFoundError:
        return Finding(package, Verdict.MISSING, "not installed", GPU_SETUP, essential=True)
    if found.split("+")[0] != TESTED[package]:
        fix = f"{TESTED[package]} is what was tested; others may place tensors or hooks elsewhere"
        return Finding(package, Verdict.SLOW, found, fix)
    return Finding(package, Verdict.OK, found)


def check_autopatch(site: Path) -> Finding:
    """Whether kvcached patches SGLang when Python starts: without it, SGLang runs its own allocator."""
    if (site / AUTOPATCH).exists():
        return Finding("kvcached's patch", Verdict.OK, f"{AUTOPATCH} is in place")
    fix = f"install kvcached by pip, or copy {AUTOPATCH} of its source into {site}"
    return Finding("kvcached's patch", Verdict.MISSING, f"no {AUTOPATCH} in {site}", fix, essential=True)


def check_attention_backends(chosen: str) -> Finding:
    """Which attention backends are there; `chosen` is what engines are told to use."""
    there = [name for name in ("triton", "flashinfer") if find_spec(name) is not None]
    if _has_flash_attention_3():
        there.append("fa3")
    found = ", ".join(there) or "none"
    if chosen in there:
        return Finding("attention backends", Verdict.OK, f"{found}; {chosen} is used")
    fix = f"--attention-backend one of: {found}" if there else GPU_SETUP
    return Finding("attention backends", Verdict.MISSING, f"{found}; not {chosen}", fix, essential=True)


def _has_flash_attention_3() -> bool:
    try:
        files = distribution("sglang-kernel").files or []
    except PackageNotFoundError:
        return False
    return any(file.match(FLASH_OPS) and Path(str(file.locate())).exists() for file in files)
