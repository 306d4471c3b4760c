"""Passes that wait, layer by layer, for weights that are on their way."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from prism.gpu_worker.engine.arrivals import Arrivals
from prism.gpu_worker.engine.layer_gate import LayerGate, layer_needs, layers_of

LEAD_S = 0.15


def batch(*, extends: bool, in_graph: bool) -> SimpleNamespace:
    """A pass whose mode says so."""
    mode = SimpleNamespace(is_extend=lambda: extends, is_cuda_graph=lambda: in_graph)
    return SimpleNamespace(forward_mode=mode)


PREFILL = batch(extends=True, in_graph=False)
DECODE = batch(extends=False, in_graph=True)
# Drafted tokens that are verified, for one.
PREFILL_IN_GRAPH = batch(extends=True, in_graph=True)


class ParallelLMHead(nn.Module):  # type: ignore[misc]
    """SGLang's by name: its weight is used without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class Part(nn.Module):  # type: ignore[misc]
    """Has one weight, and notes that it ran."""

    def __init__(self, name: str, notes: list[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self._name = name
        self._notes = notes

    def forward(self) -> None:
        self._notes.append(self._name)


class Layer(Part):
    """Has a part with a weight of its own."""

    def __init__(self, name: str, notes: list[str]) -> None:
        super().__init__(name, notes)
        self.inner = Part(f"{name} inner", notes)

    def forward(self) -> None:
        super().forward()
        self.inner()


class Model(nn.Module):  # type: ignore[misc]
    """An embedding, three layers that run in `order`, a norm, an output head."""

    def __init__(self, notes: list[str], order: Sequence[int] = (0, 1, 2)) -> None:
        super().__init__()
        self.embedding = Part("embedding", notes)
        self.layers = nn.ModuleList(Layer(f"layer {index}", notes) for index in range(3))
        self.norm = Part("norm", notes)
        self.head = ParallelLMHead()
        self._order = order
        self._notes = notes

    def forward(self) -> None:
        self.embedding()
        for index in self._order:
            self.layers[index]()
        self.norm()


class Runner:
    """SGLang's ModelRunner, as far as passes go: a step in a CUDA graph calls no module."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def forward(self, forward_batch: Any, factor: int = 1) -> int:
        if not forward_batch.forward_mode.is_cuda_graph():
            self.model()
        else:
            self.model._notes.append("step")
        return 7 * factor


def end_of(module: nn.Module, parts: bool) -> int:
    """Each weight is a byte, in the order of construction."""
    weights = [id(weight) for weight in models[-1].parameters()]
    return max((1 + weights.index(id(weight)) for weight in module.parameters(recurse=parts)), default=0)


models: list[nn.Module] = []


class Noting:
    """The piece that brings byte number `index`."""

    def __init__(self, index: int, notes: list[str]) -> None:
        self._index = index
        self._notes = notes

    def hold_back(self) -> None:
        self._notes.append(f"until {self._index}")

    def wait(self) -> None:
        pass


def on_their_way(notes: list[str]) -> Arrivals:
    """Nine weights: the embedding, two a layer, norm and output head."""
    return Arrivals([(index, Noting(index, notes)) for index in range(1, 10)], 0.0, lambda: None)


def runner_of(notes: list[str], order: Sequence[int] = (0, 1, 2)) -> Runner:
    model = Model(notes, order)
    models[:] = [model]
    return Runner(model)


def test_each_layer_waits_for_its_own_and_the_last_for_all() -> None:
    notes: list[str] = []
    runner = runner_of(notes)
    gate = LayerGate(runner, end_of, LEAD_S)
    assert gate.lead_s == 0
    assert runner.forward(PREFILL, factor=2) == 14
    assert gate.lead_s == LEAD_S
    notes.clear()
    gate.close(on_their_way(notes))
    assert runner.forward(PREFILL) == 7
    assert notes == [
        *("until 1", "embedding"),
        *("until 3", "layer 0", "layer 0 inner"),
        *("until 5", "layer 1", "layer 1 inner"),
        *("until 9", "layer 2", "layer 2 inner", "norm"),
    ]


@pytest.mark.parametrize("step", [DECODE, PREFILL_IN_GRAPH])
def test_a_step_waits_for_all(step: SimpleNamespace) -> None:
    notes: list[str] = []
    runner = runner_of(notes)
    gate = LayerGate(runner, end_of, LEAD_S)
    runner.forward(PREFILL)
    notes.clear()
    gate.close(on_their_way(notes))
    runner.forward(step)
    assert notes == ["until 9", "step"]


def test_nobody_waits_once_all_are_there() -> None:
    notes: list[str] = []
    runner = runner_of(notes)
    gate = LayerGate(runner, end_of, LEAD_S)
    runner.forward(PREFILL)
    undisturbed = list(notes)
    notes.clear()
    arrivals = on_their_way(notes)
    gate.close(arrivals)
    assert gate.closed
    arrivals.wait()
    runner.forward(PREFILL)
    assert notes == undisturbed
    assert not gate.closed


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 1), (0, 0, 1, 2), ()])
def test_a_model_whose_layers_run_otherwise_gets_no_requests_before_all_are_there(
    order: tuple[int, ...],
) -> None:
    runner = runner_of([], order)
    gate = LayerGate(runner, end_of, LEAD_S)
    runner.forward(PREFILL)
    assert gate.lead_s == 0


def test_a_model_that_has_only_decoded_is_not_known() -> None:
    runner = runner_of([])
    gate = LayerGate(runner, end_of, LEAD_S)
    runner.forward(DECODE)
    assert gate.lead_s == 0
    runner.forward(PREFILL)
    assert gate.lead_s == LEAD_S


def test_what_is_not_called_is_needed_first_unless_it_makes_the_logits() -> None:
    model = Model([])
    models[:] = [model]
    layers = list(model.layers)
    needs = layer_needs(model, [*layers], end_of)
    assert needs is not None
    # Neither the embedding nor the norm were seen: both come first then. The output head's weight is byte 9.
    assert needs.before == 8
    needs = layer_needs(model, [model.embedding, *layers, model.norm], end_of)
    assert needs is not None
    assert needs.before == 1
    assert [end for _, end in needs.layers] == [3, 5, 7]


def test_lists_inside_of_layers_are_parts_of_them() -> None:
    experts = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    layer = nn.Sequential(nn.Linear(1, 1))
    layer.add_module("experts", experts)
    last = nn.Linear(1, 1)
    language = nn.Module()
    language.add_module("layers", nn.ModuleList([layer, last]))
    model = nn.Module()
    model.add_module("language", language)
    assert layers_of(model) == [layer, last]
    assert layer_needs(model, [], lambda *_: 0) is None
