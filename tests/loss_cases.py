"""Loss modules with their inputs and with what they should compute."""

import loss_forms as forms
import torch

from sslkernels import nn as ours

N, D = 11, 6
SCALE, BIAS = torch.tensor(9.0), torch.tensor(-4.0)


def rows(*shape, seed=0, unit=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return forms.unit(x) if unit else x


def pair(unit=False):
    return rows(N, D, seed=1, unit=unit), rows(N, D, seed=2, unit=unit)


def squares(a, b):
    return ((a - b) ** 2).sum(dim=1)


def lopsided(a, b):
    return a[:, 0] + 2 * b[:, 1] ** 2


LABELS = torch.tensor([0, 1, 0, 2, 2, 0, 3, 1, 4, 4, 4])
MASK = (rows(N, N, seed=9) > 0.3).float() * torch.arange(1.0, N + 1)
PAIRS = [
    *(
        (f"nt_xent {t}", ours.NTXentLoss(t), lambda a, b, t=t: forms.nt_xent(a, b, t), pair())
        for t in (0.5, 0.05, -0.4)
    ),
    ("dcl", ours.DCLLoss(), lambda a, b: forms.dcl(a, b, 0.1), pair()),
    ("dcl squares", ours.DCLLoss(0.2, squares), lambda a, b: forms.dcl(a, b, 0.2, squares), pair()),
    ("dcl lopsided", ours.DCLLoss(0.2, lopsided), lambda a, b: forms.dcl(a, b, 0.2, lopsided), pair()),
    ("dclw", ours.DCLWLoss(), lambda a, b: forms.dcl(a, b, 0.1, forms.mises_fisher(0.5)), pair()),
    ("dclw sigma", ours.DCLWLoss(0.2, 0.9), lambda a, b: forms.dcl(a, b, 0.2, forms.mises_fisher(0.9)), pair()),
    ("info_nce", ours.InfoNCELoss(), forms.info_nce, pair()),
    ("info_nce queue", ours.InfoNCELoss(), forms.info_nce, (*pair(), rows(7, D))),
    ("info_nce paired", ours.InfoNCELoss(negative_mode="paired"), forms.info_nce, (*pair(), rows(N, 3, D))),
    ("clip", ours.ClipLoss(), forms.clip, (*pair(unit=True), SCALE)),
    ("clip bias", ours.ClipLoss(), forms.clip, (*pair(unit=True), SCALE, BIAS)),
    ("siglip", ours.SigLipLoss(), forms.siglip, (*pair(unit=True), SCALE, BIAS)),
]
