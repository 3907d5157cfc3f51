"""The networks of a step: `sample [B, C, H, W]`, `timestep [B]`, conditioning -> raw prediction."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.manifest import NetworkSpec
from engine.networks.network import Network


class Generator(Network):
    """Our GAN: `latent [B, Z]`, `label [B]` -> `image [B, C, H, W]`."""

    def call(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (self.module(inputs["latent"], inputs["label"]),)


class UNet2D(Network):
    """diffusers' `UNet2DModel`; `label [B]` where it has class embeddings."""

    def call(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        label = inputs.get("label")
        return (self.module(inputs["sample"], inputs["timestep"], label, return_dict=False)[0],)


class UNet2DCondition(Network):
    """diffusers' `UNet2DConditionModel` of Stable Diffusion 1, 2, XL and LCM.

    Inpainting checkpoints take `mask [B, 1, H, W]` and `masked_image [B, C, H, W]` (latents) beside
    the sample; LCM `timestep_cond [B, E]`; XL `text_embeds [B, D]` and `time_ids [B, 6]`.
    """

    def call(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        stacked = [inputs[name] for name in ("sample", "mask", "masked_image") if name in inputs]
        condition = inputs.get("timestep_cond")
        added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
        prediction = self.module(
            torch.cat(stacked, 1),
            inputs["timestep"],
            inputs["encoder_hidden_states"],
            timestep_cond=None if condition is None else condition.to(self.dtype),
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0]
        return (prediction,)


class PixArt(Network):
    """diffusers' `PixArtTransformer2DModel`, without the variance that it predicts too."""

    def __init__(self, module: nn.Module, spec: NetworkSpec) -> None:
        super().__init__(module, spec)
        self.module.pos_embed = _PatchEmbedding(self.module.pos_embed)
        for block in self.module.transformer_blocks:
            block.attn2.set_processor(_MaskedAttention())
        self.module.proj_out = _Unsqueezed(self.module.proj_out)

    def call(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        prediction = self.module(
            inputs["sample"],
            inputs["encoder_hidden_states"],
            timestep=inputs["timestep"],
            added_cond_kwargs={
                "resolution": inputs.get("resolution"),
                "aspect_ratio": inputs.get("aspect_ratio"),
            },
            encoder_attention_mask=inputs["encoder_attention_mask"],
            return_dict=False,
        )[0]
        return (prediction[:, : inputs["sample"].shape[1]],)


class _Unsqueezed(nn.Module):
    """A layer with a new axis 1, for the squeeze that follows: ONNX's fails where it has no 1."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, states: Tensor) -> Tensor:
        output: Tensor = self.layer(states)
        return output.unsqueeze(1)


class _MaskedAttention:
    """Attention to a text with padding; diffusers' own mask has a shape that does not export."""

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,  # [B, 1, S], added to the scores
    ) -> Tensor:
        query, key, value = (
            projection(states).unflatten(2, (attention.heads, -1)).transpose(1, 2)  # [B, H, S, D]
            for projection, states in (
                (attention.to_q, hidden_states),
                (attention.to_k, encoder_hidden_states),
                (attention.to_v, encoder_hidden_states),
            )
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attention_mask[:, None])
        output: Tensor = attention.to_out[0](mixed.transpose(1, 2).flatten(2))
        return output


class _PatchEmbedding(nn.Module):
    """diffusers' `PatchEmbed`, with the position embedding of any size computed in the graph."""

    def __init__(self, embed: Any) -> None:
        super().__init__()
        self.proj = embed.proj
        self.trained_size: float = embed.base_size / embed.interpolation_scale

    def forward(self, sample: Tensor) -> Tensor:
        patches: Tensor = self.proj(sample)  # [B, D, h, w]
        _, width, height_patches, width_patches = patches.shape
        rows = self._sines(height_patches, width // 2, sample.device)  # [h, D / 2]
        columns = self._sines(width_patches, width // 2, sample.device)  # [w, D / 2]
        grid = torch.cat(
            [
                columns[None].expand(height_patches, -1, -1),
                rows[:, None].expand(-1, width_patches, -1),
            ],
            -1,
        )
        embedded = patches.permute(0, 2, 3, 1) + grid.to(patches.dtype)
        return embedded.flatten(1, 2)

    def _sines(self, count: int, width: int, device: torch.device) -> Tensor:
        """[count, width] sines, then cosines, of positions on the trained grid."""
        positions = torch.arange(count, dtype=torch.float32, device=device)
        positions = positions * (self.trained_size / count)
        exponents = torch.arange(width // 2, dtype=torch.float32, device=device) / (width / 2)
        angles = positions[:, None] * torch.pow(10000.0, -exponents)[None]
        return torch.cat([angles.sin(), angles.cos()], -1)


class StableDiffusion3(Network):
    """diffusers' `SD3Transformer2DModel`."""

    def call(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        prediction = self.module(
            inputs["sample"],
            inputs["encoder_hidden_states"],
            inputs["pooled_projections"],
            inputs["timestep"],
            return_dict=False,
        )[0]
        return (prediction,)


class Flux(Network):
    """diffusers' `FluxTransformer2DModel`, from latents to latents: patches are packed inside."""

    def call(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        sample = inputs["sample"]
        height, width = sample.shape[2] // 2, sample.shape[3] // 2
        states = inputs["encoder_hidden_states"]
        prediction = self.module(
            _packed(sample),
            states,
            inputs["pooled_projections"],
            inputs["timestep"] / 1000,  # this transformer takes 0..1 and multiplies by 1000
            _positions(height, width, sample.device),
            torch.zeros(states.shape[1], 3, device=sample.device),
            inputs.get("guidance"),
            return_dict=False,
        )[0]
        return (_unpacked(prediction, height, width),)


def _packed(sample: Tensor) -> Tensor:
    """[B, C, 2 h, 2 w] to [B, h w, 4 C]."""
    batch, channels, height, width = sample.shape
    patches = sample.view(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(
        batch, (height // 2) * (width // 2), channels * 4
    )


def _unpacked(patches: Tensor, height: int, width: int) -> Tensor:
    """[B, h w, 4 C] to [B, C, 2 h, 2 w]."""
    batch, _, channels = patches.shape
    grid = patches.view(batch, height, width, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(batch, channels // 4, height * 2, width * 2)


def _positions(height: int, width: int, device: torch.device) -> Tensor:
    """[h w, 3] the image ids: 0, row, column of every patch."""
    rows = torch.arange(height, dtype=torch.float32, device=device)
    columns = torch.arange(width, dtype=torch.float32, device=device)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
    return torch.cat([torch.zeros_like(grid[..., :1]), grid], -1).reshape(height * width, 3)
