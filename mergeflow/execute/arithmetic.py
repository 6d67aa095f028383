"""Rows to results, and a look at the values that must not pass unseen.

Nearly all means are made at once, tile by tile (`methods.means`). What is left goes in pieces that fit a core's cache:
what is no mean, and the tiles in which something is out of the ordinary. There the census of magnitudes pays twice:
it betrays NaN and infinity at their source, and it tells the exact sum how far it may go without rounding.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch

from mergeflow.errors import UnmergeableValues
from mergeflow.execute.block import torch_dtype
from mergeflow.interfaces import Rows, RowsDiffer
from mergeflow.methods.exact import INTEGER_VIEW
from mergeflow.methods.means import Means, alone, can_make
from mergeflow.methods.registry import method_of
from mergeflow.plan.tiles import PIECE
from mergeflow.recipe.request import COPY, UNIFORM
from mergeflow.tensors import Dtype
from mergeflow.text import shown, some

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    from torch import Tensor

    from mergeflow.errors import MergeflowError
    from mergeflow.execute.block import Block, Group, Row
    from mergeflow.interfaces import Method, SharedSums
    from mergeflow.plan.plan import Cell, Plan, Strip, Tile

WIDER = (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32))
"""What `dtype=` may say instead when a result does not fit."""
CENSUS_BYTES = 16 * PIECE
"""Of the rows whose magnitudes are looked at together; few enough that they stay in a core's own cache."""
MAGNITUDE = {dtype: torch.tensor(torch.iinfo(dtype).max, dtype=dtype) for dtype in INTEGER_VIEW.values()}
"""What clears the sign; as a tensor, which torch takes faster than a number."""


class Piece(NamedTuple):
    """A few thousand elements of a tile: where they are, for messages, and their rows."""

    strip: Strip
    start: int
    """The first element, counted in the tensor."""
    rows: Rows


