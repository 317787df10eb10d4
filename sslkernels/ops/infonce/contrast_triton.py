"""The Triton kernels of the contrastive core: of the N x M logits only tiles exist.

A program owns rows of x and goes through the columns, which are the rows of y: queries against keys, or with the roles
swapped, ``SWAPPED``, keys against queries, which is how sums over columns need no atomics: every result is the same on
every run. Where few rows face many columns, the columns are split over programs, and what each of them found is merged
in a fixed order by `_contrast_fwd_finish_kernel`, or by a sum.

Cost, with one unit = 2 N M D flops: `contrast_fwd` 1, with the columns 2, with the attraction 2; `contrast_bwd` 2 for
each side, so 4, and 2 where the key is the query and nothing but the own row is left out. `sigmoid_contrast_fwd` 1,
`sigmoid_contrast_bwd` 4. An attraction or a gradient wider than its program's accumulator costs one unit more for every
further slice of it, since each slice forms the logits again.

x and y are read where they lie if that is exact. Otherwise `_contrast_pack_kernel` copies them, each row scaled with a
power of two, so that everything fits fp16: x = packed * factor, applied in fp32 to the products. A key that is to be
normalised has 1 / length in its factor. Similarities carry the sign of the scale; exponents are in base 2 and are
differences of similarities, which round less than those of logits where the scale is large.
"""

import triton
import triton.language as tl

from sslkernels.ops.infonce.shared_triton import (
    LN_2,
    LOG2_E,
    MIN_NORMAL,
    TILE_SCALE,
    _load_rows,
    _log1p,
    _row_extent,
    _row_scales,
)

SEGMENT = tl.constexpr(128)  # elements of a row whose fp32 products are added one by one


@triton.jit(do_not_specialize=["N"])
def _contrast_pack_kernel(
    x_ptr, packed_ptr, factor_ptr, N, stride_xn, stride_xd,
    PACK: tl.constexpr, NORMALIZE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """packed (N, WIDTH) and factor (N,): z = packed * factor, or without ``PACK`` z = x * factor."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if NORMALIZE:
        shrink, factor, inverse_norm = _row_scales(x_ptr, rows, stride_xn, stride_xd, N, D, True, ROWS, DEPTH)
        if not PACK:
            factor = inverse_norm
    else:
        shrink, factor = _row_extent(x_ptr, rows, stride_xn, stride_xd, N, D, ROWS, DEPTH)
    tl.store(factor_ptr + rows, factor, mask=rows < N)
    if PACK:
        for start in range(0, WIDTH, DEPTH):
            d = start + tl.arange(0, DEPTH)
            x = _load_rows(x_ptr, rows, d, stride_xn, stride_xd, N, D) * shrink[:, None]
            inside = (rows < N)[:, None] & (d < WIDTH)[None, :]
            tl.store(packed_ptr + rows[:, None] * WIDTH + d[None, :], x.to(packed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale_of(scale_ptr):
    """|scale| in base 2, never quite 0, and its sign."""
    scale = tl.load(scale_ptr)
    return tl.maximum(tl.abs(scale) * LOG2_E, MIN_NORMAL), tl.where(scale < 0, -1.0, 1.0)


@triton.jit
def _load_tile(x_ptr, rows, d, stride_xn, WIDTH: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr):
    """Elements d of rows that exist, zeros beyond WIDTH."""
    offsets = rows.to(tl.int64)[:, None] * stride_xn + d[None, :]
    if MASKED:
        return tl.load(x_ptr + offsets, mask=(d < WIDTH)[None, :], other=0.0).to(TILE)
    return tl.load(x_ptr + offsets).to(TILE)


@triton.jit
def _products(
    x_ptr, rows, stride_xn, y_ptr, columns, stride_yn, first, last, TILE: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) inner products of the elements from first to last, in fp32."""
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, DEPTH):
        d = start + tl.arange(0, DEPTH)
        a = _load_tile(x_ptr, rows, d, stride_xn, WIDTH, WIDTH % DEPTH != 0, TILE)
        b = _load_tile(y_ptr, columns, d, stride_yn, WIDTH, WIDTH % DEPTH != 0, TILE)
        products = tl.dot(a, tl.trans(b), products, input_precision="ieee")
    return products


