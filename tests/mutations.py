"""The ways in which kernels are broken to see whether `verify` and the tests notice; `mutants.py` does both.

A mutation replaces an expression, or in Python a line, that occurs exactly once in its file. In C++ both versions are
compiled, ``(chosen ? after : before)``, so they are of one type; ``mutant::bf16`` is in `tests/cpp/mutant.h`.
"""

from __future__ import annotations

from dataclasses import dataclass

SIGN, TAIL, NORM, BF16 = KINDS = ("sign flipped", "tail dropped", "normalisation skipped", "accumulator in bf16")


@dataclass(frozen=True)
class Mutation:
    """``op`` is the public op whose kernels of one backend are broken in ``file``."""

    backend: str  # "cpp", "triton", "cuda", or "reference" for the default kernels in PyTorch
    op: str
    kind: str
    what: str
    file: str
    before: str
    after: str
    quick: bool = False  # `make test` tries it: every kind on every backend, and several ops

    def __str__(self) -> str:
        return f"{self.backend}, {self.op}, {self.kind}: {self.what}"


@dataclass(frozen=True)
class Probe:
    """What is asked about an op: these cases of `verify`, and these tests of a file."""

    cases: tuple[str, ...]
    test_file: str
    tests: str  # an expression for pytest -k


INFONCE = "sslkernels/ops/infonce"
TOKENS = "sslkernels/ops/patch_mask"
BF16_CAST = ".to(tl.bfloat16).to(tl.float32)"

