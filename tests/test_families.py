"""Every family, exported: the pictures of diffusers' own pipelines, for any mixture of requests."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import BUILDERS, save

from engine.errors import OptionError
from engine.images import to_pillow
from engine.pipeline import Pipeline, open_pipeline
from engine.quality import psnr_db
from engine.request import Request
from export.build import export
from export.lint import lint

# The floor is 50 dB. Both sides compute in float32 with other kernels: 115 to 152 dB were
# measured, so a wrong token, sigma or scaling, which costs 30 dB and more, cannot hide.
FLOOR_DB = 100.0

pytestmark = pytest.mark.usefixtures("one_torch_thread")

DISCRETE = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
}
SIZE, OTHER_SIZE = {"height": 32, "width": 32}, {"height": 64, "width": 32}


@dataclass(frozen=True)
class Case:
    """What a family is asked for, in Request's words; the last one in another picture size."""

    samplers: tuple[str, ...]
    guidance: tuple[float, ...] = (5.0, 1.0, 3.0, 7.5)  # on and off
    negative: bool = True
    sized: bool = True

    def requests(self) -> list[dict[str, object]]:
        prompts = ("a red shoe", "green coat with buttons", "blue bag, leather", "A white Sneaker ")
        return [
            {
                "prompt": prompt,
                "seed": seed,
                "num_inference_steps": 4 + seed,
                "guidance_scale": guidance,
                "sampler": self.samplers[seed % len(self.samplers)],
                **({"negative_prompt": "small"} if self.negative and seed == 2 else {}),
                **(OTHER_SIZE if seed == 3 else SIZE),
            }
            for seed, (prompt, guidance) in enumerate(zip(prompts, self.guidance, strict=True))
        ]


CASES = {
    "stable-diffusion": Case(("ddim", "dpmpp_2m", "euler_ancestral", "heun")),
    "stable-diffusion-2": Case(("ddim", "euler")),
    "inpainting": Case(("euler", "ddim")),
    "lcm": Case(("lcm", "ddim"), negative=False),
    "stable-diffusion-xl": Case(("euler", "dpmpp_2m", "ddim")),
    "pixart-alpha": Case(("dpmpp_2m", "euler")),
    "pixart-sigma": Case(("dpmpp_2m", "euler")),
    "stable-diffusion-3": Case(("flow_euler", "dpmpp_2m", "heun")),
    "stable-diffusion-3-without-t5": Case(("flow_euler", "dpmpp_2m"), negative=False),
    "flux": Case(("flow_euler", "dpmpp_2m"), negative=False),
    "flux-schnell": Case(("flow_euler",)),
}


@dataclass(frozen=True)
class Family:
    """A saved pipeline, its artifact on ONNX Runtime, and diffusers' own pipeline."""

    name: str
    artifact: Path
    ours: Pipeline
    theirs: diffusers.DiffusionPipeline
    scheduler: dict[str, object]  # the checkpoint's config


