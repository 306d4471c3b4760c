"""A model's weights in an arena of their own: built there, exported from there, copied back into it.

The layout of the arena is the layout of the engine image: a wake is one contiguous copy.
"""

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader.loader import (
    BaseModelLoader,
    DefaultModelLoader,
    _get_quantization_config,
    _initialize_model,
)
from sglang.srt.model_loader.utils import set_default_torch_dtype
from torch import nn

from prism.common.errors import ErrorBody, ErrorCode, PrismError
from prism.common.memfd import create_memfd
from prism.common.messages.store import (
    ImageKind,
    ImageManifest,
    LeaseRequest,
    RoomRequest,
    TensorEntry,
)
from prism.common.store_client import Lease, deposit, lease, room
from prism.gpu_worker.engine.arena import TENSOR_ALIGNMENT, MemoryArena, align
from prism.gpu_worker.engine.arrivals import Arrivals
from prism.gpu_worker.engine_protocol import Progress, StartEngine

KEPT_INITIAL_VALUE_BYTES = 1 << 20
EXPORT_DEADLINE_S = 8.0
TOLD_S = 1.0


class ModelWeights:
    """Owns the lease of a model's image and the arena of its weights, for one engine's life.

    Here for the CPU; `cuda_weights.py` has what a GPU does otherwise.
    """

    def __init__(
        self,
        start: StartEngine,
        *,
        ask_for_memory: Callable[[int], bool],
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._start = start
        self._ask_for_memory = ask_for_memory
        self._on_progress = on_progress
        self._lease: Lease | None = None
        self._layout: list[TensorEntry] = []
        self._export: threading.Thread | None = None
        self._export_error: ErrorBody | None = None
        self.arena: Any = None
        self.seconds: dict[str, float] = {}

    def stage(self) -> None:
        """Lease the model's image from the store, which stages it if need be."""
        began = time.perf_counter()
        self._lease = self._take_lease(self._start.layout)
        self.seconds["stage"] = time.perf_counter() - began

    def _take_lease(self, layout: str) -> Lease:
        return lease(
            self._start.store_socket,
            LeaseRequest(self._start.model, self._start.model_path, layout, self._start.version),
            deadline_s=self._start.store_deadline_s,
            on_progress=lambda done, total: self._on_progress(Progress(done, total)),
        )

    def initializing(self, config: ModelConfig) -> contextlib.AbstractContextManager[Any]:
        """Within this, a model of this configuration is constructed, its weights without content."""
        return contextlib.nullcontext()

    def fill(self, model: nn.Module, target: torch.device) -> None:
        """Move `model`'s tensors into an arena and put the leased image's content there."""
        assert self._lease is not None
        tensors = named_tensors(model)
        self._layout = _layout(tensors)
        nbytes = end_of(self._layout)
        self._take_memory(nbytes)
        self.arena = MemoryArena("prism-weights", nbytes)
        _relocate(tensors, self._layout, self.arena)
        began = time.perf_counter()
        if self._image_fits():
            self._copy_from_image(nbytes)
        else:
            self._lease_checkpoint()
            DefaultModelLoader.load_weights_and_postprocess(model, self._checkpoint(), target)
            self._check_filled()
        self.seconds["load"] = time.perf_counter() - began
        _check_in_place(named_tensors(model), self.arena)

    def finish(self) -> None:
        """Wait until the weights have all of their content. Raises PrismError when they don't get it."""

    def _take_memory(self, nbytes: int) -> None:
        if not self._ask_for_memory(nbytes):
            raise PrismError(
                ErrorCode.OUT_OF_MEMORY,
                f"{self._start.model} needs {nbytes} bytes for its weights, more than the worker has free",
                retry=True,
            )

    def _image_fits(self) -> bool:
        assert self._lease is not None
        return self._lease.kind is ImageKind.ENGINE and self._lease.manifest.tensors == self._layout

    def _lease_checkpoint(self) -> None:
        """Have the checkpoint on lease, be it in the place of an image that is laid out otherwise."""
        assert self._lease is not None
        if self._lease.kind is ImageKind.ENGINE:
            self._lease.close()
            self._lease = self._take_lease("")

    def _checkpoint(self) -> Iterator[tuple[str, torch.Tensor]]:
        assert self._lease is not None
        # Not closed by hand: the mapping goes when the last tensor over it does.
        content = mmap.mmap(self._lease.fd, self._lease.nbytes, access=mmap.ACCESS_COPY)
        return _checkpoint_tensors(self._lease.manifest, content)

    def _copy_from_image(self, nbytes: int) -> None:
        assert self._lease is not None
        self.arena.copy_in(self._lease.fd, nbytes, threads=self._start.copy_threads)

    def _copy_to_image(self, fd: int, nbytes: int) -> None:
        self.arena.copy_out(fd, nbytes)

    def _check_filled(self) -> None:
        """Raises PrismError when the checkpoint had nothing for a part of the weights: SGLang passes that
        over, and the model would answer with noise."""
        assert self.arena is not None
        for entry in self._layout:
            missing = self.arena.untouched_bytes(entry.offset, entry.nbytes)
            if missing:
                raise PrismError(
                    ErrorCode.MODEL_FAILED,
                    f"the checkpoint holds nothing for {missing} of {entry.nbytes} bytes of {entry.name}; "
                    "do config.json and the weights belong together, and are all weight files there?",
                )

    @property
    def nbytes(self) -> int:
        """Bytes of the arena that weights take."""
        return end_of(self._layout)

    @property
    def imaged(self) -> bool:
        """Whether the store holds an engine-layout image that a wake can copy from."""
        return self._lease is not None and self._lease.kind is ImageKind.ENGINE

    @property
    def exporting(self) -> bool:
        """Whether a thread is copying the image out."""
        return self._export is not None and self._export.is_alive()

    def export_behind(self, on_done: Callable[[float, ErrorBody | None], None]) -> None:
        """Deposit the engine-layout image in the store from a thread: weights don't change any more."""
        if self.imaged:
            return

        def export() -> None:
            began = time.perf_counter()
            try:
                self._export_image()
            except PrismError as error:
                self._export_error = error.body
            except Exception as error:
                self._export_error = ErrorBody(ErrorCode.INTERNAL, f"export of the image failed: {error}")
            on_done(time.perf_counter() - began, self._export_error)

        self._export = threading.Thread(target=export, name="image export", daemon=True)
        self._export.start()

    def _export_image(self) -> None:
        assert self.arena is not None
        assert self._lease is not None  # the checkpoint's
        nbytes = end_of(self._layout)
        manifest = ImageManifest(
            fingerprint=self._lease.manifest.fingerprint,
            kind=ImageKind.ENGINE,
            nbytes=nbytes,
            tensors=self._layout,
            layout=self._start.layout,
        )
        # Given back first: the store needs the checkpoint's room for the image.
        self._lease.close()
        self._lease = None
        start, deadline_s = self._start, self._start.store_deadline_s
        wanted = RoomRequest(start.model, manifest.fingerprint, start.layout, nbytes)
        with room(start.store_socket, wanted, deadline_s) as granted, contextlib.ExitStack() as stack:
            fd = create_memfd("prism-image", nbytes)
            stack.callback(os.close, fd)
            self._copy_to_image(fd, nbytes)
            deposit(start.store_socket, start.model, manifest, fd, deadline_s, granted)
            self._lease = self._take_lease(start.layout)
        if not self.imaged:
            raise PrismError(ErrorCode.STORE_UNAVAILABLE, "the store lost the image again", retry=True)

    def require_image(self, *, wait: bool = False) -> None:
        """Raises PrismError when there is no image to wake from: store_unavailable while it is on its way,
        which is waited for with `wait`, else model_failed."""
        if self._export is not None:
            # The thread tells of the image a moment before it ends.
            told = self.imaged or self._export_error is not None
            self._export.join(EXPORT_DEADLINE_S if wait else TOLD_S if told else 0.0)
        if self.exporting:
            raise PrismError(ErrorCode.STORE_UNAVAILABLE, "the image is still being exported", retry=True)
        if not self.imaged:
            reason = self._export_error.message if self._export_error else "no image was exported"
            why = f"cannot doze without an image: {reason}"
            raise PrismError(ErrorCode.MODEL_FAILED, why, retry=True)

    def unmap(self) -> None:
        """Give the weights' memory back; `require_image` has been asked before."""
        assert self.arena is not None
        self.arena.unmap()

    def asleep(self) -> None:
        """The engine dozes, and its worker knows: the time for what would hold up one that serves. Nothing on
        a CPU."""

    def unpin(self) -> None:
        """Nothing is pinned on a CPU."""

    def end_of(self, module: nn.Module, parts: bool) -> int:
        """See layer_gate.EndOf."""
        assert self.arena is not None
        tensors = [*module.parameters(recurse=parts), *module.buffers(recurse=parts)]
        return max((self._end_in_arena(tensor) for tensor in tensors), default=0)

    def _end_in_arena(self, tensor: torch.Tensor) -> int:
        offset = int(tensor.data_ptr()) - int(self.arena.address)
        if not tensor.numel() or not 0 <= offset < self.nbytes:
            return 0
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in steps)
        return offset + int(tensor.element_size() * span)

    def restore(self, left_s: float = 0.0) -> Arrivals:
        """Take memory again and have the weights copied back: all but what takes `left_s` seconds is there
        when this returns. On failure nothing is held. Raises PrismError."""
        assert self.arena is not None
        assert self._lease is not None
        self.arena.map()
        nbytes = end_of(self._layout)
        arrivals = self.arena.begin_copy_in(self._lease.fd, nbytes, threads=self._start.copy_threads)
        return self._awaited(arrivals, left_s)

    def _awaited(self, arrivals: Arrivals, left_s: float) -> Arrivals:
        try:
            arrivals.wait(left_s)
        except BaseException as error:
            arrivals.close()
            self.arena.unmap()
            if isinstance(error, OSError):
                raise PrismError(
                    ErrorCode.STORE_UNAVAILABLE, f"copying the weights back failed: {error}"
                ) from error
            raise
        if arrivals.all_here:
            arrivals.close()
        return arrivals


