"""Where kernels stay that engines compile, so that the next start on this machine finds them."""

import os
from collections.abc import Mapping
from pathlib import Path

INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
TRITON = "TRITON_CACHE_DIR"
TVM_FFI = "TVM_FFI_CACHE_DIR"


def kernel_caches(home: Path, environment: Mapping[str, str]) -> dict[str, Path]:
    """Their folders, by what compiles."""
    return {
        "Triton": Path(environment.get(TRITON, home / ".triton" / "cache")),
        "flashinfer": home / ".cache" / "flashinfer",
        "torch": Path(environment.get(INDUCTOR, home / ".cache" / "prism" / "inductor")),
        "SGLang": Path(environment.get(TVM_FFI, home / ".cache" / "tvm-ffi")),
    }


def keep_compiled_kernels() -> None:
    """Have what torch compiles stay: its own choice is below the temporary folder, which a reboot or a
    cleaner empties, and which need not be the same at each start."""
    os.environ.setdefault(INDUCTOR, str(kernel_caches(Path.home(), os.environ)["torch"]))