CPP = (
    Mutation(
        "cpp", "nt_xent", SIGN, "the positive pushes instead of pulling", "csrc/cpu/infonce_kernel.h",
        "scale * g[v][c] + partner * z[1 - v][c]", "scale * g[v][c] - partner * z[1 - v][c]", quick=True,
    ),
    Mutation(
        "cpp", "nt_xent", TAIL, "columns beyond a multiple of 8 are left out of inner products",
        "csrc/cpu/logit_rows.h", "static_cast<double>(a[c]) * b[c]", "0.0",
    ),
    Mutation(
        "cpp", "nt_xent", NORM, "rows keep their length", "csrc/cpu/logit_rows.h", "scale = packed = 1 / length",
        "scale = packed = 1", quick=True,
    ),
    Mutation(
        "cpp", "nt_xent", NORM, "the gradient does not go through the normalisation", "csrc/cpu/infonce_kernel.h",
        "(g[v][c] - shrink * z[v][c])", "(g[v][c])",
    ),
    Mutation(
        "cpp", "nt_xent", BF16, "the sums of the columns", "csrc/cpu/logit_tiles.h",
        "load(b.sums + j0 + at) + load(scratch.column_sums + at)",
        "mutant::bf16(load(b.sums + j0 + at) + load(scratch.column_sums + at))",
    ),
    Mutation(
        "cpp", "nt_xent", BF16, "the products added to a gradient", "csrc/cpu/tile_vector.h", "load(at) + c[r][v]",
        "mutant::bf16(load(at) + c[r][v])", quick=True,
    ),
    Mutation(
        "cpp", "nt_xent", NORM, "of the exps that rows lend to the columns", "csrc/cpu/online_tiles.h",
        "c[r][v] * scratch.row_weights[row + r]", "c[r][v]",
    ),
    Mutation(
        "cpp", "info_nce", SIGN, "of the rows' softmax in the gradient", "csrc/cpu/logit_tiles.h",
        "(weight + a.weight[i0 + row + r])", "(weight - a.weight[i0 + row + r])",
    ),
    Mutation(
        "cpp", "info_nce", TAIL, "the last key is none", "csrc/cpu/logit_tiles.h", "b.rows - j0 - column",
        "b.rows - j0 - column - 1", quick=True,
    ),
    Mutation(
        "cpp", "info_nce", NORM, "of the softmax in the gradient", "csrc/cpu/logit_rows.h",
        "__builtin_exp(bound - logsumexp)", "1.0",
    ),
    Mutation(
        "cpp", "info_nce", BF16, "the sums of the exponentials", "csrc/cpu/logit_tiles.h",
        "load(sums) + (c[r][0] + c[r][1])", "mutant::bf16(load(sums) + (c[r][0] + c[r][1]))",
    ),
    Mutation(
        "cpp", "info_nce", NORM, "rows keep their length", "csrc/cpu/unit_rows_kernel.h",
        "1 / (clamped ? kNormalizeEps : length)", "1.0",
    ),
    Mutation(
        "cpp", "info_nce", SIGN, "of what lies along a row in its gradient", "csrc/cpu/unit_rows_kernel.h",
        "(total - x[d] * radial)", "(total + x[d] * radial)",
    ),
    Mutation(
        "cpp", "info_nce", TAIL, "columns beyond a multiple of 8 are left out of inner products",
        "csrc/cpu/unit_rows_kernel.h", "sums[d % kChains] += a[d] * b[d]", "sums[d % kChains]",
    ),
    Mutation(
        "cpp", "info_nce", BF16, "the logit of the positive", "csrc/cpu/unit_rows_kernel.h",
        "dot(x.values, y.values, dim) * x.factor * y.factor",
        "mutant::bf16(dot(x.values, y.values, dim) * x.factor * y.factor)", quick=True,
    ),
    Mutation(
        "cpp", "ema_update_", SIGN, "away from the student", "csrc/cpu/ema_kernel.h",
        "fma(factor, end - start, from_end ? end : start)", "fma(-factor, end - start, from_end ? end : start)",
    ),
    Mutation(
        "cpp", "ema_update_", TAIL, "the last element stays", "csrc/cpu/ema_kernel.h", "i < end", "i + 1 < end",
        quick=True,
    ),
    Mutation(
        "cpp", "ema_update_", BF16, "the new teacher", "csrc/cpu/ema_kernel.h", "Teacher::store(value)",
        "Teacher::store(mutant::bf16(value))",
    ),
    Mutation(
        "cpp", "restore_tokens", SIGN, "of the gradients summed over the batch", "csrc/cpu/patch_mask_kernel.h",
        "sum[d] += type.load(x[d])", "sum[d] -= type.load(x[d])",
    ),
    Mutation(
        "cpp", "restore_tokens", TAIL, "the last column gets no position", "csrc/cpu/patch_mask_kernel.h",
        "type.load(x[d]) + type.load(y[d])", "d + 1 < columns ? type.load(x[d]) + type.load(y[d]) : type.load(x[d])",
    ),
    Mutation(
        "cpp", "restore_tokens", BF16, "the gradients summed over the batch", "csrc/cpu/patch_mask_kernel.h",
        "total[d] += sum[d]", "total[d] = mutant::bf16(total[d] + sum[d])",
    ),
    Mutation(
        "cpp", "gather_tokens", TAIL, "what no vector holds is not copied", "csrc/cpu/patch_mask_kernel.h",
        "__builtin_memcpy(target + at, source + at, 2)", "__builtin_memset(target + at, 0, 2)",
    ),
    Mutation(
        "cpp", "masked_patch_loss", SIGN, "of the target", "csrc/cpu/patch_loss_kernel.h",
        "value - (pixel - target.near - target.rest) * target.factor",
        "value + (pixel - target.near - target.rest) * target.factor",
    ),
    Mutation(
        "cpp", "masked_patch_loss", TAIL, "what no vector holds is not added", "csrc/cpu/patch_loss_kernel.h",
        "static_cast<double>(d * d)", "0.0",
    ),
    Mutation(
        "cpp", "masked_patch_loss", NORM, "pixels keep their variance", "csrc/cpu/patch_loss_kernel.h",
        "1 / __builtin_sqrt(variance + eps)", "1.0",
    ),
    Mutation(
        "cpp", "masked_patch_loss", BF16, "the sum of squares", "csrc/cpu/patch_loss_kernel.h",
        "sum[k] += d * d", "sum[k] = mutant::bf16(sum[k] + d * d)",
    ),
)  # fmt: skip

