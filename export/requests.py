"""The requests that variants are calibrated with and judged by."""

import numpy as np

from engine.images import Picture
from engine.manifest import ModelSpec
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
    """Requests over seeds, and with them over labels or prompts, samplers and 4..30 steps.

    Every fourth is the model's default request, and all have its guidance scale: more of it
    multiplies whatever a variant is off by. Models that repaint get a picture and a mask made
    here. `size`: of a build that makes one only.
    """
    seeds = range(first_seed, first_seed + count)
    return [Request.of(_request(model, seed, size)) for seed in seeds]


def varied_requests(
    model: ModelSpec, count: int, size: tuple[int, int] | None = None, first_seed: int = 0
) -> list[Request]:
    """As `gate_requests`, over guidance scales from none to the most that users ask for."""
    requests = gate_requests(model, count, size, first_seed)
    if model.defaults is None or model.guidance == "none":
        return requests
    default = model.defaults.guidance_scale
    scales = (default, 1.0, 3.5, max(5.0, default))
    return [
        request.model_copy(update={"guidance_scale": scales[request.seed // 9 % 4]})
        for request in requests
    ]


def _request(model: ModelSpec, seed: int, size: tuple[int, int] | None) -> dict[str, object]:
    values: dict[str, object] = {"seed": seed}
    if model.labels:
        values["label"] = model.labels[(seed + seed // len(model.labels)) % len(model.labels)]
    if model.tokenizers:
        values["prompt"] = PROMPTS[(seed + seed // len(PROMPTS)) % len(PROMPTS)]
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
    values |= model.defaults.model_dump(exclude={"strength"})
    if seed % 4:
        index = seed - seed // 4 - 1  # 0, 1, 2 ... of the seeds that 4 does not divide
        values["num_inference_steps"] = 4 + 7 * index % 27
        values["sampler"] = model.samplers[index % len(model.samplers)]
    return values


def _gradient(height: int, width: int) -> Picture:
    rows, columns = np.linspace(0, 255, height), np.linspace(0, 255, width)
    red, green = np.meshgrid(rows, columns, indexing="ij")
    picture: Picture = np.stack([red, green, 255 - red], -1).astype(np.uint8)
    return picture
