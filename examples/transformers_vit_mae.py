"""Hugging Face's ViTMAEForPreTraining with sslkernels: the same weights, and the same loss from the same noise.

    python examples/transformers_vit_mae.py

Three methods are overridden. Names in the state dict stay, so ``FusedViTMAE.from_pretrained("facebook/vit-mae-base")``
loads what the original loads. Needs transformers 5.
"""

from __future__ import annotations

import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import (
    ViTMAEDecoder,
    ViTMAEDecoderOutput,
    ViTMAEEmbeddings,
    ViTMAEForPreTrainingOutput,
)

import sslkernels
from sslkernels.compat import mae


class FusedEmbeddings(ViTMAEEmbeddings):
    seed = sample_ids = None  # set both before a step for masks that depend on nothing else

    def random_masking(self, sequence, noise=None):
        drawn = {"seed": self.seed, "sample_ids": self.sample_ids} if noise is None else {"scores": noise}
        return mae.random_masking(sequence, self.config.mask_ratio, **drawn)


class FusedDecoder(ViTMAEDecoder):
    def forward(self, hidden_states, ids_restore, interpolate_pos_encoding=False):
        if interpolate_pos_encoding:
            return super().forward(hidden_states, ids_restore, interpolate_pos_encoding)
        hidden_states = sslkernels.restore_tokens(
            self.decoder_embed(hidden_states), ids_restore, self.mask_token, self.decoder_pos_embed, num_prefix_tokens=1
        )
        for layer in self.decoder_layers:
            hidden_states = layer(hidden_states)
        return ViTMAEDecoderOutput(logits=self.decoder_pred(self.decoder_norm(hidden_states))[:, 1:])


class FusedViTMAE(ViTMAEForPreTraining):
    def __init__(self, config: ViTMAEConfig):
        super().__init__(config)
        self.vit.embeddings = FusedEmbeddings(config)
        self.decoder = FusedDecoder(config, num_patches=self.vit.embeddings.patch_embeddings.num_patches)
        self.post_init()

    def forward(self, pixel_values, noise=None, interpolate_pos_encoding=False, **kwargs):
        encoded = self.vit(pixel_values, noise=noise, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        logits = self.decoder(encoded.last_hidden_state, encoded.ids_restore, interpolate_pos_encoding).logits
        loss = sslkernels.masked_patch_loss(
            logits, pixel_values, encoded.mask, self.config.patch_size, norm_pix=self.config.norm_pix_loss
        )
        return ViTMAEForPreTrainingOutput(
            loss=loss, logits=logits, mask=encoded.mask, ids_restore=encoded.ids_restore,
            hidden_states=encoded.hidden_states, attentions=encoded.attentions,
        )  # fmt: skip


def pair() -> tuple[ViTMAEForPreTraining, FusedViTMAE]:
    """Both, with the same weights."""
    config = ViTMAEConfig(
        image_size=32, patch_size=4, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=64, norm_pix_loss=True,
    )  # fmt: skip
    model, fused = ViTMAEForPreTraining(config), FusedViTMAE(config)
    fused.load_state_dict(model.state_dict())
    return model, fused


def main() -> None:
    torch.manual_seed(0)
    images, noise = torch.randn(8, 3, 32, 32), torch.rand(8, 64)
    for name, model in zip(("transformers", "sslkernels"), pair(), strict=True):
        print(f"{name:14s} loss {model(images, noise=noise).loss.item():.6f}")


if __name__ == "__main__":
    main()