@pytest.fixture(scope="module")
def open_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Each family is built and exported once."""
    return lru_cache(lambda name: opened(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=list(CASES))
def family(request: pytest.FixtureRequest, open_family: Callable[[str], Family]) -> Family:
    return open_family(request.param)


@pytest.fixture
def stable_diffusion(open_family: Callable[[str], Family]) -> Family:
    return open_family("stable-diffusion")


def opened(name: str, folder: Path) -> Family:
    checkpoint = save(name, folder / "checkpoints")
    artifact = folder / name
    export(checkpoint, artifact)
    missing = {"safety_checker": None}
    if name.endswith("without-t5"):
        missing = {"text_encoder_3": None, "tokenizer_3": None}
    theirs = diffusers.DiffusionPipeline.from_pretrained(checkpoint, **missing)
    theirs.set_progress_bar_config(disable=True)
    scheduler = dict(theirs.scheduler.config)
    if name != "ddpm":  # latents are never clipped
        scheduler["clip_sample"] = False
    return Family(name, artifact, open_pipeline(artifact), theirs, scheduler)


def with_pictures(name: str, values: dict[str, object]) -> Request:
    """The request, with an image and a mask where the family repaints."""
    return Request.of(
        {**values, **({"image": IMAGE, "mask": MASK} if name == "inpainting" else {})}
    )


IMAGE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8).repeat(4, 0).repeat(4, 1)
MASK = np.zeros((32, 32, 1), np.uint8)
MASK[8:24, 4:20] = 255


def their_picture(family: Family, values: dict[str, object]) -> np.ndarray:
    """The picture that diffusers' own pipeline makes of a request, float [H, W, C] in [0, 1]."""
    asked = dict(values)
    pipeline = family.theirs
    seed, sampler = asked.pop("seed"), asked.pop("sampler")
    if family.name == "lcm" and sampler != "lcm":  # its own pipeline takes no other scheduler
        pipeline = diffusers.StableDiffusionPipeline(
            **pipeline.components, requires_safety_checker=False
        )
        pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = their_scheduler(sampler, family.scheduler)
    if family.name.startswith("pixart"):
        asked |= {"use_resolution_binning": False, "clean_caption": False}
    if family.name == "flux-schnell":
        asked["true_cfg_scale"] = asked.pop("guidance_scale")
        asked.setdefault("negative_prompt", "")
    if family.name == "inpainting":
        asked |= {"image": to_pillow(IMAGE), "mask_image": to_pillow(MASK)}
    generator = torch.Generator().manual_seed(seed)
    return pipeline(**asked, generator=generator, output_type="np").images[0]


def their_scheduler(sampler: str, config: dict[str, object]) -> diffusers.SchedulerMixin:
    if not str(config["_class_name"]).startswith("Flow"):
        return DISCRETE[sampler].from_config(config)
    match sampler:
        case "heun":
            return diffusers.FlowMatchHeunDiscreteScheduler.from_config(config)
        case "dpmpp_2m":
            flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            return diffusers.DPMSolverMultistepScheduler.from_config(
                config, **flow, flow_shift=config["shift"]
            )
    return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)


def test_mixed_requests_make_the_pictures_of_diffusers_pipeline(family: Family) -> None:
    """Prompts, steps, samplers, guidance on and off and two sizes, all in one batch."""
    asked = CASES[family.name].requests()
    rows = family.ours.run([with_pictures(family.name, values) for values in asked])
    for values, row in zip(asked, rows, strict=True):
        theirs = their_picture(family, values)
        assert theirs.shape == (values["height"], values["width"], 3)
        assert theirs.std() > 0.01, "a picture of one colour shows nothing"
        assert psnr_db(theirs.astype(np.float32), family.ours.decode(row)) >= FLOOR_DB, values


def test_a_picture_has_the_same_bytes_alone_and_in_a_batch(family: Family) -> None:
    requests = [with_pictures(family.name, values) for values in CASES[family.name].requests()]
    together = list(family.ours.generate(requests))
    for request, picture in zip(requests, together, strict=True):
        (alone,) = family.ours.generate([request])
        assert alone.tobytes() == picture.tobytes()


def test_the_prompt_matters(family: Family) -> None:
    values = CASES[family.name].requests()[0]
    one, other = family.ours.run(
        [
            with_pictures(family.name, values),
            with_pictures(family.name, {**values, "prompt": "white table"}),
        ]
    )
    assert psnr_db(family.ours.decode(one), family.ours.decode(other)) < FLOOR_DB - 20


def test_its_graphs_pass_lint_for_tensorrt(family: Family) -> None:
    graphs = sorted(family.artifact.rglob("*.onnx"))
    assert len(graphs) == len(family.ours.model.networks)
    for graph in graphs:
        assert [f for f in lint(graph, "tensorrt") if f.severity == "error"] == []


@pytest.mark.parametrize("name", ["stable-diffusion-xl", "flux"])
def test_a_checkpoint_on_torch_makes_the_same_pictures(
    name: str, open_family: Callable[[str], Family], tmp_path: Path
) -> None:
    family = open_family(name)
    torch_pipeline = open_pipeline(save(name, tmp_path))
    request = with_pictures(name, CASES[name].requests()[0])
    (ours,), (reference,) = family.ours.run([request]), torch_pipeline.run([request])
    assert psnr_db(torch_pipeline.decode(reference), family.ours.decode(ours)) >= FLOOR_DB


