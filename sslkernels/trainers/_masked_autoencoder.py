"""MAE's model: a ViT of timm that sees some patches of an image, and a thin decoder that predicts the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

import sslkernels

HEAD_DIM = 16  # of the decoder's attention
WAVES = 20.0  # the longest wave of positions over the shortest: small grids need no longer ones


class MaskedAutoencoder(nn.Module):
    """``forward(images, seed, sample_ids)``: predicted patches (N, L, p * p * C) in MAE's order, and the mask (N, L).

    The masks are a function of the seed and of each image's own id.
    """

    encoder: VisionTransformer
    positions: torch.Tensor

    def __init__(self, encoder: VisionTransformer, mask_ratio: float, dim: int, depth: int, ops: str):
        super().__init__()
        self.encoder = encoder
        self.mask_ratio = mask_ratio
        self.backend = "reference" if ops == "reference" else None
        self.prefix = encoder.num_prefix_tokens
        patches = encoder.patch_embed
        self.narrow = nn.Linear(encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.register_buffer("positions", torch.empty(patches.num_patches, dim))
        blocks = (Block(dim, num_heads=dim // HEAD_DIM, qkv_bias=True) for _ in range(depth))
        self.decoder = nn.Sequential(*blocks, nn.LayerNorm(dim))
        self.pixels = nn.Linear(dim, patches.proj.weight[0].numel())
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """As in MAE, with fixed positions. timm's initialisation is for wide layers; narrow ones would learn slowly."""
        patches = self.encoder.patch_embed
        linear = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        for weight in (*linear, patches.proj.weight.flatten(1)):
            nn.init.xavier_uniform_(weight)
        nn.init.normal_(self.mask_token, std=0.02)
        for positions in (self.encoder.pos_embed[0, -patches.num_patches :], self.positions):
            positions.copy_(build_sincos2d_pos_embed(patches.grid_size, positions.shape[1], temperature=WAVES))
        self.encoder.pos_embed.requires_grad_(False)

    def forward(
        self, images: torch.Tensor, seed: int, sample_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        encoder = self.encoder
        tokens = encoder._pos_embed(encoder.patch_embed(images))
        kept = sslkernels.random_masking(
            tokens, self.mask_ratio, num_prefix_tokens=self.prefix, seed=seed, sample_ids=sample_ids,
            backend=self.backend,
        )  # fmt: skip
        tokens = self.narrow(encoder.norm(encoder.blocks(encoder.norm_pre(kept.x_kept))))
        tokens = sslkernels.restore_tokens(
            tokens, kept.ids_restore, self.mask_token, self.positions, num_prefix_tokens=self.prefix,
            backend=self.backend,
        )  # fmt: skip
        return self.pixels(self.decoder(tokens)[:, self.prefix :]), kept.mask


def patches_of(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(N, C, H, W) -> (N, L, p * p * C), in MAE's order."""
    columns = F.unfold(images, patch_size, stride=patch_size)
    return columns.unflatten(1, (images.shape[1], -1)).transpose(1, 3).flatten(2)


def images_of(patches: torch.Tensor, patch_size: int, size: torch.Size | tuple[int, int]) -> torch.Tensor:
    """The images (N, C, H, W) that have these patches."""
    columns = patches.unflatten(2, (patch_size**2, -1)).transpose(1, 3).flatten(1, 2)
    return F.fold(columns, size, patch_size, stride=patch_size)


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, images: torch.Tensor, norm_pix: bool, seed: int) -> torch.Tensor:
    """The images, what the encoder sees of them, and that with the predicted patches: (3, N, C, H, W).

    Under ``norm_pix`` a prediction says nothing of a patch's mean and deviation: those are then the original's.
    """
    patch_size = model.encoder.patch_embed.patch_size[0]
    pred, mask = model(images, seed, None)
    target = patches_of(images, patch_size)
    if norm_pix:
        pred = pred * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)
    seen = target.masked_fill(mask[..., None], 0)
    whole = torch.where(mask[..., None], pred.to(target.dtype), target)
    return torch.stack([images, *(images_of(p, patch_size, images.shape[-2:]) for p in (seen, whole))])