TRITON = (
    Mutation(
        "triton", "nt_xent", SIGN, "the positive pushes instead of pulling", f"{INFONCE}/nt_xent_triton.py",
        "pull += grad_loss * share", "pull -= grad_loss * share", quick=True,
    ),
    Mutation(
        "triton", "nt_xent", TAIL, "the last pair is no negative", f"{INFONCE}/nt_xent_triton.py",
        "(columns < N)[None, :]", "(columns < N - 1)[None, :]",
    ),
    Mutation(
        "triton", "nt_xent", NORM, "rows keep their length", f"{INFONCE}/shared_triton.py",
        "tl.where(regular, tl.div_rn(1.0, norm),", "tl.where(regular, grow,", quick=True,
    ),
    Mutation(
        "triton", "nt_xent", NORM, "the gradient does not go through the normalisation",
        f"{INFONCE}/nt_xent_triton.py", "(grad - x * radial[:, None])", "grad",
    ),
    Mutation(
        "triton", "nt_xent", BF16, "a row's sum", f"{INFONCE}/nt_xent_triton.py", "tl.sum(terms, 1)",
        f"tl.sum(terms, 1){BF16_CAST}", quick=True,
    ),
    Mutation(
        "triton", "info_nce", SIGN, "of the rows' softmax in the gradient", f"{INFONCE}/contrast_triton.py",
        "tl.exp2(tl.fma(similarity, scale, -scale)) * (row_weight[:, None] + column_weight[None, :])",
        "tl.exp2(tl.fma(similarity, scale, -scale)) * (column_weight[None, :] - row_weight[:, None])",
    ),
    Mutation(
        "triton", "info_nce", TAIL, "the last key is none", f"{INFONCE}/contrast_triton.py",
        "outside = tl.where(columns < M,", "outside = tl.where(columns < M - 1,", quick=True,
    ),
    Mutation(
        "triton", "info_nce", NORM, "of the softmax in the gradient", f"{INFONCE}/contrast_weights_triton.py",
        "grad.to(tl.float32) * power", "grad.to(tl.float32)",
    ),
    Mutation(
        "triton", "info_nce", BF16, "the sums of the exponentials", f"{INFONCE}/contrast_triton.py",
        "sums += tl.sum(terms, 1)", f"sums = (sums + tl.sum(terms, 1)){BF16_CAST}",
    ),
    Mutation(
        "triton", "info_nce_queue", NORM, "the keys keep their length", f"{INFONCE}/contrast_triton.py",
        "factor = inverse_norm", "factor = tl.zeros_like(inverse_norm) + 1",
    ),
    Mutation(
        "triton", "ema_update_", SIGN, "away from the student", "sslkernels/ops/ema/kernels.py",
        "student - value, tl.where", "value - student, tl.where",
    ),
    Mutation(
        "triton", "ema_update_", TAIL, "the last element stays", "sslkernels/ops/ema/kernels.py",
        "mask = position < count", "mask = position < count - 1", quick=True,
    ),
    Mutation(
        "triton", "ema_update_", BF16, "the new teacher", "sslkernels/ops/ema/kernels.py",
        "else value.to(TEACHER)", "else value.to(tl.bfloat16).to(TEACHER)",
    ),
    Mutation(
        "triton", "restore_tokens", SIGN, "of the gradients summed over the batch", f"{TOKENS}/tokens_triton.py",
        "pos_sum += grad", "pos_sum -= grad",
    ),
    Mutation(
        "triton", "restore_tokens", TAIL, "the last column gets no position", f"{TOKENS}/tokens_triton.py",
        "mask=inside & placed, other", "mask=inside & placed & (column + 1 < D)[None, :], other",
    ),
    Mutation(
        "triton", "restore_tokens", BF16, "the gradients summed over the batch", f"{TOKENS}/tokens_triton.py",
        "removed_sum += tl.where(removed[:, None], grad, 0.0)",
        "removed_sum = (removed_sum + tl.where(removed[:, None], grad, 0.0)).to(tl.bfloat16).to(COMPUTE)",
    ),
    Mutation(
        "triton", "masked_patch_loss", SIGN, "of the target", "sslkernels/ops/patch_loss/kernels.py",
        "tl.where(inside, pred - target, 0.0)", "tl.where(inside, pred + target, 0.0)",
    ),
    Mutation(
        "triton", "masked_patch_loss", TAIL, "the last element is not compared", "sslkernels/ops/patch_loss/kernels.py",
        "tl.where(inside, pred - target, 0.0)", "tl.where(element + 1 < WIDTH, pred - target, 0.0)",
    ),
    Mutation(
        "triton", "masked_patch_loss", NORM, "pixels keep their variance", "sslkernels/ops/patch_loss/kernels.py",
        "return x / tl.sqrt_rn", "return x + 0 * tl.sqrt_rn",
    ),
    Mutation(
        "triton", "masked_patch_loss", BF16, "the sum of squares", "sslkernels/ops/patch_loss/kernels.py",
        "tl.sum(difference * difference, 0)", f"tl.sum(difference * difference, 0){BF16_CAST}",
    ),
)  # fmt: skip

