"""The selected variant against what its users could pick instead, in turns, on the same pictures.

    python -m benchmarks.selection CHECKPOINT ARTIFACT

For a class-conditional diffusion model. ARTIFACT was made with `vitrine export --auto`. Every peer
draws the same 64 pictures in batches of 8 with guidance, as its users call it: diffusers' scheduler
in a loop around the network. Writes `results/selection.json`.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from engine.artifact import read_artifact
from engine.json_files import write_json
from engine.machine import this_machine
from engine.manifest import Floors, ImageSpec
from engine.pipeline import Pipeline, open_artifact
from engine.quality import psnr_db, ssim
from engine.request import Request
from export.variant import installed_version

RESULT = Path(__file__).parent / "results" / "selection.json"
PICTURES, BATCH = 64, 8
FIRST_SEED = 5_000_000  # which neither calibration nor search nor the gate draws
Array = NDArray[np.float32]
Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Draw = Callable[[Sequence[Request]], list[Array]]  # pictures [H, W, C] in [0, 1]


class Peer:
    """A loop of diffusers around some runtime's network, as people write it."""

    def __init__(self, checkpoint: Path, pipeline: Pipeline, network: Network) -> None:
        self._scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(
            checkpoint, subfolder="scheduler"
        )
        self._model = pipeline.model
        self._network = network

    def __call__(self, requests: Sequence[Request]) -> list[Array]:
        """Pictures of one batch, all with the same steps and guidance."""
        image, scale = self._model.image, float(requests[0].guidance_scale or 1)
        shape = (1, image.channels, image.height, image.width)
        generators = (torch.Generator().manual_seed(request.seed) for request in requests)
        x = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        labels = torch.tensor([self._model.labels.index(r.label or "") for r in requests])
        both = torch.cat([labels, torch.full_like(labels, self._model.null_label or 0)])
        self._scheduler.set_timesteps(requests[0].num_inference_steps)
        for timestep in self._scheduler.timesteps:
            output = self._network(torch.cat([x, x]), timestep.float().expand(len(both)), both)
            conditional, unconditional = output.chunk(2)
            guided = unconditional + scale * (conditional - unconditional)
            x = self._scheduler.step(guided, timestep, x).prev_sample
        pictures: Array = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return list(pictures)


