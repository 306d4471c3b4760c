"""torch's own kernels that every model needs, loaded before there is a model.

CUDA loads a kernel's code when it is first launched, 10 to 70 ms each. Only kernels whose choice doesn't hang
on a model's shapes: those of matrix products do.
"""

import torch


def load_common_kernels(device: str = "cuda") -> None:
    """Launch each once on tensors of a few elements, and wait for them where that takes a wait."""
    for launch in (_constructing, _preparing_a_batch, _first_and_last_layer):
        launch(device)
    if device == "cuda":
        torch.cuda.synchronize()


def _constructing(device: str) -> None:
    """Rotary tables."""
    exponents = torch.arange(0, 64, 2, dtype=torch.int64, device=device).to(torch.float32) / 64
    frequencies = 1.0 / (10_000.0**exponents)
    angles = torch.einsum("i,j -> ij", torch.arange(8, dtype=torch.float32, device=device), frequencies)
    torch.cat((angles.cos(), angles.sin()), dim=-1)


def _preparing_a_batch(device: str) -> None:
    """Lengths, offsets and the buffers of a step."""
    lengths = torch.ones(2, dtype=torch.int32, device=device)
    for dtype in (torch.int32, torch.int64):
        counts = lengths.to(dtype)
        offsets = torch.zeros(3, dtype=torch.int32, device=device)
        offsets[1:] = torch.cumsum(counts, dim=0)
        torch._foreach_copy_([torch.zeros_like(counts), torch.zeros_like(counts)], [counts, counts])


def _first_and_last_layer(device: str) -> None:
    """Embedding, the rows that get a next token, and which one that is."""
    weights = torch.zeros(64, 64, dtype=torch.bfloat16, device=device)
    hidden = torch.nn.functional.embedding(torch.zeros(4, dtype=torch.int64, device=device), weights)
    last = hidden[torch.cumsum(torch.ones(2, dtype=torch.int64, device=device), dim=0) - 1]
    torch.argmax(last.to(torch.float32), dim=-1)
    torch.argmax(last, dim=-1)