CUDA = (
    Mutation(
        "cuda", "info_nce", SIGN, "of the rows' softmax in the gradient", "csrc/cuda/contrast_backward.cuh",
        "loss.column_terms ? g + part(column[k], towards) : g", "loss.column_terms ? part(column[k], towards) - g : -g",
        quick=True,
    ),
    Mutation(
        "cuda", "info_nce", TAIL, "the last key is none", "csrc/cuda/contrast_chunk.cuh",
        "pairs.columns - column", "pairs.columns - column - 1", quick=True,
    ),
    Mutation(
        "cuda", "info_nce", NORM, "of the softmax in the gradient", "csrc/cuda/contrast_backward.cuh",
        "(product - term.shift) * scale.steepness - term.rest", "product * scale.steepness", quick=True,
    ),
    Mutation(
        "cuda", "info_nce", BF16, "a row's sum", "csrc/cuda/contrast_forward.cuh",
        "next.sum += exp2f((x[k] - next.largest) * scale.steepness)",
        "next.sum = mutant::bf16(next.sum + exp2f((x[k] - next.largest) * scale.steepness))", quick=True,
    ),
    Mutation(
        "cuda", "info_nce_queue", NORM, "the keys keep their length", "csrc/cuda/contrast_chunk.cuh",
        "values[i] / length", "values[i]",
    ),
    Mutation(
        "cuda", "ema_update_", SIGN, "away from the student", "csrc/cuda/ema.cuh", "fmaf(factor, difference, base)",
        "fmaf(-factor, difference, base)",
    ),
    Mutation(
        "cuda", "ema_update_", TAIL, "the last element stays", "csrc/cuda/ema.cuh",
        "begin + kBlockElements < entry.count ? begin + kBlockElements : entry.count",
        "begin + kBlockElements < entry.count ? begin + kBlockElements : entry.count - 1",
    ),
    Mutation(
        "cuda", "ema_update_", BF16, "the new teacher", "csrc/cuda/ema.cuh", "Teacher::store(rounded)",
        "Teacher::store(mutant::bf16(rounded))",
    ),
    Mutation(
        "cuda", "restore_tokens", SIGN, "of the gradients summed over the batch", "csrc/cuda/patch_sums.cuh",
        "sum += part[i * rows * dim]", "sum -= part[i * rows * dim]",
    ),
    Mutation(
        "cuda", "restore_tokens", TAIL, "the last unit gets no position", "csrc/cuda/patch_rows.cuh",
        "load_unit<Unit>(position + offset)",
        "(at + 1 < units ? load_unit<Unit>(position + offset) : filled<Unit>(0))",
    ),
    Mutation(
        "cuda", "restore_tokens", BF16, "the gradients summed over the batch", "csrc/cuda/patch_rows.cuh",
        "value[i] += other.value[i]", "value[i] = mutant::bf16(value[i] + other.value[i])",
    ),
    Mutation(
        "cuda", "masked_patch_loss", SIGN, "of the target", "csrc/cuda/patch_loss.cuh", "value - target(pixel)",
        "value + target(pixel)",
    ),
    Mutation(
        "cuda", "masked_patch_loss", TAIL, "what no 16 bytes hold is not read", "csrc/cuda/patch_loss.cuh",
        "static_cast<Real>(Pred::load(pred[k]))", "static_cast<Real>(0)",
    ),
    Mutation(
        "cuda", "masked_patch_loss", NORM, "pixels keep their variance", "csrc/cuda/patch_loss.cuh",
        "1 / sqrt(variance + static_cast<Real>(eps))", "static_cast<Real>(1)",
    ),
    Mutation(
        "cuda", "masked_patch_loss", BF16, "the sum of squares", "csrc/cuda/patch_loss.cuh",
        "sum += d * d", "sum = mutant::bf16(sum + d * d)",
    ),
)  # fmt: skip

REFERENCE = (
    Mutation(
        "reference", "nt_xent", SIGN, "the positive pushes instead of pulling", f"{INFONCE}/reference.py",
        "probability[rows, partners] = -pull", "probability[rows, partners] = pull", quick=True,
    ),
    Mutation(
        "reference", "nt_xent", NORM, "the gradient does not go through the normalisation", f"{INFONCE}/reference.py",
        "grad_z - z * along, grad_z)", "grad_z, grad_z)", quick=True,
    ),
    Mutation(
        "reference", "nt_xent", BF16, "the products added to a gradient", f"{INFONCE}/reference.py",
        "(weighted + weighted.T) @ z / temperature", "((weighted + weighted.T) @ z).bfloat16().to(z) / temperature",
        quick=True,
    ),
    Mutation(
        "reference", "ema_update_", SIGN, "away from the student", "sslkernels/ops/ema/reference.py",
        "difference = (end - start).double()", "difference = (start - end).double()",
    ),
    Mutation(
        "reference", "masked_patch_loss", TAIL, "the last element is not compared",
        "sslkernels/ops/patch_loss/reference.py", "pred.to(compute) - target, 0)",
        "(pred.to(compute) - target) * (torch.arange(pred.shape[-1]) + 1 < pred.shape[-1]), 0)", quick=True,
    ),
    Mutation(
        "reference", "masked_patch_loss", NORM, "pixels keep their variance", "sslkernels/ops/patch_loss/reference.py",
        "return patches * (var + eps).rsqrt()", "return patches",
    ),
)  # fmt: skip

