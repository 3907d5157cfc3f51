"""The requests that variants are calibrated with and judged by."""

import numpy as np

from engine.images import Picture
from engine.manifest import Defaults, ModelSpec
from engine.request import Request

# Each use has seeds of its own: no picture is judged that calibration or the search has seen.
CALIBRATION_SEED = 1_000_000
SEARCH_SEED = 2_000_000
PROMPTS = (
    "a red leather shoe on a white background",
    "a person wearing a green coat, studio photo",
    "a blue bag",
    "",
)


def gate_requests(
    model: ModelSpec, count: int, size: tuple[int, int] | None = None, first_seed: int = 0
) -> list[Request]:
    """Requests over seeds, and with them over labels or prompts, samplers, 4..30 steps, guidance.

    Every fourth is the model's default request; the others go through all pairs of sampler and
    guidance. Models that repaint get a picture and a mask made here. `size`: of a build that makes
    one only.
    """
    seeds = range(first_seed, first_seed + count)
    return [Request.of(_gate_request(model, seed, size)) for seed in seeds]


def _gate_request(model: ModelSpec, seed: int, size: tuple[int, int] | None) -> dict[str, object]:
    values: dict[str, object] = {"seed": seed}
    if model.labels:
        values["label"] = model.labels[(seed + seed // len(model.labels)) % len(model.labels)]
    if model.tokenizers:
        values["prompt"] = PROMPTS[seed % len(PROMPTS)]
    height, width = size or (model.image.height, model.image.width)
    if size:
        values |= {"height": height, "width": width}
    if model.takes_image == "with mask":
        values["image"] = _gradient(height, width)
        values["mask"] = np.zeros((height, width, 1), np.uint8)
        values["mask"][height // 4 : height // 2, width // 4 :] = 255  # type: ignore[index]
    elif model.takes_image == "optional" and seed % 3 == 2:  # the VAE's encoder is judged too
        values |= {"image": _gradient(height, width), "strength": 0.6}
    if model.defaults is None:
        return values
    default = model.defaults.model_dump(exclude={"strength"})
    return {**values, **(_varied(model, model.defaults, seed) if seed % 4 else default)}


def _varied(model: ModelSpec, defaults: Defaults, seed: int) -> dict[str, object]:
    """Sampler, guidance and steps of a request that is not the model's default one."""
    index = seed - seed // 4 - 1  # 0, 1, 2 ... of the seeds that 4 does not divide
    turn, sampler = divmod(index, len(model.samplers))
    scales = (1.0, 2.0, 3.5, max(5.0, defaults.guidance_scale))
    return {
        "num_inference_steps": 4 + 7 * index % 27,
        "guidance_scale": 1.0 if model.guidance == "none" else scales[(sampler + turn) % 4],
        "sampler": model.samplers[sampler],
    }


def _gradient(height: int, width: int) -> Picture:
    rows, columns = np.linspace(0, 255, height), np.linspace(0, 255, width)
    red, green = np.meshgrid(rows, columns, indexing="ij")
    picture: Picture = np.stack([red, green, 255 - red], -1).astype(np.uint8)
    return picture