class Arithmetic:
    """The merging of tiles for one thread, with the scratch that it needs."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._census = torch.empty(CENSUS_BYTES // 8, dtype=torch.int64)

    def merge(
        self,
        strip: Strip,
        tile: Tile,
        block: Block,
        rows: Sequence[Row],
        results: Sequence[Row],
        tolerated: Counter[tuple[int, str]],
        impossible: dict[int, MergeflowError] | None = None,
    ) -> None:
        """Make `results`, one row of `block` for each cell of `strip`, of the rows of `tile` in it.

        Values that are not finite and that the policy lets pass are counted in `tolerated` by (source, key). Cells in
        `impossible` are left alone; where jobs are `apart`, those join them that cannot be made, and nothing is raised.
        """
        impossible = {} if impossible is None else impossible
        made = _make_at_once(strip, tile, block, rows, results) if not impossible else set()
        if len(made) == len(strip.cells):
            return
        groups = list(block.groups(strip.dtypes, rows))
        outs = [block.row(cell.dtype, row) for cell, row in zip(strip.cells, results, strict=True)]
        methods = [method_of(cell.method, cell.steps) for cell in strip.cells]
        floats = any(not method.takes_any_dtype for method in methods)
        for start in range(0, tile.stop - tile.start, PIECE):
            part = slice(start, min(start + PIECE, tile.stop - tile.start))
            piece = Piece(strip, tile.start + start, self._rows(groups, part, floats))
            self._count(piece, tolerated, floats)
            parts = [out[part] for out in outs]
            for index, (cell, method, out) in enumerate(zip(strip.cells, methods, parts, strict=True)):
                if index in made or index in impossible:
                    continue
                try:
                    self._cell(piece, cell, method, out)
                except UnmergeableValues as error:
                    if not self._plan.apart:
                        raise
                    impossible[index] = error

    def _rows(self, groups: Sequence[Group], part: slice, floats: bool) -> Rows:
        matrices: list[Tensor] = []
        peaks: list[float] = []
        for group in groups:
            matrix = group.values[:, part]
            if group.dtype.is_fp8:
                matrix = matrix.to(torch.float16)
            matrices.append(matrix)
            if not floats or matrix.is_complex():
                peaks += [math.nan] * matrix.shape[0]
            elif group.dtype.is_float:
                peaks += self._peaks(matrix)
            else:
                peaks += matrix.double().abs().amax(1).tolist()
        return Rows(matrices, peaks)

    def _peaks(self, matrix: Tensor) -> list[float]:
        """The largest magnitude in each row, infinite or NaN where the row holds one.

        It is read off the bits without the sign, which are ordered as the magnitudes are, NaN above infinity.
        """
        bits = matrix.view(INTEGER_VIEW[matrix.element_size()])
        room = self._census.view(bits.dtype)
        mask = MAGNITUDE[bits.dtype]
        width = bits.shape[1]
        most = max(room.shape[0] // max(width, 1), 1)
        peaks: list[float] = []
        for first in range(0, bits.shape[0], most):
            some = bits[first : first + most]
            magnitudes = torch.bitwise_and(some, mask, out=room[: some.numel()].view(some.shape))
            peaks += magnitudes.amax(1).view(matrix.dtype).tolist()
        return peaks

    def _count(self, piece: Piece, tolerated: Counter[tuple[int, str]], floats: bool) -> None:
        """Count what is tolerated, row by row, so that a row that several targets use counts once."""
        if not floats or self._plan.nonfinite == "error":
            return
        for source, row, peak in zip(piece.strip.sources, piece.rows.values, piece.rows.peaks, strict=True):
            if row.is_floating_point() and not math.isfinite(peak):
                tolerated[source, piece.strip.key] += int((~row.isfinite()).sum())

    def _cell(self, piece: Piece, cell: Cell, method: Method, out: Tensor) -> None:
        """Merge one cell, and check what came of it."""
        rows = piece.rows.take(cell.rows)
        try:
            if method.takes_any_dtype:
                method.merge(rows, cell.shares, out)
                return
            finite = all(map(math.isfinite, rows.peaks))
            if not finite and self._plan.nonfinite == "error":
                self._not_finite(piece, cell)
            if finite or self._plan.nonfinite == "propagate":
                method.merge(rows, cell.shares, out)
            else:
                method.skip(rows, cell.shares, out)
        except RowsDiffer as error:
            self._differ(piece, cell, error)
        self._check_result(piece, cell, method, rows, finite, out)

    def _check_result(self, piece: Piece, cell: Cell, method: Method, rows: Rows, finite: bool, out: Tensor) -> None:
        """Only what came in may go out: anything else that is not finite has overflowed."""
        result = out.to(torch.float16) if out.dtype.itemsize == 1 else out  # fp8 has neither census nor isfinite
        if math.isfinite(self._peaks(result[None])[0]):
            return
        bad = ~result.isfinite()
        passed = (row.isfinite() for row in rows.values)
        if not finite and self._plan.nonfinite == "propagate":
            bad &= functools.reduce(torch.logical_and, passed)
            if out.dtype.itemsize > 1 and (cell.method != COPY or rows.values[0].dtype != out.dtype):
                # torch makes 0xffff of NaN where it converts many values to bf16 at once, and 0x7fc0 of the last few.
                out.masked_fill_(out.isnan(), math.nan)
        elif not finite:
            lost = bad & ~functools.reduce(torch.logical_or, passed)
            if bool(lost.any()):
                self._nothing_left(piece, lost)
        if bool(bad.any()):
            self._overflow(piece, cell, method, rows, out, bad)

    def _nothing_left(self, piece: Piece, lost: Tensor) -> NoReturn:
        at = piece.start + int(lost.nonzero()[0])
        raise UnmergeableValues(
            f"'{shown(piece.strip.key)}': no selected model has a finite value at element {at:,}, so there is nothing "
            "to average; leave the broken models out of the list, or choose nonfinite=propagate"
        )

    def _overflow(self, piece: Piece, cell: Cell, method: Method, rows: Rows, out: Tensor, bad: Tensor) -> NoReturn:
        exact = torch.empty(len(out), dtype=torch.float64)
        (method.skip if self._plan.nonfinite == "skip" else method.merge)(rows, cell.shares, exact)
        at = int(bad.nonzero()[0])
        value = float(exact[at])
        if cell.steps and not math.isfinite(value):
            self._overflow_within(piece, cell, rows, at)
        wider = _wider(value)
        remedy = f"choose dtype={' or dtype='.join(wider)}" if wider else "no dtype of an output holds it"
        raise UnmergeableValues(
            f"'{shown(piece.strip.key)}' overflows {cell.dtype.code}: the value of element {piece.start + at:,} is "
            f"{value:g}, and {cell.dtype.code} holds up to {torch.finfo(out.dtype).max:,g}; {remedy}"
        )

    def _overflow_within(self, piece: Piece, cell: Cell, rows: Rows, at: int) -> NoReturn:
        """What a tree has lost on the way to its top, no dtype of the output brings back."""
        exact = torch.empty(len(rows.values[0]), dtype=torch.float64)
        unrounded = tuple(step._replace(dtype=Dtype.F64) for step in cell.steps)
        method_of(cell.method, unrounded).merge(rows, cell.shares, exact)
        value = float(exact[at])
        most, code = min((torch.finfo(torch_dtype(step.dtype)).max, step.dtype.code) for step in cell.steps)
        wider = [] if _holds(torch_dtype(cell.dtype), value) else _wider(value)
        remedy = (
            f"choose method.arithmetic=float64, or method.save_half=false where the models are wider than {code}"
            + (f", and dtype={' or dtype='.join(wider)}" if wider else "")
        )
        raise UnmergeableValues(
            f"'{shown(piece.strip.key)}' overflows {code} within its tree: element {piece.start + at:,} would come to "
            f"{value:g}, but a merge on the way makes more of it than the {most:,g} that {code} holds; {remedy}"
        )

    def _not_finite(self, piece: Piece, cell: Cell) -> NoReturn:
        culprits = []
        for row in cell.rows:
            if not math.isfinite(piece.rows.peaks[row]):
                values = piece.rows.values[row]
                nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
                at = piece.start + int((~values.isfinite()).nonzero()[0])
                counts = " and ".join(f"{n:,} {what}" for n, what in ((nan, "NaN"), (infinite, "infinite")) if n)
                culprits.append(f"model {shown(self._model(piece, row))} has {counts} value(s) from element {at:,} on")
        skip = "" if cell.steps else "nonfinite=skip (mean of the finite values) or "
        raise UnmergeableValues(
            f"'{shown(piece.strip.key)}': {some(culprits)} (first ones found); leave the model out of the list, or "
            f"choose {skip}nonfinite=propagate"
        )

    def _differ(self, piece: Piece, cell: Cell, error: RowsDiffer) -> NoReturn:
        where = f"element {piece.start + error.element:,}"
        model, first = self._model(piece, cell.rows[error.row]), self._model(piece, cell.rows[0])
        if error.row == 0:
            raise UnmergeableValues(
                f"'{shown(piece.strip.key)}' is not a tensor to average but one to copy, and {where} of model {model} "
                f"is {_shown(error.value)}, which {cell.dtype.code} does not hold; leave the model out of the list"
            ) from error
        raise UnmergeableValues(
            f"'{shown(piece.strip.key)}' is not a tensor to average, and the models disagree: {where} is "
            f"{_shown(error.value)} in model {model}, but {_shown(error.expected)} in model {first}; leave one of them "
            "out of the list, or choose keys.integers=first to take those of the first model"
        ) from error

    def _model(self, piece: Piece, row: int) -> str:
        return self._plan.checkpoints[piece.strip.sources[row]].id


def _make_at_once(
    strip: Strip, tile: Tile, block: Block, rows: Sequence[Row], results: Sequence[Row]
) -> AbstractSet[int]:
    """Make the means of a tile that are certain, and tell which they are: all that there are, or none."""
    cells = tuple([(cell.method, cell.dtype, cell.rows, cell.shares) for cell in strip.cells])
    means = _means_of(strip.dtypes, cells, strip.sums)
    if means is None:
        return frozenset()
    at = block.address
    done = means.make([at + row.begin for row in rows], [at + row.begin for row in results], tile.stop - tile.start)
    return frozenset(means.cells) if done else frozenset()


@functools.lru_cache(maxsize=64)  # most tensors of a checkpoint are made alike
def _means_of(
    dtypes: tuple[Dtype, ...],
    cells: tuple[tuple[str, Dtype, tuple[int, ...], tuple[int, ...]], ...],
    sums: tuple[SharedSums, ...],
) -> Means | None:
    """Those of the cells that can be made at once: the sums that they share, and others of which each is alone.

    A cell is its method, its dtype, its rows and their shares.
    """
    kinds, outs = [torch_dtype(dtype) for dtype in dtypes], [torch_dtype(dtype) for _, dtype, _, _ in cells]
    able = {
        index
        for index, (method, _, rows, shares) in enumerate(cells)
        if method == UNIFORM and can_make(shares, {kinds[row] for row in rows}, outs[index])
    }
    shared = [family for family in sums if able.issuperset(family.cells)]
    rest = able.difference(*(family.cells for family in shared))
    families = shared + [alone(index, cells[index][2], cells[index][3]) for index in sorted(rest)]
    return Means(families, kinds, outs) if families else None


def _wider(value: float) -> list[str]:
    return [name for name, dtype in WIDER if _holds(dtype, value)]


def _holds(dtype: torch.dtype, value: float) -> bool:
    return math.isfinite(torch.tensor(value, dtype=torch.float64).to(dtype).item())


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.9g}"
