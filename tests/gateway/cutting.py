"""Cutting a sequence into pieces in any way, for property tests."""

from collections.abc import Sequence
from typing import TypeVar

from hypothesis import strategies as st

T = TypeVar("T")


def cuts(length: int = 30) -> st.SearchStrategy[list[int]]:
    """Sizes of pieces, 0 included."""
    return st.lists(st.integers(0, 5), max_size=length)


def cut(sequence: Sequence[T], sizes: Sequence[int]) -> list[Sequence[T]]:
    """`sequence` in pieces of these sizes, the rest in one."""
    pieces, at = [], 0
    for size in sizes:
        pieces.append(sequence[at : at + size])
        at += size
    return [*pieces, sequence[at:]]


def cut_text(text: str, sizes: Sequence[int]) -> list[str]:
    """`text` in pieces of these sizes, the rest in one."""
    return ["".join(piece) for piece in cut(text, sizes)]