MUTATIONS = (*CPP, *TRITON, *CUDA, *REFERENCE)

EAGER = "test_as_exact_as_eager and float32 and "
PROBES = {
    ("cpp", "nt_xent"): Probe(("odd", "tau_0.01"), "test_infonce.py", EAGER + "(odd or tau_0.01)"),
    ("cpp", "info_nce"): Probe(
        ("odd", "excluded", "lengths"), "test_contrast.py", EAGER + "(info_nce-odd or info_nce-lengths)"
    ),
    ("cpp", "ema_update_"): Probe(
        ("three", "tiny"), "test_ema.py", "test_as_exact_as_lerp and None-three-torch.float32"
    ),
    ("cpp", "gather_tokens"): Probe(
        ("repeated",), "test_patch_mask.py", "test_as_exact_as_eager and gather_tokens-repeated-float32"
    ),
    ("cpp", "restore_tokens"): Probe(
        ("mae", "odd"), "test_patch_mask.py", "test_as_exact_as_eager and restore_tokens and float32"
    ),
    ("cpp", "masked_patch_loss"): Probe(("n2_56", "odd"), "test_patch_loss.py", EAGER + "None and (n2_56 or odd)"),
    ("triton", "nt_xent"): Probe(
        ("three_columns",),
        "test_infonce_triton.py",
        "test_fp32_is_as_exact_as_eager and three_columns",
    ),
    ("triton", "info_nce"): Probe(
        ("lengths",),
        "test_contrast_triton.py",
        "test_fp32_is_as_exact_as_eager and info_nce-lengths",
    ),
    ("triton", "info_nce_queue"): Probe(
        ("lengths",), "test_contrast_triton.py", "test_fp32_is_as_exact_as_eager and info_nce_queue-lengths"
    ),
    ("triton", "ema_update_"): Probe(
        ("three", "tiny"), "test_ema_gpu.py", "test_triton_gives_the_bits_of_the_cpu and float32"
    ),
    ("triton", "restore_tokens"): Probe(
        ("mae", "odd"), "test_patch_mask_triton.py", "test_public_functions_are_as_exact_as_eager and restore_tokens"
    ),
    ("triton", "masked_patch_loss"): Probe(
        ("n2_56", "odd"), "test_patch_loss_gpu.py", "test_triton_is_as_exact_as_eager and float32 and (n2_56 or odd)"
    ),
    ("cuda", "info_nce"): Probe(
        ("excluded", "one_column"), "test_contrast_cuda.py", EAGER + "(info_nce-excluded or info_nce-one_column)"
    ),
    ("cuda", "info_nce_queue"): Probe(("lengths",), "test_contrast_cuda.py", EAGER + "info_nce_queue-lengths"),
    ("cuda", "ema_update_"): Probe(("three", "tiny"), "test_ema_gpu.py", "test_cuda_gives_the_bits and float32-0"),
    ("cuda", "restore_tokens"): Probe(("mae", "odd"), "test_patch_mask_cuda.py", EAGER + "restore_tokens"),
    ("cuda", "masked_patch_loss"): Probe(
        ("n2_56", "odd"), "test_patch_loss_gpu.py", "test_cuda_is_as_exact_as_eager and float32 and (n2_56 or odd)"
    ),
    ("reference", "nt_xent"): Probe(("odd",), "test_infonce.py", EAGER + "odd"),
    ("reference", "ema_update_"): Probe(
        ("three",), "test_ema.py", "test_as_exact_as_lerp and None-three-torch.float32"
    ),
    ("reference", "masked_patch_loss"): Probe(
        ("n2_56", "odd"), "test_patch_loss.py", EAGER + "None and (n2_56 or odd)"
    ),
}  # what shows each backend and op to be right: a few small cases
