"""Launches the Triton kernels of the contrastive core."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton.language as tl

from sslkernels.ops.infonce import contrast_reference as reference
from sslkernels.ops.infonce.contrast_triton import (
    _contrast_bwd_kernel,
    _contrast_fwd_finish_kernel,
    _contrast_fwd_kernel,
    _contrast_pack_kernel,
    _sigmoid_contrast_fwd_kernel,
)
from sslkernels.ops.infonce.contrast_weights_triton import _contrast_bwd_weights_kernel
from sslkernels.ops.infonce.kernels import CONFIGS, PAIRS, ROW_DEPTH, Config, Tiles, cdiv, config_of, power_of_2

# as for nt_xent, but for tiles that leave no registers for the vectors and masks there are besides. On gfx942 scalar
# registers hold the masks: what a loop fetches ahead must not need them too. In fp32 all have one depth: the backward
# must add products in the order of the forward, or a row's softmax no longer sums to 1
_FP32 = Tiles(64, 64, 16, num_warps=8, num_stages=2, grad_width=128)
_FP32_WIDE = Tiles(64, 32, 16, num_warps=8, num_stages=2, grad_width=256)
CONTRAST_CONFIGS = {
    "sm_80": {
        2: CONFIGS["sm_80"][2],
        4: replace(
            CONFIGS["sm_80"][4],
            backward=Tiles(32, 64, 16, num_warps=8, num_stages=2, grad_width=128),
            backward_wide=_FP32_WIDE,
        ),
    },
    "sm_90": {
        2: replace(CONFIGS["sm_90"][2], backward_wide=Tiles(64, 32, 64, num_warps=8, num_stages=2, grad_width=512)),
        4: replace(CONFIGS["sm_90"][4], backward=_FP32, backward_wide=_FP32_WIDE),
    },
    "sm_100": {
        2: replace(CONFIGS["sm_100"][2], backward=Tiles(64, 64, 128, num_warps=8, num_stages=2, grad_width=128)),
        4: replace(CONFIGS["sm_100"][4], backward=_FP32, backward_wide=_FP32_WIDE),
    },
    "gfx942": {
        2: replace(
            CONFIGS["gfx942"][2],
            rows=Tiles(128, 64, 128, num_warps=8, num_stages=1),
            backward=Tiles(128, 64, 64, num_warps=8, num_stages=1, grad_width=128),
            backward_wide=Tiles(32, 32, 64, num_warps=8, num_stages=1, grad_width=512),
        ),
        4: replace(
            CONFIGS["gfx942"][4],
            rows=Tiles(64, 64, 16, num_warps=8, num_stages=1),
            backward=Tiles(64, 32, 16, num_warps=8, num_stages=1, grad_width=128),
            backward_wide=_FP32_WIDE,
        ),
    },
}
# what operands may be rounded to, by the operators' argument matmul
TILE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ALIGNMENT = 16  # elements to which packed rows are padded
WEIGHTS = 512  # of which each program of the backward's first kernel makes


@dataclass(frozen=True)
class _Operand:
    """Rows as the tile kernels read them: z = data * factor."""

    data: torch.Tensor  # (N, D), or (N, width) padded with zeros
    factor: torch.Tensor  # (N,), or more where they are ones
    ones: bool = False

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    def factor_peak(self) -> torch.Tensor:
        """A pointer to the largest factor."""
        return self.factor if self.ones else self.factor.amax()


@dataclass(frozen=True)
class _Pairs:
    """The two sides of every tile: x gives its rows and y its columns; and which pairs stand apart."""

    x: _Operand
    y: _Operand
    x_ids: torch.Tensor | None
    y_ids: torch.Tensor | None
    skip: torch.Tensor | None  # (queries, S) int32, S > 0
    dim: int
    dtype: torch.dtype  # of the tiles
    swapped: bool = False  # the queries are y

    def swap(self) -> _Pairs:
        return _Pairs(self.y, self.x, self.y_ids, self.x_ids, self.skip, self.dim, self.dtype, not self.swapped)

    def arguments(self) -> dict:
        """Of every tile kernel. Pointers that are not read stand where there is nothing to point to."""
        has_ids, none = self.x_ids is not None, self.x.data
        return {
            "x_ptr": self.x.data,
            "x_factor_ptr": self.x.factor,
            "y_ptr": self.y.data,
            "y_factor_ptr": self.y.factor,
            "skip_ptr": none if self.skip is None else self.skip,
            "x_ids_ptr": self.x_ids if has_ids else none,
            "y_ids_ptr": self.y_ids if has_ids else none,
            "N": self.x.rows,
            "M": self.y.rows,
            "stride_xn": self.x.data.stride(0),
            "stride_yn": self.y.data.stride(0),
            "SKIPS": 0 if self.skip is None else self.skip.shape[1],
            "HAS_IDS": has_ids,
            "TILE": TILE[self.dtype],
            "WIDTH": min(self.x.data.shape[1], self.y.data.shape[1]),
        }


@dataclass(frozen=True)
class _Schedule:
    """Who works on what: programs in three dimensions, blocks of rows, splits of the columns, slices of the width."""

    grid: tuple[int, int, int]
    arguments: dict

    @property
    def splits(self) -> int:
        return self.grid[1]


def _schedule(pairs: _Pairs, tiles: Tiles, programs: int, *, sliced: bool) -> _Schedule:
    """Split the columns until there are about so many programs; a partial result has one of its tiles in each."""
    narrow = max(16, power_of_2(pairs.dim))
    width = min(tiles.grad_width, narrow)
    slices = cdiv(pairs.dim, width) if sliced else 1
    blocks, steps = cdiv(pairs.x.rows, tiles.rows), cdiv(pairs.y.rows, tiles.columns)
    steps_each = cdiv(steps, min(steps, max(1, programs // (blocks * slices))))
    arguments = {
        "chunk": steps_each * tiles.columns,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "DEPTH": min(tiles.depth, narrow),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    if sliced:
        arguments["GRAD_WIDTH"] = width
    return _Schedule((blocks, cdiv(steps, steps_each), slices), arguments)


def _operand(x: torch.Tensor, dtype: torch.dtype, normalize: bool, ones: torch.Tensor | None, length: int) -> _Operand:
    """``x`` where it lies if it has the tiles' dtype or widens to it, otherwise a copy in the tiles' dtype.

    So a queue is never copied, but for one that is rounded to 16 bits, which takes as many bytes as its rounded rows,
    and for one in fp16: lengths of its rows may differ by more than an fp16 tile of weights can follow. ``ones``: of so
    many that both sides may have them, where the other side has them.
    """
    rows, dim = x.shape
    exact = torch.promote_types(x.dtype, dtype) == dtype and not (normalize and dtype == torch.float16)
    in_place = exact and (x.stride(1) == 1 or dim == 1)
    if in_place and not normalize:
        factor = torch.ones(length, dtype=torch.float32, device=x.device) if ones is None else ones
        return _Operand(x, factor, ones=True)
    factor = x.new_empty(rows, dtype=torch.float32)
    width = dim if in_place else cdiv(dim, ALIGNMENT) * ALIGNMENT
    data = x if in_place else x.new_empty((rows, width), dtype=dtype)

    def grid(meta):
        return (cdiv(meta["N"], meta["ROWS"]),)

    _contrast_pack_kernel[grid](
        x_ptr=x, packed_ptr=data, factor_ptr=factor, N=rows, stride_xn=x.stride(0), stride_xd=x.stride(1),
        PACK=not in_place, NORMALIZE=normalize, D=dim, WIDTH=width, ROWS=PAIRS,
        DEPTH=min(ROW_DEPTH, max(16, power_of_2(dim))),
    )  # fmt: skip
    return _Operand(data, factor)


def _pairs(query, key, skip, query_ids, key_ids, matmul: int, normalize_key: bool = False, peaks=False) -> _Pairs:
    dtype = TILE_DTYPES[matmul]
    length = max(len(query), 0 if key is None else len(key))
    x = y = _operand(query, dtype, False, None, length)
    if key is not None or normalize_key:
        y = _operand(query if key is None else key, dtype, normalize_key, x.factor if x.ones else None, length)
    skip = None if skip is None or not skip.shape[1] else _skip(skip, y.rows, peaks)
    if key is None:
        own = torch.arange(len(query), dtype=torch.int32, device=query.device)[:, None]
        skip = own if skip is None else torch.cat([skip, own], dim=1)
    x_ids, y_ids = (None, None) if query_ids is None else (query_ids.contiguous(), key_ids.contiguous())
    return _Pairs(x, y, x_ids, y_ids, skip, query.shape[1], dtype)


def _skip(skip: torch.Tensor, columns: int, peaks: bool) -> torch.Tensor:
    """In 32 bits. Of columns that do not exist no kernel asks more than that they are none of those that do.

    With ``peaks``, where the logit of the first one is wanted, they are -1: a tile's padding has columns too.
    """
    if peaks:
        return torch.where(skip < columns, skip, -1).clamp_min(-1).to(torch.int32)
    return skip.clamp(-1, columns).to(torch.int32).contiguous()


def _on_definition(query, key) -> bool:
    """Whether there is nothing to do, or fp64 to do it in."""
    sides = (query,) if key is None else (query, key)
    return any(side.numel() == 0 or side.dtype == torch.float64 for side in sides)


def _config(pairs: _Pairs) -> Config:
    return config_of(pairs.dtype.itemsize, CONTRAST_CONFIGS)


def _gradient_tiles(config: Config, dim: int) -> Tiles:
    return config.backward if dim <= config.backward.grad_width else config.backward_wide


def contrast_fwd(
    query, key, scale, skip, query_ids, key_ids, normalize_key, unit, bounded, columns, attract, peaks, matmul
):
    """``sslkernels::contrast_fwd`` on a GPU."""
    if _on_definition(query, key):
        return reference.contrast_fwd(
            query, key, scale, skip, query_ids, key_ids, normalize_key, unit, bounded, columns, attract, peaks, matmul
        )
    with torch.cuda.device_of(query):
        pairs = _pairs(query, key, skip, query_ids, key_ids, matmul, normalize_key, peaks)
        online = peaks or not bounded
        lse_rows, peak_rows, skipped, attraction = _softmax(pairs, scale, online, attract, peaks)
        if columns:
            lse_columns, peak_columns, _, _ = _softmax(pairs.swap(), scale, online, False, peaks)
        else:
            lse_columns, peak_columns = query.new_empty(0, dtype=torch.float64), query.new_empty(0)
    if peaks and (skip is None or not skip.shape[1]):  # a row's own column is not one that was named
        skipped.fill_(-torch.inf)
    return lse_rows, lse_columns, peak_rows, peak_columns, skipped, attraction


def _softmax(pairs: _Pairs, scale, online: bool, attract: bool, peaks: bool):
    """Of the rows of x: log-sum-exp in fp64, largest logit, logit of the first skipped column, and attraction."""
    config = _config(pairs)
    tiles = _gradient_tiles(config, pairs.dim) if attract else config.rows
    schedule = _schedule(pairs, tiles, config.programs, sliced=attract)
    rows = pairs.x.rows
    stats = scale.new_empty((schedule.splits, 3, rows))
    lse = scale.new_empty(rows, dtype=torch.float64)
    peak_logit, skipped_logit = scale.new_empty(rows), scale.new_empty(rows)
    attraction = scale.new_empty((rows, pairs.dim) if attract else (0, 0))
    partial, factor_peak = stats, stats  # not read
    if attract:
        partial, factor_peak = scale.new_empty((schedule.splits, rows, pairs.dim)), pairs.y.factor_peak()
    _contrast_fwd_kernel[schedule.grid](
        **pairs.arguments(), factor_peak_ptr=factor_peak, scale_ptr=scale, stats_ptr=stats,
        attraction_ptr=partial, BOUNDED=not online, ATTRACT=attract, SWAPPED=pairs.swapped,
        D=pairs.dim, **{"GRAD_WIDTH": 1} | schedule.arguments,
    )  # fmt: skip
    _contrast_fwd_finish_kernel[(cdiv(rows, PAIRS),)](
        stats_ptr=stats, partial_ptr=partial, factor_peak_ptr=factor_peak, scale_ptr=scale, lse_ptr=lse,
        peak_logit_ptr=peak_logit, skipped_logit_ptr=skipped_logit, attraction_ptr=attraction, N=rows,
        splits=schedule.splits, ATTRACT=attract, D=pairs.dim,
        ROWS=PAIRS, DEPTH=ROW_DEPTH,
    )  # fmt: skip
    if not peaks:
        peak_logit, skipped_logit = scale.new_empty(0), scale.new_empty(0)
    return lse, peak_logit, skipped_logit, attraction


def contrast_bwd(
    grad_rows, grad_columns, lse_rows, lse_columns, query, key, scale, skip, query_ids, key_ids, unit, bounded, matmul
):
    """``sslkernels::contrast_bwd`` on a GPU: every program owns rows of a gradient, so there are no atomics."""
    if _on_definition(query, key):
        return reference.contrast_bwd(
            grad_rows, grad_columns, lse_rows, lse_columns, query, key, scale, skip, query_ids, key_ids,
            unit, bounded, matmul,
        )  # fmt: skip
    with torch.cuda.device_of(query):
        pairs = _pairs(query, key, skip, query_ids, key_ids, matmul)
        # a pair takes part in both orders or in none: one pass forms what both rows owe it
        one_pass = key is None and skip is None and query_ids is None and grad_columns is None
        weights = _weights(pairs, grad_rows, lse_rows, grad_columns, lse_columns, scale, bounded, one_pass)
        softmax = {"bias": scale, "sigmoid": False, "bounded": bounded}
        grad_query, along, _ = _gradient(pairs, weights, scale, **softmax)
        if one_pass:
            return grad_query, query.new_empty(0, 0), along / 2
        grad_key, _, _ = _gradient(pairs.swap(), weights.swap(), scale, **softmax)
        if key is None:
            grad_query, grad_key = grad_query + grad_key, query.new_empty(0, 0)
    return grad_query, grad_key, along


@dataclass(frozen=True)
class _Weights:
    """What the softmax along each side is worth, weight * exp(|scale| (similarity - base)) in units of peak."""

    row: torch.Tensor  # (rows of x, 2): weight and base
    column: torch.Tensor  # (rows of y, 2)
    peak: torch.Tensor  # ()

    def swap(self) -> _Weights:
        return _Weights(self.column, self.row, self.peak)


def _weights(pairs: _Pairs, grad_rows, lse_rows, grad_columns, lse_columns, scale, bounded: bool,
             one_pass: bool = False) -> _Weights:  # fmt: skip
    """``lse_rows`` None: those of the sigmoid loss. ``one_pass``: what rows owe stands for both sides."""
    rows, columns = pairs.x.rows, pairs.y.rows
    row, peak = scale.new_empty((rows, 2)), scale.new_empty((), dtype=torch.float64)
    column = row if one_pass else scale.new_empty((columns, 2))
    sigmoid, has_columns = lse_rows is None, grad_columns is not None
    grid = (cdiv(rows if one_pass else max(rows, columns), WEIGHTS), 1 if one_pass else 2)
    _contrast_bwd_weights_kernel[grid](
        grad_rows_ptr=grad_rows, lse_rows_ptr=grad_rows if sigmoid else lse_rows.contiguous(),
        grad_columns_ptr=grad_columns if has_columns else grad_rows,
        lse_columns_ptr=lse_columns.contiguous() if has_columns else grad_rows, scale_ptr=scale, row_weights_ptr=row,
        column_weights_ptr=column, peak_ptr=peak, N=rows, M=columns, stride_rows=grad_rows.stride(0),
        stride_columns=grad_columns.stride(0) if has_columns else 1, HAS_COLUMNS=has_columns, SIGMOID=sigmoid,
        BOUNDED=bounded, ROWS=WEIGHTS,
    )  # fmt: skip
    return _Weights(row, column, peak)


def _gradient(pairs: _Pairs, weights: _Weights, scale, *, bias, sigmoid: bool, bounded: bool):
    """Of the rows of x; and unless the roles are swapped, of scale and bias."""
    config = _config(pairs)
    tiles = _gradient_tiles(config, pairs.dim)
    schedule = _schedule(pairs, tiles, config.programs, sliced=True)
    partial = scale.new_empty((schedule.splits, pairs.x.rows, pairs.dim))
    sums = scale.new_empty((1 + sigmoid, schedule.splits, pairs.x.rows))
    _contrast_bwd_kernel[schedule.grid](
        **pairs.arguments(), row_weights_ptr=weights.row, column_weights_ptr=weights.column,
        factor_peak_ptr=pairs.y.factor_peak(), weight_peak_ptr=weights.peak, scale_ptr=scale, bias_ptr=bias,
        grad_ptr=partial, sums_ptr=sums, SIGMOID=sigmoid, BOUNDED=bounded, SWAPPED=pairs.swapped, D=pairs.dim,
        **schedule.arguments,
    )  # fmt: skip
    grad = partial[0] if schedule.splits == 1 else partial.sum(dim=0)
    if pairs.swapped:
        return grad, None, None
    # in fp64: what the softmax owes the scale nearly cancels what the positives do
    along, total = sums[0].sum(dtype=torch.float64), sums[1].sum(dtype=torch.float64) if sigmoid else None
    return grad, along.to(scale.dtype), total if total is None else total.to(scale.dtype)


def sigmoid_contrast_fwd(query, key, scale, bias, positive, query_ids, key_ids, matmul):
    """``sslkernels::sigmoid_contrast_fwd`` on a GPU."""
    if _on_definition(query, key):
        return reference.sigmoid_contrast_fwd(query, key, scale, bias, positive, query_ids, key_ids, matmul)
    with torch.cuda.device_of(query):
        pairs = _pairs(query, key, positive, query_ids, key_ids, matmul)
        config = _config(pairs)
        schedule = _schedule(pairs, config.rows, config.programs, sliced=False)
        loss = scale.new_empty((schedule.splits, len(query)), dtype=torch.float64)
        _sigmoid_contrast_fwd_kernel[schedule.grid](
            **pairs.arguments(), scale_ptr=scale, bias_ptr=bias, loss_ptr=loss, **schedule.arguments
        )
        return loss.sum(dim=0)


def sigmoid_contrast_bwd(grad_rows, query, key, scale, bias, positive, query_ids, key_ids, matmul):
    """``sslkernels::sigmoid_contrast_bwd`` on a GPU: as `contrast_bwd`, with weights for the rows alone."""
    if _on_definition(query, key):
        return reference.sigmoid_contrast_bwd(grad_rows, query, key, scale, bias, positive, query_ids, key_ids, matmul)
    with torch.cuda.device_of(query):
        pairs = _pairs(query, key, positive, query_ids, key_ids, matmul)
        weights = _weights(pairs, grad_rows, None, None, None, scale, False)
        sigmoid = {"bias": bias, "sigmoid": True, "bounded": False}
        grad_query, along, total = _gradient(pairs, weights, scale, **sigmoid)
        grad_key, _, _ = _gradient(pairs.swap(), weights.swap(), scale, **sigmoid)
    return grad_query, grad_key, along, total