IMAGE_TO_IMAGE = {
    "stable-diffusion": diffusers.StableDiffusionImg2ImgPipeline,
    "stable-diffusion-xl": diffusers.StableDiffusionXLImg2ImgPipeline,
    "stable-diffusion-3": diffusers.StableDiffusion3Img2ImgPipeline,
    "flux": diffusers.FluxImg2ImgPipeline,
    "lcm": diffusers.LatentConsistencyModelImg2ImgPipeline,
}


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        *(("stable-diffusion", sampler) for sampler in ("ddim", "euler", "dpmpp_2m", "heun")),
        ("stable-diffusion-xl", "euler"),
        ("stable-diffusion-3", "flow_euler"),
        ("flux", "flow_euler"),
        ("lcm", "lcm"),
    ],
)
@pytest.mark.parametrize("strength", [1.0, 0.65])
def test_an_image_changes_as_in_diffusers_image_to_image(
    name: str, sampler: str, strength: float, open_family: Callable[[str], Family]
) -> None:
    family = open_family(name)
    has_checker = name in ("stable-diffusion", "lcm")
    safety = {"requires_safety_checker": False} if has_checker else {}
    pipeline = IMAGE_TO_IMAGE[name](**family.theirs.components, **safety)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = their_scheduler(sampler, family.scheduler)
    asked = {"prompt": "a red shoe", "num_inference_steps": 5, "strength": strength}
    sized = SIZE if name in ("stable-diffusion-3", "flux") else {}
    theirs = pipeline(
        **asked, **sized, image=to_pillow(IMAGE), guidance_scale=4.0,
        generator=torch.Generator().manual_seed(1), output_type="np",
    ).images[0]  # fmt: skip
    request = {**asked, "image": IMAGE, "guidance_scale": 4.0, "seed": 1, "sampler": sampler}
    (row,) = family.ours.run([Request.of(request)])
    assert psnr_db(theirs.astype(np.float32), family.ours.decode(row)) >= FLOOR_DB