def loader_for(weights: ModelWeights) -> type[BaseModelLoader]:
    """A loader class that builds the model in `weights`' arena; what `ServerArgs.load_format` takes."""

    class ImageLoader(BaseModelLoader):  # type: ignore[misc]
        """Builds the model without memory behind its weights, then fills it from the leased image."""

        def download_model(self, model_config: ModelConfig) -> None:
            """The store has it."""

        def load_model(self, *, model_config: ModelConfig, device_config: Any) -> nn.Module:
            """The model, its weights in place."""
            target = torch.device(device_config.device)
            quantization = _get_quantization_config(model_config, self.load_config)
            with set_default_torch_dtype(model_config.dtype):
                with target, weights.initializing(model_config):
                    model: nn.Module = _initialize_model(model_config, self.load_config, quantization)
                weights.fill(model, target)
            return model.eval()

    return ImageLoader


def named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """What an image of `model` holds: parameters, and buffers that a checkpoint may have."""
    parameters: list[tuple[str, torch.Tensor]] = list(model.named_parameters())
    persistent = set(model.state_dict(keep_vars=True))
    return parameters + [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]


def _layout(tensors: list[tuple[str, torch.Tensor]]) -> list[TensorEntry]:
    entries = []
    offset = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(TensorEntry(name, offset, nbytes, dtype, tuple(tensor.shape)))
        offset = align(offset + nbytes, TENSOR_ALIGNMENT)
    return entries


