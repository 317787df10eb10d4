"""The contrastive core as torch operators: schema, shapes, autograd, and the kernels under CUDA.

One pair of operators takes the softmax of similarities along rows and, if asked, along columns; the other pair sums
their softplus. Every loss that is not `nt_xent` is a few lines of arithmetic on the (N,) results of one of them.

Under CUDA both pairs are Triton's. ``csrc/cuda/contrast.cu`` has the same four as operators of their own, `COMPILED`,
which ``backend="cuda"`` calls, and which serve the plain ones where Triton is not installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from sslkernels import _library, _operators
from sslkernels.ops.infonce import contrast_reference as reference

# Logits l_ij = scale * <query_i, key_j>; query (N, D) and scale () in fp32, or fp64 on the default kernel. key (M, D)
# in the dtype of the query; where no gradient is asked for it, in any floating-point dtype, and normalize_key divides
# its rows by their length. key None: the query itself, and no row meets itself.
# skip (N, S) int64: columns that row i leaves out; what is not in [0, M) is ignored. query_ids (N,), key_ids (M,)
# int64: a pair of equal ids is left out.
# unit: the caller knows that no |<query_i, key_j>| exceeds 1, up to rounding. bounded: besides, that 2 |scale| leaves
# exp(l - |scale|) in range. matmul: what operands may be rounded to: 0 fp32, 1 bf16, 2 fp16.
# lse_rows (N,), lse_columns (M,) or (0,) fp64: log-sum-exp of what takes part, -inf where nothing does. With peaks:
# peak_rows (N,), peak_columns (M,) or (0,): the largest logit that takes part; skipped (N,): the logit of skip[:, 0].
# Otherwise all three are (0,). With attract: attraction (N, D), the mean of the keys weighted by the row's softmax;
# otherwise (0, 0).
SCHEMAS = {
    "contrast_fwd": (
        "(Tensor query, Tensor? key, Tensor scale, Tensor? skip, Tensor? query_ids, Tensor? key_ids,"
        " bool normalize_key, bool unit, bool bounded, bool columns, bool attract, bool peaks, int matmul)"
        " -> (Tensor lse_rows, Tensor lse_columns, Tensor peak_rows, Tensor peak_columns, Tensor skipped,"
        " Tensor attraction)"
    ),
    # grad_key is (0, 0) where key is None. The log-sum-exps may be those of more columns and rows than are given here.
    "contrast_bwd": (
        "(Tensor grad_rows, Tensor? grad_columns, Tensor lse_rows, Tensor? lse_columns, Tensor query, Tensor? key,"
        " Tensor scale, Tensor? skip, Tensor? query_ids, Tensor? key_ids, bool unit, bool bounded, int matmul)"
        " -> (Tensor grad_query, Tensor grad_key, Tensor grad_scale)"
    ),
    # loss (N,) fp64: sum_j softplus(-y_ij (l_ij + bias)), where y_ij is 1 for the columns positive[i] and where ids are
    # equal, and -1 elsewhere
    "sigmoid_contrast_fwd": (
        "(Tensor query, Tensor key, Tensor scale, Tensor bias, Tensor? positive, Tensor? query_ids, Tensor? key_ids,"
        " int matmul) -> Tensor loss"
    ),
    "sigmoid_contrast_bwd": (
        "(Tensor grad_rows, Tensor query, Tensor key, Tensor scale, Tensor bias, Tensor? positive, Tensor? query_ids,"
        " Tensor? key_ids, int matmul)"
        " -> (Tensor grad_query, Tensor grad_key, Tensor grad_scale, Tensor grad_bias)"
    ),
}
COMPILED = {name: name.replace("contrast", "contrast_cuda") for name in SCHEMAS}
# what is left of the backward where the forward has formed the attraction: arithmetic, the same on every device. It is
# an operator because autograd would differentiate plain arithmetic again, as if the attraction were a constant
ATTRACTED = "contrast_attracted_bwd"

for _name, _schema in SCHEMAS.items():
    for _operator in (_name, COMPILED[_name]):
        torch.library.define(f"sslkernels::{_operator}", _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"sslkernels::{_name}", "default", getattr(reference, _name))
torch.library.define(
    f"sslkernels::{ATTRACTED}",
    "(Tensor grad_rows, Tensor query, Tensor scale, Tensor attraction) -> (Tensor grad_query, Tensor grad_scale)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl(f"sslkernels::{ATTRACTED}", "default", reference.contrast_attracted_bwd)

_calls = {name: _operators.operator(name, "sslkernels") for name in (*SCHEMAS, *COMPILED.values(), ATTRACTED)}


def _contrast_fwd_fake(
    query, key, scale, skip, query_ids, key_ids, normalize_key, unit, bounded, columns, attract, peaks, matmul
):
    rows = query.shape[0]
    width = (query if key is None else key).shape[0] if columns else 0
    return (
        query.new_empty(rows, dtype=torch.float64),
        query.new_empty(width, dtype=torch.float64),
        query.new_empty(rows if peaks else 0),
        query.new_empty(width if peaks else 0),
        query.new_empty(rows if peaks else 0),
        query.new_empty((rows, query.shape[1]) if attract else (0, 0)),
    )


def _contrast_bwd_fake(grad_rows, grad_columns, lse_rows, lse_columns, query, key, scale, *_):
    grad_key = query.new_empty((0, 0) if key is None else key.shape)
    return query.new_empty(query.shape), grad_key, torch.empty_like(scale)


def _contrast_attracted_bwd_fake(grad_rows, query, scale, attraction):
    return query.new_empty(query.shape), torch.empty_like(scale)


def _sigmoid_contrast_fwd_fake(query, *_):
    return query.new_empty(query.shape[0], dtype=torch.float64)


def _sigmoid_contrast_bwd_fake(grad_rows, query, key, scale, bias, *_):
    return query.new_empty(query.shape), key.new_empty(key.shape), torch.empty_like(scale), torch.empty_like(bias)


def _save_contrast(ctx, inputs, output):
    query, key, scale, skip, query_ids, key_ids, ctx.normalize_key, ctx.unit, ctx.bounded, *flags = inputs
    ctx.columns, ctx.attract, _, ctx.matmul = flags
    lse_rows, lse_columns, *_, attraction = output
    ctx.set_materialize_grads(False)  # zeros for every output that has no gradient cost a launch each
    if ctx.attract:
        ctx.save_for_backward(query, scale, attraction)
    else:
        ctx.save_for_backward(query, key, scale, skip, query_ids, key_ids, lse_rows, lse_columns)


def _contrast_backward(backward, ctx, grad_rows, grad_columns, *_):
    if grad_rows is None:
        query = ctx.saved_tensors[0]
        grad_rows = query.new_zeros(query.shape[0], dtype=torch.float64)
    if ctx.attract:  # the forward has formed it: no logit is needed again
        grad_query, grad_scale = _calls[ATTRACTED](grad_rows, *ctx.saved_tensors)
        grads = grad_query, None, grad_scale
    else:
        query, key, scale, skip, query_ids, key_ids, lse_rows, lse_columns = ctx.saved_tensors
        if not ctx.columns or grad_columns is None:
            grad_columns = lse_columns = None
        if key is not None:  # as it is, but for a queue in a program that was traced where no gradient was wanted
            key = reference.keys_as_used(query, key, ctx.normalize_key)
        grad_query, grad_key, grad_scale = backward(
            grad_rows, grad_columns, lse_rows, lse_columns, query, key, scale, skip, query_ids, key_ids,
            ctx.unit, ctx.bounded, ctx.matmul,
        )  # fmt: skip
        grads = grad_query, None if key is None else grad_key, grad_scale
    return *grads, *[None] * 10


def _save_sigmoid(ctx, inputs, output):
    *tensors, ctx.matmul = inputs
    ctx.save_for_backward(*tensors)


def _sigmoid_backward(backward, ctx, grad_rows):
    grads = backward(grad_rows, *ctx.saved_tensors, ctx.matmul)
    return *grads, *[None] * 4


def _register(contrast_fwd: str, contrast_bwd: str, sigmoid_fwd: str, sigmoid_bwd: str) -> None:
    """Shapes and gradients of four operators; the backward of each forward is the one beside it."""
    fakes: tuple[Callable, ...] = (
        _contrast_fwd_fake,
        _contrast_bwd_fake,
        _sigmoid_contrast_fwd_fake,
        _sigmoid_contrast_bwd_fake,
    )
    for name, fake in zip((contrast_fwd, contrast_bwd, sigmoid_fwd, sigmoid_bwd), fakes, strict=True):
        torch.library.register_fake(f"sslkernels::{name}", fake)
    for forward, backward, gradients, save in (
        (contrast_fwd, contrast_bwd, _contrast_backward, _save_contrast),
        (sigmoid_fwd, sigmoid_bwd, _sigmoid_backward, _save_sigmoid),
    ):
        partner = _calls[backward]
        _operators.register_autograd(forward, functools.partial(gradients, partner), save=save)
        _operators.refuse_double_backward(backward, "sslkernels")


torch.library.register_fake(f"sslkernels::{ATTRACTED}", _contrast_attracted_bwd_fake)
_operators.refuse_double_backward(ATTRACTED, "sslkernels")
_register(*SCHEMAS)
_register(*COMPILED.values())


def operator(name: str, backend: str | None):
    """The operator to call for ``backend``: "cuda" has its own, all others are those of the device."""
    return _calls[COMPILED[name] if backend == "cuda" else name]


def _serve_cuda(name: str, owner: str) -> None:
    @torch.library.impl(f"sslkernels::{name}", "cuda")
    def _(*args):
        if owner == "cuda":
            return operator(name, "cuda")(*args)
        from sslkernels.ops.infonce import contrast_kernels  # triton takes a while to import: only where it is used

        return getattr(contrast_kernels, name)(*args)


for _name in SCHEMAS:
    _owner = _library.claim_cuda(_name, COMPILED[_name])
    if _owner != "reference":
        _serve_cuda(_name, _owner)
