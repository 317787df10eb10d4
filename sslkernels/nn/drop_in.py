"""`EMATeacher` with the defaults and the argument order of the teachers that it replaces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sslkernels.nn import ema_peers
from sslkernels.nn.ema import EMATeacher
from sslkernels.nn.momentum import EqualMomentum


class ModelEmaV3(EMATeacher):
    """In place of ``timm.utils.ModelEmaV3``.

    Where it differs: tensors are matched by name, tied parameters are updated once, buffers that are not in the
    ``state_dict`` are copied, float16 is rounded stochastically like bfloat16, updates without ``step`` are counted
    where warm-up or delay is asked for, which timm ignores then, and ``get_decay()`` is that of the next update.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
    ):
        super().__init__(
            model,
            decay=decay,
            min_decay=min_decay,
            update_after_step=update_after_step,
            use_warmup=use_warmup,
            warmup_gamma=warmup_gamma,
            warmup_power=warmup_power,
            device=device,
            dtype=dtype,
            stochastic_rounding_seed=stochastic_rounding_seed if stochastic_rounding else None,
            foreach=foreach,
            exclude_buffers=exclude_buffers,
        )


class AveragedModel(EMATeacher):
    """In place of ``torch.optim.swa_utils.AveragedModel``: the plain mean unless an averaging function is given.

    Where it differs: the average requires no grad, tensors are matched by name, integer buffers are copied rather than
    averaged, and averaging functions are those that ``torch.optim.swa_utils`` makes.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | int | None = None,
        avg_fn: Callable | None = None,
        multi_avg_fn: Callable | None = None,
        use_buffers: bool = False,
    ):
        average = ema_peers.averaging(avg_fn, multi_avg_fn) or EqualMomentum()
        super().__init__(model, average, device=device, use_buffers=use_buffers)
        self.train(model.training)

    # update_bn puts the average into training mode, and has to
    train = nn.Module.train
