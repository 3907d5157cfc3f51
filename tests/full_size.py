"""Export one full-size network, run it, and print what that took; see test_full_size.py."""

import json
import resource
import sys
from pathlib import Path

import diffusers
import numpy as np
import onnxruntime
import torch

from engine.families.parts import tensor
from engine.manifest import NetworkSpec
from engine.networks.autoencoders import Decoder
from engine.networks.denoisers import UNet2DCondition
from engine.networks.network import Network
from export.onnx import export_network

# The values of the public configs; the rest are diffusers' defaults.
UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 768,
    "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
}  # fmt: skip
VAE = {
    "sample_size": 512, "latent_channels": 4, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def build(name: str) -> tuple[Network, dict[str, torch.Tensor]]:
    """The network with random weights in fp32, and inputs for a picture of 512x512."""
    torch.manual_seed(0)
    sample = torch.randn(1, 4, 64, 64)
    if name == "vae_decoder":
        vae = diffusers.AutoencoderKL(**VAE)
        vae.encoder = vae.quant_conv = None
        image = tensor("image", 3, "8*height", "8*width")
        latents = tensor("latents", 4, "height", "width")
        spec = NetworkSpec(inputs=(latents,), outputs=(image,))
        return Decoder(vae.eval().requires_grad_(False), spec), {"latents": sample}
    unet = diffusers.UNet2DConditionModel(**UNET).eval().requires_grad_(False)
    size = "8*height", "8*width"
    spec = NetworkSpec(
        inputs=(
            tensor("sample", 4, *size),
            tensor("timestep"),
            tensor("encoder_hidden_states", 77, 768),
        ),
        outputs=(tensor("prediction", 4, *size),),
    )
    text = torch.randn(1, 77, 768)
    feed = {"sample": sample, "timestep": torch.tensor([500.0]), "encoder_hidden_states": text}
    return UNet2DCondition(unet, spec), feed


def main(name: str, precision: str, folder: Path) -> None:
    network, feed = build(name)
    parameters = sum(weights.numel() for weights in network.parameters())
    with torch.inference_mode():
        (reference,) = network(*feed.values())
    if precision == "fp16":
        network = type(network)(network.module.half(), network.spec)
    export_network(network, folder / "network.onnx")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del network
    session = onnxruntime.InferenceSession(str(folder / "network.onnx"))
    (output,) = session.run(None, {key: value.numpy() for key, value in feed.items()})
    expected = reference.numpy()
    report = {
        "parameters": parameters,
        "peak_gib": round(peak / 2**20, 2),
        "difference": float(np.abs(output - expected).max() / np.abs(expected).max()),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