def end_of(layout: list[TensorEntry]) -> int:
    """Bytes from the arena's start to the end of its last tensor."""
    return max((entry.offset + entry.nbytes for entry in layout), default=0)


def _relocate(tensors: list[tuple[str, torch.Tensor]], layout: list[TensorEntry], arena: MemoryArena) -> None:
    for (_, tensor), entry in zip(tensors, layout, strict=True):
        placed = arena.view(entry.offset, entry.shape, tensor.dtype)
        # Small tensors may carry an initial value that no checkpoint overwrites (a norm's ones); large
        # ones never do, and reading them would put memory behind what is about to be thrown away.
        if entry.nbytes <= KEPT_INITIAL_VALUE_BYTES:
            placed.copy_(tensor.data)
        tensor.data = placed


def _check_in_place(tensors: list[tuple[str, torch.Tensor]], arena: MemoryArena) -> None:
    for name, tensor in tensors:
        if not arena.address <= tensor.data_ptr() < arena.address + arena.capacity and tensor.numel():
            raise PrismError(
                ErrorCode.UNSUPPORTED,
                f"loading replaced the tensor {name}, so that its memory can't be given back: this "
                "quantisation or CPU weight format is not supported on the cpu device",
            )


def _checkpoint_tensors(manifest: ImageManifest, content: mmap.mmap) -> Iterator[tuple[str, torch.Tensor]]:
    for entry in manifest.tensors:
        dtype = getattr(torch, entry.dtype)
        count = entry.nbytes // dtype.itemsize
        flat = torch.frombuffer(content, dtype=dtype, count=count, offset=entry.offset)
        yield entry.name, flat.view(entry.shape)