@pytest.mark.parametrize("keys", [{"clip_sample": True, "steps_offset": 0}, {}])
def test_an_old_scheduler_config_is_corrected_as_in_diffusers(
    keys: dict[str, object], open_family: Callable[[str], Family], tmp_path: Path
) -> None:
    family = open_family("stable-diffusion")
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear")
    checkpoint = tmp_path / "old"
    family.theirs.save_pretrained(checkpoint)
    scheduler.save_pretrained(checkpoint / "scheduler")
    path = checkpoint / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    for key in ("clip_sample", "steps_offset"):
        del config[key]
    path.write_text(json.dumps({**config, **keys}))
    index = json.loads((checkpoint / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    asked = {"prompt": "a red shoe", "num_inference_steps": 5, "guidance_scale": 4.0}
    generator = torch.Generator().manual_seed(0)
    picture = theirs(**asked, **SIZE, generator=generator, output_type="np").images[0]
    ours = open_pipeline(checkpoint)
    (row,) = ours.run([Request.of({**asked, **SIZE, "sampler": "ddim"})])
    assert psnr_db(picture.astype(np.float32), ours.decode(row)) >= FLOOR_DB


def test_a_pixart_transformer_under_its_older_name_is_known(
    open_family: Callable[[str], Family], tmp_path: Path
) -> None:
    family = open_family("pixart-sigma")
    checkpoint = save("pixart-sigma", tmp_path)
    for path in (checkpoint / "model_index.json", checkpoint / "transformer" / "config.json"):
        path.write_text(path.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel"))
    renamed = open_pipeline(checkpoint)
    request = Request.of(CASES["pixart-sigma"].requests()[0])
    (ours,), (row,) = family.ours.run([request]), renamed.run([request])
    assert psnr_db(family.ours.decode(ours), renamed.decode(row)) >= FLOOR_DB


def test_calls_are_split_where_memory_or_a_build_says_so(
    open_family: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = open_family("stable-diffusion")
    requests = [Request.of(values) for values in CASES["stable-diffusion"].requests()]
    expected = [picture.tobytes() for picture in family.ours.generate(requests)]
    calls = []
    whole = family.ours._components.run

    def run(network: str, feed: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        if network == "unet":
            calls.append(len(feed["timestep"]))
        return whole(network, feed)

    monkeypatch.setattr(family.ours._components, "run", run)
    assert max(calls, default=0) == 0
    for limit in ("memory", "build"):
        with monkeypatch.context() as patch:
            if limit == "memory":
                patch.setattr("engine.pipeline.PIXELS_A_CALL", 2 * 32 * 32)
            else:
                patch.setattr(family.ours, "_max_batch", 2)
            assert [p.tobytes() for p in family.ours.generate(requests)] == expected
            assert max(calls) == 2
            calls.clear()


def test_a_picture_larger_than_the_network_knows_positions_for_is_refused(
    open_family: Callable[[str], Family],
) -> None:
    family = open_family("stable-diffusion-3")
    with pytest.raises(OptionError, match=r"height must be 1\.\.96, got 100"):
        family.ours.admit(Request.of({"prompt": "a", "height": 100}))


def test_inpainting_with_less_strength_starts_from_the_image(
    open_family: Callable[[str], Family],
) -> None:
    family = open_family("inpainting")
    family.theirs.scheduler = their_scheduler("ddim", family.scheduler)
    asked = {"prompt": "a red shoe", "num_inference_steps": 6, "strength": 0.5}
    theirs = family.theirs(
        **asked, image=to_pillow(IMAGE), mask_image=to_pillow(MASK), **SIZE, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(1), output_type="np",
    ).images[0]  # fmt: skip
    request = {**asked, "guidance_scale": 4.0, "seed": 1, "sampler": "ddim"}
    (row,) = family.ours.run([with_pictures("inpainting", request)])
    assert psnr_db(theirs.astype(np.float32), family.ours.decode(row)) >= FLOOR_DB


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler"])
def test_an_unconditional_pixel_model_makes_the_pictures_of_diffusers(
    sampler: str, open_family: Callable[[str], Family]
) -> None:
    family = open_family("ddpm")
    requests = [
        Request.of(
            {"seed": seed, "sampler": sampler, "num_inference_steps": 4 + seed, "height": height}
        )
        for seed, height in enumerate((16, 16, 24))
    ]
    for request, row in zip(requests, family.ours.run(requests), strict=True):
        theirs = unconditional_picture(family.theirs, sampler, request)
        assert psnr_db(theirs, family.ours.decode(row)) >= FLOOR_DB


def unconditional_picture(
    pipeline: diffusers.DDIMPipeline, sampler: str, request: Request
) -> np.ndarray:
    """DDIMPipeline's own picture; for other schedulers, which it refuses, its loop."""
    generator = torch.Generator().manual_seed(request.seed)
    steps = request.num_inference_steps
    pipeline.unet.register_to_config(sample_size=(request.height, 16))
    if sampler == "ddim":
        return (
            pipeline(num_inference_steps=steps, generator=generator, output_type="np")
            .images[0]
            .astype(np.float32)
        )
    scheduler = their_scheduler(sampler, pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 3, request.height, 16, generator=generator) * scheduler.init_noise_sigma
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = pipeline.unet(scheduler.scale_model_input(x, timestep), timestep).sample
            x = scheduler.step(output, timestep, x).prev_sample
    return (x[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def test_every_pipeline_of_the_tiny_ones_is_tested_here() -> None:
    assert {"ddpm", *CASES} == set(BUILDERS)


def test_a_size_that_the_networks_cannot_make_is_refused_with_the_nearest(
    stable_diffusion: Family,
) -> None:
    request = Request.of({"prompt": "a", "height": 30})
    with pytest.raises(OptionError, match="multiple of 4, got 30; the nearest: 28 and 32"):
        stable_diffusion.ours.admit(request)


def test_an_image_of_any_size_is_fitted(stable_diffusion: Family) -> None:
    picture = np.asarray(Image.fromarray(IMAGE).resize((39, 51)))
    request = Request.of({"prompt": "a", "image": picture, "num_inference_steps": 4})
    (made,) = stable_diffusion.ours.generate([request])
    assert made.shape == (48, 36, 3)
