"""A model that computes while its last weights are still being copied: each layer waits for its own.

A prefill launches its kernels layer by layer, which takes as long as copying some gigabytes. Where a model's
layers were seen to run one after the other, in the order of a list, a prefill may begin before the
last of them is in memory. Nothing is assumed of a model that was not seen in a prefill of its own.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from prism.gpu_worker.engine.arrivals import Arrivals

EndOf = Callable[[nn.Module, bool], int]
"""How many bytes of the weights, from the first on, hold all tensors of a module, those of its parts included
or not; 0 without any."""


@dataclass(frozen=True)
class LayerNeeds:
    """How many bytes of the weights, from the first on, must be there: before the first layer, and for each
    layer. The last one waits for all, what follows it included."""

    before: int
    layers: list[tuple[nn.Module, int]]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules, in their order."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for part in module.children():
            if isinstance(part, nn.ModuleList):
                found.extend(part)
            else:
                look(part)

    look(model)
    return found


def layer_needs(model: nn.Module, ran: Sequence[nn.Module], end_of: EndOf) -> LayerNeeds | None:
    """What the layers of `model` need, given the modules that `ran` in a prefill, in their order. None when
    its layers did not run one after the other, each once.

    What is outside of the layers is needed before the first, but for what ran after the last, and for the
    output head, which makes logits of what the last layer says.
    """
    layers = layers_of(model)
    order = {id(layer): index for index, layer in enumerate(layers)}
    if not layers or [order[id(module)] for module in ran if id(module) in order] != list(range(len(layers))):
        return None
    last = max(index for index, module in enumerate(ran) if id(module) == id(layers[-1]))
    after = {id(module) for module in ran[last:]} - {id(module) for module in ran[:last]}
    inside = {id(part) for layer in layers for part in layer.modules()}
    early = [
        module
        for module in model.modules()
        if id(module) not in inside and id(module) not in after and not _is_output_head(module)
    ]
    before = max((end_of(module, False) for module in early), default=0)
    return LayerNeeds(before, [(layer, end_of(layer, True)) for layer in layers])


def _is_output_head(module: nn.Module) -> bool:
    # SGLang's logits processor takes its weight without calling it.
    return type(module).__name__ == "ParallelLMHead"


class LayerGate:
    """In front of the forward passes of `runner`, SGLang's ModelRunner, whose model may be given requests
    `lead_s` seconds before its last weights are there."""

    def __init__(self, runner: Any, end_of: EndOf, lead_s: float) -> None:
        self._lead_s = lead_s
        self._model: nn.Module = runner.model
        self._end_of = end_of
        self._needs: LayerNeeds | None = None
        self._watched = False
        self._arrivals: Arrivals | None = None
        self._hooks: list[Any] = []
        self._forward = runner.forward
        runner.forward = self._pass

    @property
    def lead_s(self) -> float:
        """How long before the last weights are there requests may come: 0 where the layers' order is not
        known."""
        return self._lead_s if self._needs is not None else 0.0

    @property
    def closed(self) -> bool:
        """Whether weights were on their way when this was last asked, or a pass began."""
        if self._arrivals is not None and self._arrivals.all_here:
            self.open()
        return self._arrivals is not None

    def close(self, arrivals: Arrivals) -> None:
        """Have every pass wait for what it needs of `arrivals`."""
        assert self._needs is not None
        self._arrivals = arrivals
        last = len(self._needs.layers) - 1
        for index, (layer, end) in enumerate(self._needs.layers):
            needed = arrivals.nbytes if index == last else end
            hold_back = functools.partial(_hold_back, arrivals, needed)
            self._hooks.append(layer.register_forward_pre_hook(hold_back))

    def open(self) -> None:
        """Let passes through: all weights are there."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._arrivals = None

    def _pass(self, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        mode = forward_batch.forward_mode
        # Of the modes that extend a sequence some replay a graph.
        prefill = bool(mode.is_extend() and not mode.is_cuda_graph())
        if self.closed:
            assert self._arrivals is not None
            assert self._needs is not None
            # A step in a CUDA graph has no layers to wait in.
            self._arrivals.hold_back(self._needs.before if prefill else self._arrivals.nbytes)
        elif prefill and not self._watched:
            self._watched = True
            with _watching(self._model) as ran:
                output = self._forward(forward_batch, *args, **kwargs)
            self._needs = layer_needs(self._model, ran, self._end_of)
            return output
        return self._forward(forward_batch, *args, **kwargs)


def _hold_back(arrivals: Arrivals, nbytes: int, module: nn.Module, inputs: Any) -> None:
    arrivals.hold_back(nbytes)


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Gives the modules of `model` that are called within this, in their order."""
    ran: list[nn.Module] = []

    def note(module: nn.Module, inputs: Any) -> None:
        ran.append(module)

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()
