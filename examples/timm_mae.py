"""A masked autoencoder around a ViT of timm, in plain PyTorch and with sslkernels: the same loss from the same noise.

    python examples/timm_mae.py

What changes is the bodies of three methods.
"""

from __future__ import annotations

import copy

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

import sslkernels


class MaskedAutoencoder(nn.Module):
    """As one writes it."""

    def __init__(self, encoder: VisionTransformer, mask_ratio: float = 0.75, dim: int = 32, depth: int = 1):
        super().__init__()
        patches = encoder.patch_embed.num_patches
        self.encoder, self.mask_ratio = encoder, mask_ratio
        self.patch_size = encoder.patch_embed.patch_size[0]
        self.narrow = nn.Linear(encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + patches, dim) * 0.02)
        self.decoder = nn.Sequential(*(Block(dim, num_heads=2) for _ in range(depth)), nn.LayerNorm(dim))
        self.pixels = nn.Linear(dim, encoder.patch_embed.proj.weight[0].numel())

    def mask(self, tokens, noise):
        """(N, 1 + L, D) with a class token -> (N, 1 + K, D), mask (N, L), ids_restore (N, L)."""
        samples, length, dim = tokens.shape
        kept = int((length - 1) * (1 - self.mask_ratio))
        order = noise.argsort(dim=1)
        ids_restore = order.argsort(dim=1)
        mask = torch.ones(samples, length - 1, device=tokens.device)
        mask[:, :kept] = 0
        patches = tokens[:, 1:].gather(1, order[:, :kept, None].expand(-1, -1, dim))
        return torch.cat([tokens[:, :1], patches], dim=1), mask.gather(1, ids_restore), ids_restore

    def restore(self, tokens, ids_restore):
        """(N, 1 + K, D) -> (N, 1 + L, D)"""
        samples, length, dim = tokens.shape
        missing = self.mask_token.expand(samples, 1 + ids_restore.shape[1] - length, -1)
        patches = torch.cat([tokens[:, 1:], missing], dim=1)
        patches = patches.gather(1, ids_restore[:, :, None].expand(-1, -1, dim))
        return torch.cat([tokens[:, :1], patches], dim=1) + self.pos_embed

    def loss(self, pred, images, mask):
        """Normalised pixels, masked patches."""
        samples, channels, height, width = images.shape
        p = self.patch_size
        target = images.reshape(samples, channels, height // p, p, width // p, p)
        target = target.permute(0, 2, 4, 3, 5, 1).reshape(pred.shape)
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1e-6).sqrt()
        rows = (pred - target).square().mean(dim=-1)
        return (rows * mask).sum() / mask.sum()

    def forward(self, images, noise):
        encoder = self.encoder
        tokens = encoder._pos_embed(encoder.patch_embed(images))
        tokens, mask, ids_restore = self.mask(tokens, noise)
        tokens = self.narrow(encoder.norm(encoder.blocks(encoder.norm_pre(tokens))))
        pred = self.pixels(self.decoder(self.restore(tokens, ids_restore)))
        return self.loss(pred[:, 1:], images, mask)


class FusedMaskedAutoencoder(MaskedAutoencoder):
    """The same with sslkernels. In place of ``scores=noise``, a seed and the samples' ids make masks reproducible."""

    def mask(self, tokens, noise):
        kept = sslkernels.random_masking(tokens, self.mask_ratio, num_prefix_tokens=1, scores=noise)
        return kept.x_kept, kept.mask, kept.ids_restore

    def restore(self, tokens, ids_restore):
        return sslkernels.restore_tokens(tokens, ids_restore, self.mask_token, self.pos_embed, num_prefix_tokens=1)

    def loss(self, pred, images, mask):
        return sslkernels.masked_patch_loss(pred, images, mask, self.patch_size)


def pair() -> tuple[MaskedAutoencoder, FusedMaskedAutoencoder]:
    """Both, with the same weights."""
    encoder = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=0)
    model, fused = MaskedAutoencoder(encoder), FusedMaskedAutoencoder(copy.deepcopy(encoder))
    fused.load_state_dict(model.state_dict())
    return model, fused


def main() -> None:
    torch.manual_seed(0)
    images, noise = torch.randn(8, 3, 32, 32), torch.rand(8, 64)
    for name, model in zip(("plain PyTorch", "sslkernels"), pair(), strict=True):
        print(f"{name:14s} loss {model(images, noise).item():.6f}")


if __name__ == "__main__":
    main()
