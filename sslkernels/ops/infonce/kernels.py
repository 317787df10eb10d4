"""Launches the Triton kernels of NT-Xent, with one named configuration for each family of GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.runtime import driver

from sslkernels.ops.infonce import reference
from sslkernels.ops.infonce.nt_xent_triton import (
    _nt_xent_bwd_finish_kernel,
    _nt_xent_bwd_kernel,
    _nt_xent_bwd_weights_kernel,
    _nt_xent_fwd_finish_kernel,
    _nt_xent_fwd_rows_kernel,
    _nt_xent_fwd_triangle_kernel,
    _nt_xent_pack_kernel,
)


@dataclass(frozen=True)
class Tiles:
    """A tile of the logits, rows x columns, multiplied in steps of depth, and who works on it."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    grad_width: int = 1  # backward: columns of the gradient that one program accumulates

    @property
    def block(self) -> int:
        """The rows of a view are padded to a multiple of it."""
        return max(self.rows, self.columns)


@dataclass(frozen=True)
class Config:
    """What one family of GPUs runs."""

    triangle: Tiles
    rows: Tiles
    backward: Tiles  # up to its grad_width columns
    backward_wide: Tiles  # beyond; more than its grad_width columns cost one more computation of the logits each time
    programs: int  # that keep the family's largest part busy, one for each multiprocessor


# by element size of the tiles: fp32 runs on the FMA units of NVIDIA's GPUs, 16 bits on the tensor cores
CONFIGS = {
    "sm_80": {
        2: Config(
            triangle=Tiles(128, 128, 64, num_warps=8, num_stages=3),
            rows=Tiles(128, 64, 64, num_warps=8, num_stages=3),
            backward=Tiles(64, 64, 128, num_warps=8, num_stages=2, grad_width=128),
            backward_wide=Tiles(64, 32, 64, num_warps=8, num_stages=2, grad_width=512),
            programs=108,
        ),
        4: Config(
            triangle=Tiles(128, 128, 16, num_warps=8, num_stages=3),
            rows=Tiles(128, 64, 16, num_warps=8, num_stages=3),
            backward=Tiles(64, 32, 32, num_warps=8, num_stages=2, grad_width=128),
            backward_wide=Tiles(64, 32, 32, num_warps=8, num_stages=2, grad_width=256),
            programs=108,
        ),
    },
    "sm_90": {
        2: Config(
            triangle=Tiles(128, 128, 64, num_warps=8, num_stages=4),
            rows=Tiles(128, 128, 128, num_warps=8, num_stages=3),
            backward=Tiles(128, 64, 128, num_warps=8, num_stages=3, grad_width=128),
            backward_wide=Tiles(64, 64, 64, num_warps=8, num_stages=2, grad_width=512),
            programs=132,
        ),
        4: Config(
            triangle=Tiles(128, 128, 16, num_warps=8, num_stages=3),
            rows=Tiles(128, 64, 16, num_warps=8, num_stages=3),
            backward=Tiles(64, 32, 32, num_warps=8, num_stages=2, grad_width=128),
            backward_wide=Tiles(64, 32, 32, num_warps=8, num_stages=2, grad_width=256),
            programs=132,
        ),
    },
    "sm_100": {
        2: Config(
            triangle=Tiles(128, 128, 64, num_warps=8, num_stages=4),
            rows=Tiles(128, 64, 128, num_warps=8, num_stages=3),
            backward=Tiles(128, 64, 128, num_warps=8, num_stages=3, grad_width=128),
            backward_wide=Tiles(64, 64, 64, num_warps=8, num_stages=2, grad_width=512),
            programs=148,
        ),
        4: Config(
            triangle=Tiles(128, 128, 16, num_warps=8, num_stages=3),
            rows=Tiles(128, 64, 16, num_warps=8, num_stages=3),
            backward=Tiles(64, 32, 32, num_warps=8, num_stages=2, grad_width=128),
            backward_wide=Tiles(64, 32, 32, num_warps=8, num_stages=2, grad_width=256),
            programs=148,
        ),
    },
    "gfx942": {
        2: Config(
            triangle=Tiles(128, 128, 64, num_warps=8, num_stages=2),
            rows=Tiles(128, 64, 64, num_warps=8, num_stages=2),
            backward=Tiles(128, 64, 64, num_warps=8, num_stages=2, grad_width=128),
            backward_wide=Tiles(32, 32, 64, num_warps=8, num_stages=2, grad_width=512),
            programs=304,
        ),
        4: Config(
            triangle=Tiles(64, 64, 32, num_warps=8, num_stages=2),
            rows=Tiles(64, 64, 32, num_warps=8, num_stages=2),
            backward=Tiles(64, 32, 32, num_warps=8, num_stages=2, grad_width=128),
            backward_wide=Tiles(64, 32, 32, num_warps=8, num_stages=2, grad_width=256),
            programs=304,
        ),
    },
}
# what a program of the row-wise kernels takes: rows of a view, elements of each at a time
PAIRS = 16
ROW_DEPTH = 64


