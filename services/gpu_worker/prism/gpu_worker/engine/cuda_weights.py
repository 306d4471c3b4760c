"""A model's weights on a GPU: constructed in place, copied in and out at the speed of the bus.

Twice the weights would not fit beside each other, so the model is constructed in the arena from the start:
what its layers allocate with `torch.empty` lies there. Loading and post-processing may replace tensors
(quantised weights); those are moved into the arena behind the others. An engine from an image does
the same with no content in them, so that it comes to the same layout, and then copies the image over it all.
"""

import concurrent.futures
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader.loader import DefaultModelLoader
from torch import nn
from torch.overrides import TorchFunctionMode

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.store import ImageKind, TensorEntry
from prism.gpu_worker.engine import captures, cuda_driver
from prism.gpu_worker.engine.arrivals import Arrivals
from prism.gpu_worker.engine.cuda_arena import UNTOUCHED, CudaArena
from prism.gpu_worker.engine.registered_image import RegisteredImage
from prism.gpu_worker.engine.tensor_factories import asked_for
from prism.gpu_worker.engine.weights import ModelWeights, end_of, named_tensors
from prism.gpu_worker.lent_bus.borrowing import Buses

ADDRESS_SLACK = 2
LEAST_ADDRESSES = 8 << 30
# Placed when the model is complete: many, and some are replaced once more.
SMALL_TENSOR_BYTES = 64 * 1024
# Norms and biases of a layer, and the scales of one that is quantised: 70B in FP8 has 354 KiB.
FRONT_BYTES_A_LAYER = 64 * 1024
QUANTISED_FRONT_BYTES_A_LAYER = 384 * 1024


