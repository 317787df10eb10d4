"""The one way in which tests compare numbers: as exact as PyTorch in the same dtype, up to a stated tolerance."""

from __future__ import annotations

import torch

from sslkernels import numerics as rule


def assert_as_exact_as_eager(name, actual, eager, exact, dtype: torch.dtype | None = None, **scale) -> None:
    """Fail unless ``actual`` is as close to ``exact`` (fp64) as ``eager`` is; see `sslkernels.numerics.compare`.

    ``dtype`` is the dtype of the inputs, by default that of ``eager``.
    """
    comparison = rule.compare(name, actual, eager, exact, dtype or eager.dtype, **scale)
    assert comparison.passed, str(comparison)


def assert_op_close(spec, case, dtype: torch.dtype, device: str = "cpu", backend: str | None = None) -> None:
    """Fail unless value and gradients of ``case`` are as exact as eager, showing every comparison that is not."""
    failed = [c for c in rule.compare_case(spec, case, dtype, device, backend) if not c.passed]
    shown = "\n".join(map(str, failed))
    assert not failed, f"{spec.name}, {dtype}, {backend or 'default'} backend:\n{shown}"
