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
from engine.networks.load import load_network
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


def save(name: str, folder: Path) -> tuple[NetworkSpec, dict[str, torch.Tensor]]:
    """A checkpoint's folder with random fp32 weights, and inputs for a picture of 512x512."""
    torch.manual_seed(0)
    sample = torch.randn(1, 4, 64, 64)
    if name == "vae_decoder":
        component, network = "vae", diffusers.AutoencoderKL(**VAE)
        image = tensor("image", 3, "8*height", "8*width")
        latents = tensor("latents", 4, "height", "width")
        spec, feed = NetworkSpec(inputs=(latents,), outputs=(image,)), {"latents": sample}
    else:
        component, network = "unet", diffusers.UNet2DConditionModel(**UNET)
        states = tensor("encoder_hidden_states", 77, 768)
        noisy = tensor("sample", 4, "8*height", "8*width")
        spec = NetworkSpec(
            inputs=(noisy, tensor("timestep"), states),
            outputs=(tensor("prediction", 4, "8*height", "8*width"),),
        )
        feed = {"sample": sample, "timestep": torch.tensor([500.0])}
        feed["encoder_hidden_states"] = torch.randn(1, 77, 768)
    network.save_pretrained(folder / component)
    index = {component: ["diffusers", type(network).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return spec, feed


def main(action: str, name: str, precision: str, folder: Path) -> None:
    """`save` the checkpoint and torch's answer; `export` it, alone in a process; `compare`."""
    if action == "save":
        spec, feed = save(name, folder)
        network = load_network(folder, name, spec)
        with torch.inference_mode():
            (reference,) = network(*feed.values())
        np.savez(folder / "feed.npz", **{key: value.numpy() for key, value in feed.items()})
        np.save(folder / "reference.npy", reference.numpy())
        (folder / "spec.json").write_text(spec.model_dump_json())
        return
    if action == "export":
        spec = NetworkSpec.model_validate_json((folder / "spec.json").read_text())
        network = load_network(folder, name, spec, precision)  # type: ignore[arg-type]
        export_network(network, folder / f"{precision}.onnx")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        parameters = sum(weights.numel() for weights in network.parameters())
        print(json.dumps({"peak_gib": round(peak / 2**20, 2), "parameters": parameters}))
        return
    session = onnxruntime.InferenceSession(str(folder / f"{precision}.onnx"))
    (output,) = session.run(None, dict(np.load(folder / "feed.npz")))
    expected = np.load(folder / "reference.npy")
    difference = float(np.abs(output - expected).max() / np.abs(expected).max())
    print(json.dumps({"difference": difference}))


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