class CudaModelWeights(ModelWeights):
    """Weights of one engine on the GPU `gpu` of this process."""

    arena: CudaArena

    def __init__(self, *args: Any, gpu: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gpu = gpu
        self._registered: RegisteredImage | None = None
        folder = self._start.options.lent_buses
        # A rank of several has neighbours that are not idle.
        self._buses = Buses(Path(folder), self._start.options.own_gpus) if folder else None
        self._filling: Future[None] | None = None

    @contextlib.contextmanager
    def initializing(self, config: ModelConfig) -> Iterator[None]:
        """Construct the model in the arena."""
        assert self._lease is not None
        capacity = max(self._start.weights_bytes * ADDRESS_SLACK, LEAST_ADDRESSES)
        # A model primed before its content is there must not compute with NaN: a router of experts would
        # take that for any of them.
        filler = 0 if self._lease.kind is ImageKind.ENGINE else UNTOUCHED
        self.arena = CudaArena(
            self._gpu,
            capacity,
            filler,
            front_bytes=_front_bytes(config),
            exportable=self._buses is not None,
        )
        with _PlaceIn(self.arena):
            yield

    def fill(self, model: nn.Module, target: torch.device) -> None:
        """Give the constructed model its content: from the checkpoint before this returns, or from the leased
        image, by a thread, while SGLang goes on building; `finish` waits for that."""
        assert self._lease is not None
        began = time.perf_counter()
        if self._lease.kind is ImageKind.ENGINE:
            # No content yet, only the tensors that post-processing leaves.
            DefaultModelLoader.load_weights_and_postprocess(_Unloaded(model), iter(()), target)
            self._settle(model)
            if self._image_fits():
                self._fill_behind(end_of(self._layout))
            else:
                raise PrismError(
                    ErrorCode.MODEL_FAILED,
                    f"the engine image of {self._start.model} has another layout than this engine gives it; "
                    "delete it from the store's image folder, it is made anew",
                )
        else:
            DefaultModelLoader.load_weights_and_postprocess(model, self._checkpoint(), target)
            self._settle(model)
            self._check_filled()
        self.seconds["load"] = time.perf_counter() - began

    def _fill_behind(self, nbytes: int) -> None:
        # What construction has enqueued on other streams must not land on top of the content.
        torch.cuda.synchronize(self._gpu)
        context = cuda_driver.current_context()
        filling: Future[None] = Future()

        def fill() -> None:
            try:
                cuda_driver.use_context(context)
                self._copy_from_image(nbytes)
            except BaseException as error:
                filling.set_exception(error)
            else:
                filling.set_result(None)

        self._filling = filling
        captures.wait_before_each(torch.cuda.CUDAGraph, self._until_filled)
        threading.Thread(target=fill, name="fill weights", daemon=True).start()

    def _until_filled(self) -> None:
        # What went wrong is said by `finish`: SGLang takes any error here for one of the capture.
        if self._filling is not None:
            concurrent.futures.wait([self._filling])

    def finish(self) -> None:
        """See ModelWeights. The copy's own deadline is that of the start, which ends this process."""
        filling, self._filling = self._filling, None
        if filling is not None:
            began = time.perf_counter()
            filling.result()
            self.seconds["awaited"] = time.perf_counter() - began

    def _settle(self, model: nn.Module) -> None:
        """Have every tensor in the arena, and know where."""
        entries = []
        for name, tensor in named_tensors(model):
            if tensor.numel() and not self._holds(tensor):
                if tensor.is_contiguous():
                    placed = self.arena.place_in_front(tuple(tensor.shape), tensor.dtype)
                else:
                    placed = self._place_strided(name, tensor)
                placed.copy_(tensor.data)
                tensor.data = placed
            offset = tensor.data_ptr() - self.arena.address if tensor.numel() else 0
            nbytes = tensor.numel() * tensor.element_size()
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries.append(TensorEntry(name, offset, nbytes, dtype, tuple(tensor.shape)))
        self._layout = entries
        torch.cuda.empty_cache()
        self._take_memory(end_of(entries))

    def _place_strided(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in steps)
        if span != math.prod(tensor.shape):
            raise PrismError(
                ErrorCode.UNSUPPORTED,
                f"the weights of {self._start.model} can't be put into an image exactly: {name} has strides "
                f"{tensor.stride()} over shape {tuple(tensor.shape)}; use another quantisation of the model",
            )
        flat = self.arena.place_in_front((span,), tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride())

    def _holds(self, tensor: torch.Tensor) -> bool:
        return 0 <= int(tensor.data_ptr()) - self.arena.address < self.arena.used

    def _copy_from_image(self, nbytes: int) -> None:
        assert self._lease is not None
        image = self._image(self._lease.fd, nbytes)
        began = time.perf_counter()
        self.arena.copy_in(image, nbytes)
        self.seconds["copy"] = time.perf_counter() - began

    def unpin(self) -> None:
        """Have no pinned memory."""
        if self._registered is not None:
            self._registered.unpin()

    def asleep(self) -> None:
        """Have the rest of the image pinned, and lent buses told of it."""
        assert self._registered is not None
        self._registered.pin_behind()
        if self._buses is not None:
            assert self._lease is not None
            self._buses.offer(self._lease.fd, end_of(self._layout))

    def restore(self, left_s: float = 0.0) -> Arrivals:
        """See ModelWeights; memory is behind all of them when this returns."""
        assert self._lease is not None
        assert self._registered is not None
        self._registered.end_pinning_behind()
        nbytes = end_of(self._layout)
        image = self._image(self._lease.fd, nbytes)
        try:
            pinned = image.pinned_bytes == image.nbytes
            turns = self._buses.borrow() if self._buses is not None and pinned else []
            arrivals = self.arena.begin_copy_in(image, nbytes, turns)
        except BaseException:
            self.arena.unmap()
            raise
        return self._awaited(arrivals, left_s)

    def _copy_to_image(self, fd: int, nbytes: int) -> None:
        torch.cuda.set_device(self._gpu)
        self.arena.copy_out(self._image(fd, nbytes), nbytes)

    def _image(self, fd: int, nbytes: int) -> RegisteredImage:
        """The image of `fd`, pinned as it is used; kept for the next wake."""
        image = RegisteredImage.of(fd, nbytes, self._registered)
        if image is not self._registered and self._registered is not None:
            self._registered.close()
        self._registered = image
        return image

    def _export_image(self) -> None:
        try:
            super()._export_image()
        except BaseException:
            # The mapping would keep the memory of an image that nobody has.
            image, self._registered = self._registered, None
            if image is not None:
                image.close()
            raise
        assert self._lease is not None
        # The store lends what it was given, or an equal image that it had already. Pinned while it sleeps.
        self._image(self._lease.fd, end_of(self._layout))


def _front_bytes(config: ModelConfig) -> int:
    """Room for what comes late of every layer, and of what follows them. From nothing but the model's
    configuration: engines of one model must come to the same layout."""
    a_layer = QUANTISED_FRONT_BYTES_A_LAYER if config.quantization else FRONT_BYTES_A_LAYER
    return (int(config.num_hidden_layers) + 1) * a_layer


class _PlaceIn(TorchFunctionMode):  # type: ignore[misc]
    """Within this mode, larger tensors of `torch.empty` lie in an arena."""

    def __init__(self, arena: CudaArena) -> None:
        super().__init__()
        self._arena = arena

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and torch.device(kwargs.get("device") or "cuda").type == "cuda":
            shape, dtype = asked_for(args, kwargs)
            if math.prod(shape) * dtype.itemsize >= SMALL_TENSOR_BYTES:
                return self._arena.place(shape, dtype)
        return func(*args, **kwargs)


class _Unloaded:
    """A model whose `load_weights` does nothing: everything else is the model's."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def load_weights(self, weights: object) -> None:
        """There are none yet."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
