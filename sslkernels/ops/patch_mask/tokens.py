"""Tokens picked by index, and put back where they came from."""

from __future__ import annotations

import torch

from sslkernels.ops.patch_mask import arguments, op


def gather_tokens(
    x: torch.Tensor, ids: torch.Tensor, *, num_prefix_tokens: int = 0, backend: str | None = None
) -> torch.Tensor:
    r"""Picks tokens of each sample by index.

    .. math:: y_{nk} = x_{n, \mathrm{ids}_{nk}}

    Equivalent PyTorch, for ``num_prefix_tokens=0``::

        x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))

    Args:
        x: (N, P + L, D) in float32, bfloat16, float16 or float64.
        ids: (N, K) integers in [0, L), which may repeat.
        num_prefix_tokens: P, the first tokens, which come first in the result and are not counted by ``ids``.
        backend: None for the fastest one (see `sslkernels.backends`), or "cpp", "cuda", "triton", "reference".

    Returns:
        (N, P + K, D), differentiable with respect to ``x``, to any order. The gradients of equal ids are added in
        float32 (float64 for float64), in a fixed order.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: ``backend`` is not available here; or, on a CPU, an id is out of range. On a GPU that gives a row
            of NaN.

    Cost: reads and writes (N, P + K, D) once; backward writes (N, P + L, D). Extra memory: none forward;
    backward, for the ids in the order of their tokens, 8 (K + L) bytes a sample on a CPU, at most a sort's on a GPU.
    """
    name = "gather_tokens"
    arguments.check_tokens(name, "x", x)
    prefix = arguments.prefix(name, num_prefix_tokens, x)
    ids = arguments.kept_ids(name, "ids", ids, x.shape[0], x.shape[1] - prefix, x.device)
    arguments.check_backend(name, backend, x.device.type)
    return op.family(backend).gather_tokens_fwd(x, ids, prefix)


def restore_tokens(
    x_kept: torch.Tensor,
    ids_restore: torch.Tensor,
    mask_token: torch.Tensor | None,
    pos_embed: torch.Tensor | None = None,
    *,
    num_prefix_tokens: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    r"""Puts kept tokens back in their places, mask tokens in all others, and adds the positional embedding.

    .. math:: y_{nt} = p_t + \begin{cases} x_{n, r_{nt}} & r_{nt} < K \\ m & \text{otherwise} \end{cases}

    Equivalent PyTorch, for ``num_prefix_tokens=0``::

        padded = torch.cat([x_kept, mask_token.expand(N, L - K, D)], dim=1)
        padded.gather(1, ids_restore[..., None].expand(-1, -1, D)) + pos_embed

    Args:
        x_kept: (N, P + K, D) in float32, bfloat16, float16 or float64.
        ids_restore: (N, L) integers, at least 0: the place of each token among the K kept ones, or K or more where it
            is removed. No place below K occurs twice in a row.
        mask_token: (D,) or (1, 1, D), or None for zeros, where a -0.0 of ``pos_embed`` may stay one or become 0.0.
        pos_embed: (P + L, D) or (1, P + L, D); or (L, D) or (1, L, D), which leaves the prefix alone; or None.
        num_prefix_tokens: P, the first tokens, which stay first and are not counted by ``ids_restore``.
        backend: None for the fastest one (see `sslkernels.backends`), or "cpp", "cuda", "triton", "reference".

    Returns:
        (N, P + L, D), in the dtype that PyTorch's addition of the arguments has. Differentiable with respect to
        ``x_kept``, ``mask_token`` and ``pos_embed``, to any order; their gradients are summed in float32 (float64 for
        float64), in a fixed order.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: ``backend`` is not available here; or, on a CPU, a place is negative or occurs twice. On a GPU a
            negative place gives a row of NaN.

    Source: He et al., Masked Autoencoders Are Scalable Vision Learners (2022), section 3.

    Cost: reads (N, P + K, D), writes (N, P + L, D); backward the reverse. No extra memory.
    """
    name = "restore_tokens"
    arguments.check_tokens(name, "x_kept", x_kept)
    prefix = arguments.prefix(name, num_prefix_tokens, x_kept)
    samples, kept, columns = x_kept.shape[0], x_kept.shape[1] - prefix, x_kept.shape[2]
    ids_restore = arguments.integers(name, "ids_restore", ids_restore, (samples, None), x_kept.device)
    tokens = ids_restore.shape[1]
    if kept > tokens:
        raise ValueError(
            f"{name}: ids_restore must have at least as many columns as there are kept tokens, {kept}, got {tokens}"
        )
    dtype = x_kept.dtype
    if mask_token is not None:
        mask_token = arguments.vector(name, "mask_token", mask_token, columns, x_kept.device)
        dtype = torch.promote_types(dtype, mask_token.dtype)
    if pos_embed is not None:
        pos_embed = arguments.embedding(name, pos_embed, (prefix + tokens, tokens), columns, x_kept.device)
        dtype = torch.promote_types(dtype, pos_embed.dtype)
    arguments.check_backend(name, backend, x_kept.device.type)
    mask_token, pos_embed = (None if tensor is None else tensor.to(dtype) for tensor in (mask_token, pos_embed))
    return op.family(backend).restore_tokens_fwd(x_kept.to(dtype), ids_restore, mask_token, pos_embed, prefix)
