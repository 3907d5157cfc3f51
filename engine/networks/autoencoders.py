"""The two halves of a VAE, each a network of its own."""

from torch import Tensor

from engine.networks.network import Network


class Encoder(Network):
    """`image [B, 3, H, W]` in [-1, 1] -> what the latents are drawn from.

    `AutoencoderKL`: `moments [B, 2 C, h, w]`, mean and log variance; `AutoencoderTiny`: `latents
    [B, C, h, w]`.
    """

    def call(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        encoded = self.module.encode(inputs["image"], return_dict=False)[0]
        return (encoded if isinstance(encoded, Tensor) else encoded.parameters,)


class Decoder(Network):
    """`latents [B, C, h, w]` -> `image [B, 3, H, W]` in [-1, 1], not clipped."""

    def call(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (self.module.decode(inputs["latents"], return_dict=False)[0],)