@triton.jit
def _similarities(
    x_ptr, rows, stride_xn, row_factor, y_ptr, columns, stride_yn, column_factor, TILE: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) inner products in fp32, times the factors.

    fp32 products of wide rows are sums of sums: added one by one they would round more than those of a BLAS.
    """
    if TILE.primitive_bitwidth < 32 or WIDTH <= SEGMENT:
        products = _products(
            x_ptr, rows, stride_xn, y_ptr, columns, stride_yn, 0, WIDTH, TILE, WIDTH, ROWS, COLUMNS, DEPTH
        )
    else:
        products = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, WIDTH, SEGMENT):
            products += _products(
                x_ptr, rows, stride_xn, y_ptr, columns, stride_yn, first, tl.minimum(first + SEGMENT, WIDTH),
                TILE, WIDTH, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
    return products * (row_factor[:, None] * column_factor[None, :])


@triton.jit
def _apart(
    rows, columns, x_rows, y_rows, skip_ptr, x_ids_ptr, y_ids_ptr,
    SWAPPED: tl.constexpr, SKIPS: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """Where a tile holds pairs that neither ``skip`` names, which belongs to the queries, nor equal ids.

    x_rows and y_rows are the nearest rows that exist: what a tile has beyond them is left out by others.
    """
    apart = tl.full((rows.shape[0], columns.shape[0]), True, tl.int1)
    for s in tl.static_range(SKIPS):
        if SWAPPED:
            apart &= rows[:, None] != tl.load(skip_ptr + y_rows.to(tl.int64) * SKIPS + s)[None, :]
        else:
            apart &= tl.load(skip_ptr + x_rows.to(tl.int64) * SKIPS + s)[:, None] != columns[None, :]
    if HAS_IDS:
        apart &= tl.load(x_ids_ptr + x_rows)[:, None] != tl.load(y_ids_ptr + y_rows)[None, :]
    return apart


@triton.jit(do_not_specialize=["N", "M", "chunk"])
def _contrast_fwd_kernel(
    x_ptr, x_factor_ptr, y_ptr, y_factor_ptr, factor_peak_ptr, scale_ptr, skip_ptr, x_ids_ptr, y_ids_ptr,
    stats_ptr, attraction_ptr, N, M, chunk, stride_xn, stride_yn,
    BOUNDED: tl.constexpr, ATTRACT: tl.constexpr, SWAPPED: tl.constexpr, SKIPS: tl.constexpr, HAS_IDS: tl.constexpr,
    TILE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, GRAD_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """stats (splits, 3, N): the largest similarity, the sum of exp(logit - peak), the similarity of skip[:, 0].

    attraction (splits, N, D): the sum of exp(logit - peak) y, in units of factor_peak / TILE_SCALE. Program (i, s, w)
    takes ROWS rows, ``chunk`` columns, and GRAD_WIDTH elements of the attraction. ``BOUNDED``: the peak is taken to be
    1, the similarity of a vector of unit length with itself.
    """
    rows = (tl.program_id(0).to(tl.int64) * ROWS).to(tl.int32) + tl.arange(0, ROWS)
    x_rows = tl.minimum(rows, N - 1)
    width = tl.program_id(2) * GRAD_WIDTH + tl.arange(0, GRAD_WIDTH)
    scale, sign = _scale_of(scale_ptr)
    factor_peak = tl.load(factor_peak_ptr)
    row_factor = tl.load(x_factor_ptr + x_rows) * sign
    peak = tl.full((ROWS,), 1.0 if BOUNDED else -float("inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    skipped = tl.full((ROWS,), -float("inf"), tl.float32)
    attraction = tl.zeros((ROWS, GRAD_WIDTH), tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, M), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        y_rows = tl.minimum(columns, M - 1)
        column_factor = tl.load(y_factor_ptr + y_rows)
        similarity = _similarities(
            x_ptr, x_rows, stride_xn, row_factor, y_ptr, y_rows, stride_yn, column_factor,
            TILE, WIDTH, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        keep = _apart(rows, columns, x_rows, y_rows, skip_ptr, x_ids_ptr, y_ids_ptr, SWAPPED, SKIPS, HAS_IDS)
        outside = tl.where(columns < M, 0.0, -float("inf"))[None, :]
        if BOUNDED:
            similarity += outside
            terms = tl.where(keep, tl.exp2(tl.fma(similarity, scale, -scale)), 0.0)
        else:
            if SKIPS > 0 and not SWAPPED:
                named = tl.load(skip_ptr + x_rows.to(tl.int64) * SKIPS)[:, None] == columns[None, :]
                skipped = tl.maximum(skipped, tl.max(tl.where(named, similarity, -float("inf")), 1))
            similarity = tl.where(keep, similarity, -float("inf")) + outside
            new_peak = tl.maximum(peak, tl.max(similarity, 1))
            base = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # nothing may have taken part so far
            rescale = tl.exp2((peak - base) * scale)  # exactly 1 where the peak stays
            terms = tl.exp2((similarity - base[:, None]) * scale)
            sums *= rescale
            if ATTRACT:
                attraction *= rescale[:, None]
            peak = new_peak
        sums += tl.sum(terms, 1)
        if ATTRACT:
            z = _load_tile(y_ptr, y_rows, width, stride_yn, WIDTH, WIDTH % GRAD_WIDTH != 0, TILE)
            terms *= (column_factor / factor_peak * TILE_SCALE)[None, :]
            attraction = tl.dot(terms.to(TILE), z, attraction, input_precision="ieee")

    inside = rows < N
    split = tl.program_id(1).to(tl.int64)
    stats_ptrs = stats_ptr + split * 3 * N + rows
    first_slice = inside & (tl.program_id(2) == 0)
    tl.store(stats_ptrs, peak, mask=first_slice)
    tl.store(stats_ptrs + N, sums, mask=first_slice)
    tl.store(stats_ptrs + 2 * N, skipped, mask=first_slice)
    if ATTRACT:
        offsets = (split * N + rows)[:, None] * D + width[None, :]
        tl.store(attraction_ptr + offsets, attraction, mask=inside[:, None] & (width < D)[None, :])


@triton.jit(do_not_specialize=["N", "splits"])
def _contrast_fwd_finish_kernel(
    stats_ptr, partial_ptr, factor_peak_ptr, scale_ptr, lse_ptr, peak_logit_ptr, skipped_logit_ptr, attraction_ptr,
    N, splits, ATTRACT: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """lse, peak_logit, skipped_logit (N,) and attraction (N, D) from what the splits of the columns found."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    scale, _ = _scale_of(scale_ptr)
    size = tl.abs(tl.load(scale_ptr))
    none = tl.full((ROWS,), -float("inf"), tl.float32)
    peak, skipped = none, none
    for split in range(splits):
        stats_ptrs = stats_ptr + tl.cast(split, tl.int64) * 3 * N + rows
        peak = tl.maximum(peak, tl.load(stats_ptrs, mask=inside, other=-float("inf")))
        skipped = tl.maximum(skipped, tl.load(stats_ptrs + 2 * N, mask=inside, other=-float("inf")))
    base = tl.where(peak == none, 0.0, peak)
    sums = tl.zeros((ROWS,), tl.float32)
    for split in range(splits):
        stats_ptrs = stats_ptr + tl.cast(split, tl.int64) * 3 * N + rows
        share = tl.exp2((tl.load(stats_ptrs, mask=inside, other=-float("inf")) - base) * scale)
        sums += share * tl.load(stats_ptrs + N, mask=inside, other=0.0)
    # log 0 is -inf: nothing took part
    tl.store(lse_ptr + rows, base.to(tl.float64) * size + tl.log(sums), mask=inside)
    tl.store(peak_logit_ptr + rows, tl.where(peak == none, none, peak * size), mask=inside)
    tl.store(skipped_logit_ptr + rows, tl.where(skipped == none, none, skipped * size), mask=inside)
    if ATTRACT:
        norm = tl.load(factor_peak_ptr) / TILE_SCALE * tl.where(sums > 0, 1 / sums, 0.0)
        for start in range(0, D, DEPTH):
            d = start + tl.arange(0, DEPTH)
            mask = inside[:, None] & (d < D)[None, :]
            attraction = tl.zeros((ROWS, DEPTH), tl.float32)
            for split in range(splits):
                first = tl.cast(split, tl.int64) * N
                peak = tl.load(stats_ptr + first * 3 + rows, mask=inside, other=-float("inf"))
                share = tl.exp2((peak - base) * scale)
                partial = tl.load(partial_ptr + (first + rows)[:, None] * D + d[None, :], mask=mask, other=0.0)
                attraction += partial * share[:, None]
            tl.store(attraction_ptr + rows[:, None] * D + d[None, :], attraction * norm[:, None], mask=mask)


