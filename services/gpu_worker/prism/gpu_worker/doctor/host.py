"""The host around the GPU: shared memory, limits, huge pages, compilers and their caches, MPS."""

import os
import resource
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from prism.common.memfd import create_memfd
from prism.gpu_worker.doctor.findings import Finding, Verdict
from prism.gpu_worker.doctor.packages import Probe
from prism.gpu_worker.kernel_caches import kernel_caches

GIB = 1 << 30
SHMEM_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
SHARED_MEMORY = Path("/dev/shm")
# kvcached keeps a segment per engine there, some KiB each.
LEAST_SHARED_BYTES = 16 << 20
LEAST_PINNED_BYTES_PER_S = 20e9
COMFORTABLE_MEMORY_BYTES = 64 * GIB
NEED_NVCC = ("flashinfer", "SGLang")
"""Whose kernels nvcc compiles."""


def check_memfd() -> Finding:
    """Whether images can be held and handed over."""
    try:
        os.close(create_memfd("prism-doctor", 1 << 20))
    except OSError as error:
        fix = "allow memfd_create (seccomp profile of the container)"
        return Finding("memfd", Verdict.MISSING, str(error), fix, essential=True)
    return Finding("memfd", Verdict.OK, "images need no room in /dev/shm")


def check_shared_memory(folder: Path = SHARED_MEMORY) -> Finding:
    """Room for kvcached's small segments."""
    try:
        found = os.statvfs(folder)
    except OSError as error:
        fix = "mount a tmpfs there"
        return Finding("shared memory", Verdict.MISSING, f"{folder}: {error.strerror}", fix, essential=True)
    free = found.f_bavail * found.f_frsize
    if free < LEAST_SHARED_BYTES:
        fix = "docker run --shm-size=64m, or remove what lies there"
        return Finding(
            "shared memory", Verdict.MISSING, f"{free >> 20} MiB free in {folder}", fix, essential=True
        )
    return Finding("shared memory", Verdict.OK, f"{free >> 20:,} MiB free in {folder}")


def check_locked_memory(limit: int | None = None) -> Finding:
    """The limit of locked memory; the driver's own pinning was never seen to count against it."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    if soft == resource.RLIM_INFINITY:
        return Finding("locked memory", Verdict.OK, "no limit")
    fix = "only if pinning fails: ulimit -l unlimited (systemd: LimitMEMLOCK=infinity)"
    return Finding("locked memory", Verdict.NOTE, f"limited to {soft / GIB:.2f} GiB", fix)


def check_huge_pages(setting: Path = SHMEM_HUGE_PAGES) -> Finding:
    """Whether images may lie in huge pages."""
    try:
        words = setting.read_text()
    except OSError as error:
        return Finding("huge pages", Verdict.UNKNOWN, f"{setting}: {error.strerror}")
    chosen = words[words.find("[") + 1 : words.find("]")]
    if chosen in ("advise", "always", "within_size", "force"):
        return Finding("huge pages", Verdict.OK, f"shmem_enabled is {chosen}")
    fix = f"as root: echo advise > {setting} (filling and pinning images is several times as fast)"
    return Finding("huge pages", Verdict.SLOW, f"shmem_enabled is {chosen}", fix)


def check_host_memory(total: int, available: int, gpu_bytes: int) -> Finding:
    """Host memory against that of the GPUs, all in bytes: what sleeps lies in it."""
    found = f"{available / GIB:.0f} of {total / GIB:.0f} GiB available"
    wanted = max(gpu_bytes, COMFORTABLE_MEMORY_BYTES if gpu_bytes else 0)
    if total < wanted:
        fix = f"models that sleep lie here; {wanted / GIB:.0f} GiB hold one GPU's worth of them"
        return Finding("host memory", Verdict.SLOW, found, fix)
    return Finding("host memory", Verdict.OK, found)


def check_bandwidth(probe: Probe) -> Finding:
    """The bus, as pinned copies see it: the limit of every wake."""
    rate = probe.pinned_bytes_per_s
    if rate is None:
        return Finding("pinned bandwidth", Verdict.UNKNOWN, "not measured: no GPU is reached")
    found = f"{rate / 1e9:.1f} GB/s to the GPU"
    if rate < LEAST_PINNED_BYTES_PER_S:
        fix = "PCIe 4 x16 gives 25, PCIe 5 x16 55: look at the slot (nvidia-smi -q -d PCIE) and at NUMA nodes"
        return Finding("pinned bandwidth", Verdict.SLOW, found, fix)
    return Finding("pinned bandwidth", Verdict.OK, found)


def check_compiler(
    home: Path, environment: Mapping[str, str], which: Callable[[str], str | None] = shutil.which
) -> list[Finding]:
    """nvcc, and what was compiled before: flashinfer and SGLang have it compile kernels when they are first
    used, by the shapes of a model."""
    root = environment.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = which("nvcc") or which(f"{root}/bin/nvcc")
    caches = kernel_caches(home, environment)
    held = {name: _entries(folder) for name, folder in caches.items()}
    lacking = [name for name in NEED_NVCC if not held[name]]
    if nvcc:
        findings = [Finding("nvcc", Verdict.OK, nvcc)]
    elif lacking:
        found = f"neither it nor cached kernels of {' and '.join(lacking)}"
        fix = "install the CUDA toolkit 13, or copy from an equal host: "
        fix += ", ".join(str(caches[name]) for name in lacking)
        findings = [Finding("nvcc", Verdict.MISSING, found, fix, essential=True)]
    else:
        fix = "a kernel that is not cached yet can't be compiled: install the CUDA toolkit"
        findings = [Finding("nvcc", Verdict.SLOW, "not there, but kernels are cached", fix)]
    for name, count in held.items():
        if count:
            findings.append(Finding(f"{name}'s cache", Verdict.OK, f"{count} entries in {caches[name]}"))
        elif name == "torch":
            found = f"nothing in {caches[name]}; only engines on several GPUs compile by it"
            findings.append(Finding(f"{name}'s cache", Verdict.OK, found))
        else:
            fix = "the first start of each kind of model compiles for 20 to 50 s"
            findings.append(Finding(f"{name}'s cache", Verdict.SLOW, f"nothing in {caches[name]}", fix))
    return findings


def _entries(folder: Path) -> int:
    try:
        return sum(1 for _ in folder.iterdir())
    except OSError:
        return 0


def check_mps(environment: Mapping[str, str], which: Callable[[str], str | None] = shutil.which) -> Finding:
    """Whether NVIDIA's Multi-Process Service runs: engines of one GPU then compute at once."""
    pipes = Path(environment.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    if (pipes / "control").exists():
        return Finding("MPS", Verdict.NOTE, f"runs ({pipes}); frozen engines were never tried under it")
    if which("nvidia-cuda-mps-control"):
        return Finding("MPS", Verdict.NOTE, "can be started: nvidia-cuda-mps-control -d")
    return Finding("MPS", Verdict.NOTE, "not installed")