def cdiv(count: int, size: int) -> int:
    """Triton's own takes 3 us of the host, as a tenth of a launch: it serves kernels too."""
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The least that is not below ``count``, which is positive."""
    return 1 << (count - 1).bit_length()


def config_of(itemsize: int, configs: dict[str, dict[int, Config]] = CONFIGS) -> Config:
    """What the current device runs; GPUs of other families get sm_80's, which also fits their shared memory."""
    target = driver.active.get_current_target()
    if target.backend == "hip":
        return configs["gfx942"][itemsize]
    return configs[{9: "sm_90", 10: "sm_100"}.get(target.arch // 10, "sm_80")][itemsize]


@dataclass(frozen=True)
class _Packed:
    """Both views as the tile kernels read them."""

    z: torch.Tensor  # (2, padded, width)
    multiplier: torch.Tensor  # (2, padded), of z
    inverse_norm: torch.Tensor  # (2, padded)
    similarity: torch.Tensor  # (padded,), of the pairs
    sizes: dict[str, int]  # kernel arguments


def _pack(z0, z1, normalize, bf16_matmul, tiles: Tiles) -> _Packed:
    pairs, dim = z0.shape
    narrow = max(16, power_of_2(dim))
    step = min(narrow, max(tiles.depth, tiles.grad_width, ROW_DEPTH))
    padded, width = cdiv(pairs, tiles.block) * tiles.block, cdiv(dim, step) * step
    z = z0.new_empty((2, padded, width), dtype=torch.bfloat16 if bf16_matmul else z0.dtype)
    multiplier, inverse_norm = z.new_empty((2, 2, padded), dtype=torch.float32)
    similarity = z.new_empty(padded, dtype=torch.float32)
    sizes = {"N": pairs, "padded": padded, "D": dim, "WIDTH": width}

    def grid(meta):
        return (padded // meta["ROWS"],)

    _nt_xent_pack_kernel[grid](
        z0_ptr=z0, z1_ptr=z1, packed_ptr=z, multiplier_ptr=multiplier, inverse_norm_ptr=inverse_norm,
        similarity_ptr=similarity, **sizes, **_strides(z0, z1),
        NORMALIZE=normalize, ROWS=PAIRS, DEPTH=min(ROW_DEPTH, width),
    )  # fmt: skip
    return _Packed(z, multiplier, inverse_norm, similarity, sizes | {"DEPTH": min(tiles.depth, narrow)})


def _strides(z0, z1) -> dict[str, int]:
    return {
        "stride_z0n": z0.stride(0),
        "stride_z0d": z0.stride(1),
        "stride_z1n": z1.stride(0),
        "stride_z1d": z1.stride(1),
    }


def nt_xent_fwd(z0, z1, temperature, positive_weight, normalize, bounded, top1, bf16_matmul):
    """``sslkernels::nt_xent_fwd`` on a GPU: half the tiles and atomic sums where that is allowed, else all tiles."""
    if z0.shape[0] == 0 or z0.dtype == torch.float64:
        return reference.nt_xent_fwd(z0, z1, temperature, positive_weight, normalize, bounded, top1, bf16_matmul)
    triangle = bounded and not top1 and not torch.are_deterministic_algorithms_enabled()
    loss = temperature.new_empty(2 * z0.shape[0])
    positive, logsumexp = torch.empty_like(loss), torch.empty_like(loss, dtype=torch.float64)
    outputs = {"loss_ptr": loss, "logsumexp_ptr": logsumexp, "positive_ptr": positive}
    outputs |= _decoupling(positive_weight, temperature)
    top1_hit = z0.new_empty(0 if triangle else len(loss), dtype=torch.bool)
    with torch.cuda.device_of(z0):
        config = config_of(2 if bf16_matmul else z0.element_size())
        if triangle:
            packed = _pack(z0, z1, normalize, bf16_matmul, config.triangle)
            _launch_triangle(packed, temperature, outputs, config.triangle)
        else:
            packed = _pack(z0, z1, normalize, bf16_matmul, config.rows)
            _launch_rows(packed, temperature, outputs | {"top1_ptr": top1_hit}, config.rows)
    return loss, logsumexp, positive, top1_hit if top1 else top1_hit.new_empty(0)


def _decoupling(positive_weight, temperature) -> dict:
    """Kernel arguments; where there is no weight a pointer that is not read."""
    decoupled = positive_weight is not None
    weight = positive_weight.contiguous() if decoupled else temperature
    return {"positive_weight_ptr": weight, "decoupled": int(decoupled)}


def _launch_triangle(packed: _Packed, temperature, outputs: dict, tiles: Tiles) -> None:
    sums = torch.zeros_like(packed.multiplier)

    def grid(meta):
        blocks = 2 * meta["padded"] // meta["BLOCK"]
        return (blocks * (blocks + 1) // 2,)

    _nt_xent_fwd_triangle_kernel[grid](
        packed_ptr=packed.z, multiplier_ptr=packed.multiplier, temperature_ptr=temperature, sums_ptr=sums,
        **packed.sizes, BLOCK=tiles.block, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip

    def finish_grid(meta):
        return (cdiv(2 * meta["N"], meta["ROWS"]),)

    _nt_xent_fwd_finish_kernel[finish_grid](
        sums_ptr=sums, similarity_ptr=packed.similarity, temperature_ptr=temperature, **outputs,
        N=packed.sizes["N"], padded=packed.sizes["padded"], ROWS=128,
    )  # fmt: skip


def _launch_rows(packed: _Packed, temperature, outputs: dict, tiles: Tiles) -> None:
    def grid(meta):
        return (2 * meta["padded"] // meta["ROWS"],)

    _nt_xent_fwd_rows_kernel[grid](
        packed_ptr=packed.z, multiplier_ptr=packed.multiplier, temperature_ptr=temperature, **outputs,
        **packed.sizes, ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def nt_xent_bwd(
    grad_loss, z0, z1, temperature, positive_weight, loss, logsumexp, normalize, bounded, bf16_matmul
):  # fmt: skip
    """``sslkernels::nt_xent_bwd`` on a GPU: every program owns rows of the gradient, so there are no atomics."""
    if z0.shape[0] == 0 or z0.dtype == torch.float64:
        return reference.nt_xent_bwd(
            grad_loss, z0, z1, temperature, positive_weight, loss, logsumexp, normalize, bounded, bf16_matmul
        )
    grad_z0, grad_z1 = z0.new_empty(z0.shape), z1.new_empty(z1.shape)
    along = temperature.new_empty(2 * z0.shape[0])
    with torch.cuda.device_of(z0):
        config = config_of(2 if bf16_matmul else z0.element_size())
        tiles = config.backward if z0.shape[1] <= config.backward.grad_width else config.backward_wide
        packed = _pack(z0, z1, normalize, bf16_matmul, tiles)
        peak = torch.linalg.vector_norm(grad_loss, torch.inf)
        weight, shift = torch.empty_like(packed.multiplier), torch.empty_like(packed.multiplier)
        pull, grad_z = torch.empty_like(packed.similarity), torch.empty_like(packed.z, dtype=torch.float32)

        def weights_grid(meta):
            return (meta["padded"] // meta["ROWS"],)

        _nt_xent_bwd_weights_kernel[weights_grid](
            temperature_ptr=temperature, grad_loss_ptr=grad_loss, peak_ptr=peak, loss_ptr=loss.contiguous(),
            logsumexp_ptr=logsumexp.contiguous(), weight_ptr=weight, shift_ptr=shift, pull_ptr=pull,
            N=packed.sizes["N"], padded=packed.sizes["padded"], stride_grad_loss=grad_loss.stride(0),
            **_decoupling(positive_weight, temperature), BOUNDED=bounded, ROWS=tiles.block,
        )  # fmt: skip

        def grid(meta):
            return (2 * meta["padded"] // meta["ROWS"] * (meta["WIDTH"] // meta["GRAD_WIDTH"]),)

        _nt_xent_bwd_kernel[grid](
            packed_ptr=packed.z, multiplier_ptr=packed.multiplier, temperature_ptr=temperature, weight_ptr=weight,
            shift_ptr=shift, grad_z_ptr=grad_z, **packed.sizes, BOUNDED=bounded,
            GRAD_WIDTH=min(tiles.grad_width, packed.z.shape[2]), ROWS=tiles.rows, COLUMNS=tiles.columns,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip

        def finish_grid(meta):
            return (2 * meta["padded"] // meta["ROWS"],)

        _nt_xent_bwd_finish_kernel[finish_grid](
            z0_ptr=z0, z1_ptr=z1, grad_z_ptr=grad_z, inverse_norm_ptr=packed.inverse_norm,
            temperature_ptr=temperature, peak_ptr=peak, pull_ptr=pull, grad_z0_ptr=grad_z0, grad_z1_ptr=grad_z1,
            along_ptr=along, **_strides(z0, z1), **packed.sizes | {"DEPTH": ROW_DEPTH}, NORMALIZE=normalize, ROWS=PAIRS,
        )  # fmt: skip
    # the logits are quadratic in z: temperature dL/dtemperature = -sum_i z_i . dz_i / 2
    return grad_z0, grad_z1, along.sum() / (-2 * temperature)