def _call(unet: Callable[..., Any]) -> Network:
    def network(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = unet(x, t, label, return_dict=False)[0]
        return output

    return network


def eager(checkpoint: Path) -> Network:
    """diffusers' own module."""
    unet = diffusers.UNet2DModel.from_pretrained(checkpoint, subfolder="unet").eval()
    return _call(unet)


def channels_last(checkpoint: Path) -> Network:
    """The same in the memory format that convolutions like."""
    unet = diffusers.UNet2DModel.from_pretrained(checkpoint, subfolder="unet").eval()
    unet.to(memory_format=torch.channels_last)
    return _call(unet)


def compiled(checkpoint: Path) -> Network:
    """The same, compiled for this shape."""
    unet = diffusers.UNet2DModel.from_pretrained(checkpoint, subfolder="unet").eval()
    return _call(torch.compile(unet))


def onnxruntime(graph: Path) -> Network:
    """A session with its defaults, but that idle threads sleep: spinning ones slow the others."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return lambda x, t, label: torch.from_numpy(session.run(None, _feed(x, t, label))[0])


def openvino(graph: Path, precision: str, image: ImageSpec | None = None) -> Network:
    """A compiled model; optimum-intel's default is dynamic, for one `image` it is static."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(graph)
    if image:
        sample = [2 * BATCH, image.channels, image.height, image.width]
        model.reshape({"sample": sample, "timestep": [2 * BATCH], "label": [2 * BATCH]})
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    return lambda x, t, label: torch.from_numpy(request.infer(_feed(x, t, label))[0].copy())


def _feed(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> dict[str, NDArray[np.generic]]:
    return {"sample": x.numpy(), "timestep": t.numpy(), "label": label.numpy()}


def ours(pipeline: Pipeline) -> Draw:
    """The pipeline of an artifact's variant."""
    return lambda requests: [pipeline.decode(row) for row in pipeline.run(requests, BATCH)]


def run(checkpoint: Path, artifact_path: Path) -> dict[str, object]:
    """Time and judge everybody."""
    artifact = read_artifact(artifact_path)
    selected = artifact.manifest.selected
    pipeline = open_artifact(artifact)
    graph = artifact_path / "graphs" / "fp32" / "unet.onnx"
    networks: dict[str, Network] = {
        "diffusers eager fp32": eager(checkpoint),
        "diffusers channels_last fp32": channels_last(checkpoint),
        "torch.compile fp32": compiled(checkpoint),
        "onnxruntime fp32": onnxruntime(graph),
        "openvino fp32": openvino(graph, "f32"),
        "openvino bf16": openvino(graph, "bf16"),
        "openvino bf16, reshaped by hand": openvino(graph, "bf16", pipeline.model.image),
    }
    draws: dict[str, Draw] = {
        name: Peer(checkpoint, pipeline, network) for name, network in networks.items()
    }
    draws[f"vitrine {selected}"] = ours(pipeline)
    with torch.inference_mode():
        seconds, pictures = _draw_all(draws, _batches(pipeline))
    return _result(selected, seconds, pictures, pipeline)


def _batches(pipeline: Pipeline) -> list[list[Request]]:
    model = pipeline.model
    assert model.defaults is not None
    requests = [
        Request(
            label=model.labels[index % len(model.labels)],
            seed=FIRST_SEED + index,
            num_inference_steps=model.defaults.num_inference_steps,
            guidance_scale=model.defaults.guidance_scale,
            sampler="dpmpp_2m",
        )
        for index in range(PICTURES)
    ]
    return [requests[start : start + BATCH] for start in range(0, PICTURES, BATCH)]


def _draw_all(
    draws: Mapping[str, Draw], batches: Sequence[Sequence[Request]]
) -> tuple[dict[str, list[float]], dict[str, list[Array]]]:
    """Every batch by everybody before the next one; the first is drawn once before, to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    pictures: dict[str, list[Array]] = {name: [] for name in draws}
    for draw in draws.values():
        draw(batches[0])
    for batch in batches:
        for name, draw in draws.items():
            started = time.perf_counter()
            drawn = draw(batch)
            seconds[name].append(time.perf_counter() - started)
            pictures[name] += drawn
    return seconds, pictures


def _result(
    selected: str,
    seconds: Mapping[str, list[float]],
    pictures: Mapping[str, list[Array]],
    pipeline: Pipeline,
) -> dict[str, object]:
    """Figures of everybody, and the two ratios of the selected variant, by rounds."""
    floors, own = Floors(), f"vitrine {selected}"
    rows = {name: _figures(name, seconds, pictures) for name in seconds}
    passing = {
        name: row["ms_per_picture"]
        for name, row in rows.items()
        if name not in (own, "openvino bf16, reshaped by hand")
        and row["psnr_db_min"] >= floors.psnr_db
        and row["ssim_mean"] >= floors.ssim
    }
    best = min(passing, key=lambda name: passing[name])
    defaults = pipeline.model.defaults
    assert defaults is not None
    return {
        "selected": selected,
        "over_eager": _ratio(seconds["diffusers eager fp32"], seconds[own]),
        "best_peer": best,
        "over_best_peer": _ratio(seconds[best], seconds[own]),
        "over_reshaped_bf16": _ratio(seconds["openvino bf16, reshaped by hand"], seconds[own]),
        "pictures": PICTURES,
        "batch": BATCH,
        "num_inference_steps": defaults.num_inference_steps,
        "guidance_scale": defaults.guidance_scale,
        "rows": rows,
        "machine": this_machine().model_dump(),
        "versions": {n: installed_version(n) for n in ("torch", "onnxruntime", "openvino")},
    }


def _figures(
    name: str, seconds: Mapping[str, list[float]], pictures: Mapping[str, list[Array]]
) -> dict[str, float]:
    pairs = list(zip(pictures["diffusers eager fp32"], pictures[name], strict=True))
    return {
        "ms_per_picture": round(1000 * statistics.median(seconds[name]) / BATCH, 2),
        "images_per_s": round(BATCH / statistics.median(seconds[name]), 2),
        "psnr_db_min": round(min(psnr_db(*pair) for pair in pairs), 1),
        "psnr_db_mean": round(statistics.fmean(psnr_db(*pair) for pair in pairs), 1),
        "ssim_mean": round(statistics.fmean(ssim(*pair) for pair in pairs), 5),
    }


def _ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Median over the rounds of one against the other."""
    return round(statistics.median(a / b for a, b in zip(slower, faster, strict=True)), 3)


if __name__ == "__main__":
    result = run(Path(sys.argv[1]), Path(sys.argv[2]))
    write_json(RESULT, result)
    print(json.dumps(result))
