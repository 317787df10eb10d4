"""Supervised contrastive loss whose positives are a mask over samples rather than labels."""

from __future__ import annotations

import torch

from sslkernels.ops.infonce import arguments
from sslkernels.ops.infonce import contrast as core

NAME = "masked_sup_con"
NO_POSITIVES = 1e-6  # a row of the mask that sums to less has none, as in the SupContrast repository


def masked_sup_con(
    features: torch.Tensor, mask: torch.Tensor, temperature: float | torch.Tensor = 0.07, *, backend: str | None = None
) -> torch.Tensor:
    r"""The (V, N) losses of V views of N samples, whose positives have the weights ``mask`` (N, N), symmetric or not.

    With :math:`a = (i, v)` view v of sample i, and :math:`w_{ab} = m_{ij}` for :math:`b = (j, u) \ne a`:

    .. math:: \ell_a = - \frac{1}{\sum_b w_{ab}} \sum_b w_{ab}
              \log \frac{\exp(z_a \cdot z_b / \tau)}{\sum_{c \ne a} \exp(z_a \cdot z_c / \tau)}

    A view without positives has a loss of 0. Rows are taken as they are: normalise them first.

    Args:
        features: (V, N, D) embeddings; float32, bfloat16, float16 or float64. D >= 1.
        mask: (N, N) numbers or bools without grad, on the device of ``features``.
        temperature: nonzero; a float, or a floating-point tensor of one element, which may require grad.
        backend: as for `sslkernels.sup_con`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Source: Khosla et al., Supervised Contrastive Learning (2020), equation 2.

    Cost: that of `sslkernels.sup_con` over V N rows, and N^2 D flops on the mask.
    """
    arguments.check_matrix(NAME, "features", features, "(V, N, D)", dims=3)
    views, samples, dim = features.shape
    _check_mask(mask, samples, features.device)
    tau = arguments.temperature(NAME, temperature, features)
    arguments.check_backend("sup_con", backend, features.device.type)
    (z,), matmul = core.rows_of(features.reshape(views * samples, dim), normalize=False)
    scale = tau.tensor.reciprocal()
    scale_value = None if tau.value is None else 1 / tau.value
    found = core.contrast(z, None, scale, scale_value=scale_value, matmul=matmul, backend=backend)

    exact, weights = z.double().reshape(views, samples, dim), mask.double()  # autocast leaves float64 alone
    own = weights.diagonal()
    sums = weights @ exact.sum(dim=0) - own[:, None] * exact
    counts = (views * weights.sum(dim=1) - own).repeat(views)
    divisors = torch.where(counts < NO_POSITIVES, 1.0, counts)
    positive = core.positive_logits(exact.reshape(z.shape), sums.reshape(z.shape) / divisors[:, None], scale)
    rows = torch.where(counts != 0, found.rows, 0.0) * (counts / divisors) - positive
    return rows.reshape(views, samples).to(scale.dtype)


def _check_mask(mask, samples: int, device: torch.device) -> None:
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{NAME}: mask must be a tensor, got {type(mask).__name__}")
    arguments.check_strided(NAME, "mask", mask)
    if mask.shape != (samples, samples):
        raise ValueError(f"{NAME}: mask must be {(samples, samples)}, got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{NAME}: mask must be on the device of features, {device}, got {mask.device}")
    if mask.requires_grad or mask.is_complex():
        raise ValueError(f"{NAME}: mask must hold real numbers and require no grad")
