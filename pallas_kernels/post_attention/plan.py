"""How the kernel's CTAs share its work: integer arithmetic, the same on Python ints and in the kernel.

A phase's weight is a line of units of ``slice_len`` rows and 64 columns: column 0 from the first row to the last,
column 1, and so on. CTA c has the units from ``begin(c)`` to ``begin(c + 1)``. What a share has of one column is a
piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

COLUMNS = 64  # of a unit
TILE = 64  # columns of activations, rows of weights, that lie in shared memory as one tile
ITEM_ROWS = 8  # of an item, which has one column


def _div(a: Any, b: int) -> Any:
    return a // b if isinstance(a, int) else lax.div(a, jnp.int32(b))


@dataclass(frozen=True)
class Phase:
    """A product ``[rows, depth] x [depth, num_parts * num_columns * 64]``, depth being ``num_slices * slice_len``.

    Attributes:
        num_columns: of 64 outputs each.
        num_slices: units of a column.
        slice_len: rows of a unit.
        num_parts: weights side by side: 2 for gate and up, whose columns stand together in a unit.
        num_ctas: that share the line, at most as many as it has units.
    """

    num_columns: int
    num_slices: int
    slice_len: int
    num_parts: int
    num_ctas: int

    @property
    def num_units(self) -> int:
        return self.num_columns * self.num_slices

    @property
    def max_cta_pieces(self) -> int:
        """Columns that one share can touch."""
        return max(self.last_column(c) - self.first_column(c) + 1 for c in range(self.num_ctas))

    @property
    def max_column_pieces(self) -> int:
        return max(self.num_pieces(column) for column in range(self.num_columns))

    def begin(self, cta: Any) -> Any:
        return _div(cta * self.num_units, self.num_ctas)

    def cta_of(self, unit: Any) -> Any:
        return _div((unit + 1) * self.num_ctas - 1, self.num_units)

    def first_column(self, cta: Any) -> Any:
        return _div(self.begin(cta), self.num_slices)

    def last_column(self, cta: Any) -> Any:
        return _div(self.begin(cta + 1) + self.num_slices - 1, self.num_slices) - 1

    def num_pieces(self, column: Any) -> Any:
        return self.cta_of(column * self.num_slices + self.num_slices - 1) - self.cta_of(column * self.num_slices) + 1

    def num_items(self, rows: int) -> int:
        return self.num_columns * (rows // ITEM_ROWS)


@dataclass(frozen=True)
class Shape:
    """Of the op: rows, and the columns of its matrices (types.py has the letters)."""

    M: int
    A: int
    E: int
    F: int
    Q: int


def phases(shape: Shape, num_ctas: int) -> list[Phase]:
    """Output product, gate and up, down, and the next layer's qkv."""
    A, E, F, Q = shape.A, shape.E, shape.F, shape.Q
    # What a unit costs beside its bytes counts: two tiles where they fit.
    slice_len = TILE if any(size % (2 * TILE) for size in (A, E, F)) else 2 * TILE

    def phase(inputs: int, outputs: int, parts: int = 1) -> Phase:
        columns, slices = outputs // COLUMNS, inputs // slice_len
        return Phase(columns, slices, slice_len, parts, min(num_ctas, columns * slices))

    return [phase(A, E), phase(E, F, 2), phase(F, E), phase(E, Q)]


@dataclass(frozen=True)
class WordPlaces:
    """Where the words are that CTAs hand each other, in two lines of int32.

    Attributes:
        pieces: first word of each phase's pieces: float32 ``[num_ctas * max_cta_pieces, num_parts, M, 64]``.
        num_piece_words: of all.
        activations: first word of what the second, third and fourth product read: bfloat16 ``[M, depth]``.
        squares: first word of each norm's sums of squares: float32 ``[M, square_stride]``.
        square_stride: words of a row, of which the first ``E / 64`` are written.
        num_words: of activations and squares.
    """

    pieces: tuple[int, ...]
    num_piece_words: int
    activations: tuple[int, int, int]
    squares: tuple[int, int]
    square_stride: int
    num_words: int


def word_places(shape: Shape, num_ctas: int) -> WordPlaces:
    M, E, F = shape.M, shape.E, shape.F
    pieces = [0]
    for p in phases(shape, num_ctas):
        pieces.append(pieces[-1] + p.num_ctas * p.max_cta_pieces * p.num_parts * M * COLUMNS)
    stride = -(-E // COLUMNS // 4) * 4  # rows begin where 16 bytes do
    inner, following = M * E // 2, M * (E + F) // 2
    squares = following + M * E // 2
    return WordPlaces(
        tuple(pieces[:-1]),
        pieces[-1],
        (0, inner, following),
        (squares, squares + M * stride),
        stride,
        squares + 2 * M * stride,
    )