@triton.jit
def _exp2_finite(x):
    """2^x; of pairs that take no part, x may be anything, and what is left of them must not be NaN."""
    return tl.exp2(tl.minimum(x, 126.0))


@triton.jit
def _softmax_weights(
    similarity, row_weight, row_base, column_weight, column_base, scale, BOUNDED: tl.constexpr
):  # fmt: skip
    """What the softmaxes along the rows and along the columns give a pair. With a fixed bound one exp2 serves both."""
    if BOUNDED:
        return tl.exp2(tl.fma(similarity, scale, -scale)) * (row_weight[:, None] + column_weight[None, :])
    weights = row_weight[:, None] * _exp2_finite((similarity - row_base[:, None]) * scale)
    return weights + column_weight[None, :] * _exp2_finite((similarity - column_base[None, :]) * scale)


@triton.jit
def _sigmoid_terms(similarity, scale, bias, apart):
    """-y, x = -y * logit in base 2, and 2^-|x|; y is 1 for pairs that belong together and -1 for those apart."""
    minus_y = tl.where(apart, 1.0, -1.0)
    x = minus_y * tl.fma(similarity, scale, bias)
    return minus_y, x, tl.exp2(-tl.abs(x))


@triton.jit(do_not_specialize=["N", "M", "chunk"])
def _contrast_bwd_kernel(
    x_ptr, x_factor_ptr, row_weights_ptr, y_ptr, y_factor_ptr, column_weights_ptr, factor_peak_ptr, weight_peak_ptr,
    scale_ptr, bias_ptr, skip_ptr, x_ids_ptr, y_ids_ptr, grad_ptr, sums_ptr, N, M, chunk, stride_xn, stride_yn,
    SIGMOID: tl.constexpr, BOUNDED: tl.constexpr, SWAPPED: tl.constexpr, SKIPS: tl.constexpr, HAS_IDS: tl.constexpr,
    TILE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, GRAD_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """grad (splits, N, D) = scale G y over the columns of a split, with G the gradients of the logits.

    Unless ``SWAPPED``: sums (2, splits, N), of G * similarity, and with ``SIGMOID`` of G. Programs as in
    `_contrast_fwd_kernel`; G is formed again from each tile of similarities, in units of the peak of its weights.
    """
    rows = (tl.program_id(0).to(tl.int64) * ROWS).to(tl.int32) + tl.arange(0, ROWS)
    x_rows = tl.minimum(rows, N - 1)
    width = tl.program_id(2) * GRAD_WIDTH + tl.arange(0, GRAD_WIDTH)
    scale, sign = _scale_of(scale_ptr)
    bias = tl.load(bias_ptr) * LOG2_E
    factor_peak, weight_peak = tl.load(factor_peak_ptr), tl.maximum(tl.load(weight_peak_ptr), MIN_NORMAL).to(tl.float32)
    row_factor = tl.load(x_factor_ptr + x_rows) * sign
    row_weights_ptrs = row_weights_ptr + x_rows.to(tl.int64) * 2
    row_weight, row_base = tl.load(row_weights_ptrs), tl.load(row_weights_ptrs + 1)
    grad_unit = factor_peak / TILE_SCALE * (weight_peak * tl.load(scale_ptr))
    along = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    grad = tl.zeros((ROWS, GRAD_WIDTH), tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, M), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        y_rows = tl.minimum(columns, M - 1)
        real = tl.where(columns < M, 1.0, 0.0)
        column_factor = tl.load(y_factor_ptr + y_rows) * real
        column_weights_ptrs = column_weights_ptr + y_rows.to(tl.int64) * 2
        column_weight, column_base = tl.load(column_weights_ptrs), tl.load(column_weights_ptrs + 1)
        similarity = _similarities(
            x_ptr, x_rows, stride_xn, row_factor, y_ptr, y_rows, stride_yn, column_factor,
            TILE, WIDTH, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        apart = _apart(rows, columns, x_rows, y_rows, skip_ptr, x_ids_ptr, y_ids_ptr, SWAPPED, SKIPS, HAS_IDS)
        if SIGMOID:
            minus_y, x, power = _sigmoid_terms(similarity, scale, bias, apart)
            g = minus_y * tl.where(x >= 0, 1.0, power) / (1 + power) * (row_weight[:, None] + column_weight[None, :])
        else:
            g = _softmax_weights(similarity, row_weight, row_base, column_weight, column_base, scale, BOUNDED)
            g = tl.where(apart, g, 0.0)
        if not SWAPPED:
            along += tl.sum(g * similarity, 1)
            if SIGMOID:
                total += tl.sum(g * real[None, :], 1)
        z = _load_tile(y_ptr, y_rows, width, stride_yn, WIDTH, WIDTH % GRAD_WIDTH != 0, TILE)
        g *= (column_factor / factor_peak * TILE_SCALE)[None, :]
        grad = tl.dot(g.to(TILE), z, grad, input_precision="ieee")

    inside = rows < N
    index = tl.program_id(1).to(tl.int64) * N + rows
    if not SWAPPED:
        first_slice = inside & (tl.program_id(2) == 0)
        tl.store(sums_ptr + index, along * (sign * weight_peak), mask=first_slice)
        if SIGMOID:
            sums_ptr += tl.num_programs(1).to(tl.int64) * N
            tl.store(sums_ptr + index, total * weight_peak, mask=first_slice)
    offsets = index[:, None] * D + width[None, :]
    tl.store(grad_ptr + offsets, grad * grad_unit, mask=inside[:, None] & (width < D)[None, :])


@triton.jit(do_not_specialize=["N", "M", "chunk"])
def _sigmoid_contrast_fwd_kernel(
    x_ptr, x_factor_ptr, y_ptr, y_factor_ptr, scale_ptr, bias_ptr, skip_ptr, x_ids_ptr, y_ids_ptr, loss_ptr,
    N, M, chunk, stride_xn, stride_yn, SKIPS: tl.constexpr, HAS_IDS: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """loss (splits, N) fp64: the sum of softplus(-y * logit). Programs as in `_contrast_fwd_kernel`."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS).to(tl.int32) + tl.arange(0, ROWS)
    x_rows = tl.minimum(rows, N - 1)
    scale, sign = _scale_of(scale_ptr)
    bias = tl.load(bias_ptr) * LOG2_E
    row_factor = tl.load(x_factor_ptr + x_rows) * sign
    loss = tl.zeros((ROWS,), tl.float64)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, M), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        y_rows = tl.minimum(columns, M - 1)
        similarity = _similarities(
            x_ptr, x_rows, stride_xn, row_factor, y_ptr, y_rows, stride_yn, tl.load(y_factor_ptr + y_rows),
            TILE, WIDTH, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        apart = _apart(rows, columns, x_rows, y_rows, skip_ptr, x_ids_ptr, y_ids_ptr, False, SKIPS, HAS_IDS)
        _, x, power = _sigmoid_terms(similarity, scale, bias, apart)
        terms = tl.where((columns < M)[None, :], tl.maximum(x, 0.0) * LN_2 + _log1p(power), 0.0)
        loss += tl.sum(terms, 1)
    tl.store(loss_ptr + tl.program_id(1).to(tl.int64) * N + rows, loss, mask=rows < N)
