"""What a request may ask of each family's model, and what it is told where it may not."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tiny_pipelines import BUILDERS, save

from engine.checkpoint import read_checkpoint
from engine.errors import OptionError
from engine.manifest import ModelSpec
from engine.request import MAX_SIDE, Request, resolve

IMAGE = np.zeros((32, 48, 3), np.uint8)
MASK = np.zeros((32, 48, 1), np.uint8)
PROMPT = {"prompt": "a red shoe"}
PAINTED = {**PROMPT, "image": IMAGE, "mask": MASK}
TEXT_TO_IMAGE = [name for name in BUILDERS if name not in ("ddpm", "inpainting")]
INPAINTING = "this is an inpainting model: image and mask are required"
NO_MASK = "this model takes no mask (an inpainting model does), got one; leave it out"
UNGUIDED = "negative_prompt needs a guidance_scale above 1, got 1"
EMBEDDED = "this model has guidance built in and takes no negative_prompt"
DISCRETE = "ddim, euler, euler_ancestral, heun, dpmpp_2m, lcm"


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, diffusion_checkpoint: Path, gan_checkpoint: Path
) -> Mapping[str, ModelSpec]:
    """Every diffusers pipeline, and our own models with labels, by name."""
    folder = tmp_path_factory.mktemp("pipelines")
    checkpoints = {name: save(name, folder / f"of {name}") for name in BUILDERS}
    checkpoints |= {"labelled": diffusion_checkpoint, "gan": gan_checkpoint}
    return {name: read_checkpoint(path).model for name, path in checkpoints.items()}


def refusal(model: ModelSpec, values: Mapping[str, object], **build: tuple[int, int]) -> str:
    with pytest.raises(OptionError) as raised:
        resolve(Request.of(values), model, **build)
    message = str(raised.value)
    assert "\n" not in message
    return message


# What is allowed


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_a_prompt_alone_gets_every_default_of_its_model(
    models: Mapping[str, ModelSpec], name: str
) -> None:
    model = models[name]
    resolved = resolve(Request.of(PROMPT), model)
    assert model.defaults is not None
    assert resolved.sampler in model.samplers
    assert (resolved.height, resolved.width) == (model.image.height, model.image.width)
    assert resolved.num_inference_steps == model.defaults.num_inference_steps
    assert resolved.guidance_scale == model.defaults.guidance_scale
    assert (resolved.prompt, resolved.negative_prompt, resolved.label) == ("a red shoe", None, "")


@pytest.mark.parametrize(
    ("name", "steps", "guidance_scale", "strength"),
    # the signatures' defaults of diffusers' own __call__: text to image, and image to image
    [
        ("stable-diffusion", 50, 7.5, 0.8),
        ("stable-diffusion-xl", 50, 5.0, 0.3),
        ("pixart-sigma", 20, 4.5, 0.8),
        ("stable-diffusion-3", 28, 7.0, 0.6),
        ("flux", 28, 3.5, 0.6),
        ("lcm", 4, 8.5, 0.8),
    ],
)
def test_defaults_are_those_of_diffusers_pipelines(
    models: Mapping[str, ModelSpec],
    name: str,
    steps: int,
    guidance_scale: float,
    strength: float,
) -> None:
    resolved = resolve(Request.of({**PROMPT, "image": IMAGE}), models[name])
    assert resolved.num_inference_steps == steps
    assert resolved.guidance_scale == guidance_scale
    assert resolved.strength == strength


def test_an_empty_prompt_is_a_prompt(models: Mapping[str, ModelSpec]) -> None:
    assert resolve(Request.of({"prompt": ""}), models["stable-diffusion"]).prompt == ""


@pytest.mark.parametrize(
    ("shape", "asked", "expected"),
    [
        ((32, 48, 3), {}, (32, 48)),
        ((35, 50, 3), {}, (32, 48)),  # cut to the multiple of 4
        ((3, 1, 3), {}, (4, 4)),  # and never to nothing
        ((32, 48, 3), {"height": 64}, (64, 48)),
        ((4 * MAX_SIDE, 48, 3), {"height": 64}, (64, 48)),
    ],
)
def test_a_picture_is_as_large_as_its_image_unless_told(
    models: Mapping[str, ModelSpec],
    shape: tuple[int, ...],
    asked: dict[str, int],
    expected: tuple[int, int],
) -> None:
    values = {**PROMPT, "image": np.zeros(shape, np.uint8), **asked}
    resolved = resolve(Request.of(values), models["stable-diffusion"])
    assert (resolved.height, resolved.width) == expected


def test_an_image_too_large_to_make_is_refused_with_what_mends_it(
    models: Mapping[str, ModelSpec],
) -> None:
    for shape, name in (((20000, 32, 3), "height"), ((32, 20000, 3), "width")):
        message = refusal(models["flux"], {**PROMPT, "image": np.zeros(shape, np.uint8)})
        assert message == (
            f"{name} must be 1..8192, got 20000, the image's own; give height and width"
        )


def test_a_build_for_one_size_makes_that_size_from_any_image(
    models: Mapping[str, ModelSpec],
) -> None:
    values = {**PROMPT, "image": IMAGE}
    resolved = resolve(Request.of(values), models["stable-diffusion"], (64, 32))
    assert (resolved.height, resolved.width) == (64, 32)


@pytest.mark.parametrize("name", ["flux-schnell", "stable-diffusion", "pixart-alpha"])
def test_a_negative_prompt_goes_with_guidance(models: Mapping[str, ModelSpec], name: str) -> None:
    values = {**PROMPT, "negative_prompt": "small", "guidance_scale": 2.0}
    assert resolve(Request.of(values), models[name]).negative_prompt == "small"


def test_inpainting_takes_an_image_and_a_mask_of_other_sizes(
    models: Mapping[str, ModelSpec],
) -> None:
    values = {**PROMPT, "image": IMAGE, "mask": np.zeros((16, 16, 1), np.uint8)}
    resolved = resolve(Request.of(values), models["inpainting"])
    assert (resolved.height, resolved.width, resolved.strength) == (32, 48, 1.0)


# What a picture is of


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_a_model_of_prompts_takes_one_and_no_label(
    models: Mapping[str, ModelSpec], name: str
) -> None:
    assert refusal(models[name], {}) == "prompt is required"
    message = refusal(models[name], {**PROMPT, "label": "bag"})
    assert message == "this model takes no label, got 'bag'; leave it out"


@pytest.mark.parametrize("name", ["ddpm", "labelled", "gan"])
@pytest.mark.parametrize(
    ("field", "value"), [("prompt", "x"), ("negative_prompt", "x"), ("strength", 0.5)]
)
def test_a_model_without_texts_and_images_takes_none(
    models: Mapping[str, ModelSpec], name: str, field: str, value: object
) -> None:
    label = {"label": "bag"} if models[name].labels else {}
    message = refusal(models[name], {**label, field: value})
    assert message == f"this model takes no {field}, got {value!r}; leave it out"


@pytest.mark.parametrize("name", ["ddpm", "labelled", "gan"])
@pytest.mark.parametrize(("field", "value"), [("image", IMAGE), ("mask", MASK)])
def test_a_refused_image_is_not_printed(
    models: Mapping[str, ModelSpec], name: str, field: str, value: object
) -> None:
    label = {"label": "bag"} if models[name].labels else {}
    message = refusal(models[name], {**label, field: value})
    assert message == f"this model takes no {field}, got one; leave it out"


@pytest.mark.parametrize("name", ["labelled", "gan"])
@pytest.mark.parametrize("label", [None, "", "Bag", "shoe"])
def test_a_label_is_one_of_the_models(
    models: Mapping[str, ModelSpec], name: str, label: str | None
) -> None:
    message = refusal(models[name], {"label": label})
    assert message == f"label must be one of bag, boot, coat, got {label!r}"


# Options that a model lacks, or that are wrong for every model


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "stable-diffusion",
            {"height": 33},
            "height must be a multiple of 4, got 33; the nearest: 32 and 36",
        ),
        ("stable-diffusion", {"width": 1}, "width must be a multiple of 4, got 1; the nearest: 4"),
        (
            "flux",
            {"width": 1023},
            "width must be a multiple of 4, got 1023; the nearest: 1020 and 1024",
        ),
        ("stable-diffusion", {"height": 0}, "height must be 1..8192, got 0"),
        ("stable-diffusion", {"width": 8196}, "width must be 1..8192, got 8196"),
        ("stable-diffusion", {"height": 32.5}, "height must be a whole number, got 32.5"),
        ("stable-diffusion", {"height": "32"}, "height must be a whole number, got '32'"),
        (
            "stable-diffusion",
            {"sampler": "flow_euler"},
            f"sampler must be one of {DISCRETE}, got 'flow_euler'",
        ),
        ("stable-diffusion", {"sampler": "pndm"}, f"sampler must be one of {DISCRETE}, got 'pndm'"),
        (
            "stable-diffusion-2",
            {"sampler": "heun"},
            "sampler must be one of ddim, euler, euler_ancestral, dpmpp_2m, lcm, got 'heun'",
        ),
        (
            "stable-diffusion-3",
            {"sampler": "ddim"},
            "sampler must be one of flow_euler, heun, dpmpp_2m, got 'ddim'",
        ),
        ("flux", {"sampler": "heun"}, "sampler must be one of flow_euler, dpmpp_2m, got 'heun'"),
        ("stable-diffusion", {"strength": 0.5}, "strength is for a request with an image, got 0.5"),
        ("stable-diffusion", {"mask": MASK}, NO_MASK),
        ("stable-diffusion", {"image": IMAGE, "mask": MASK}, NO_MASK),
        ("inpainting", {}, INPAINTING),
        ("inpainting", {"image": IMAGE}, INPAINTING),
        ("inpainting", {"mask": MASK}, INPAINTING),
        ("flux", {"negative_prompt": "b"}, f"{EMBEDDED}, got 'b'; leave it out"),
        ("lcm", {"negative_prompt": ""}, f"{EMBEDDED}, got ''; leave it out"),
        ("flux-schnell", {"negative_prompt": "b"}, UNGUIDED),
        ("stable-diffusion", {"negative_prompt": "b", "guidance_scale": 1.0}, UNGUIDED),
        ("stable-diffusion", {"guidance_scale": 0.5}, "guidance_scale must be 1..100, got 0.5"),
        ("stable-diffusion", {"prompt": 3}, "prompt must be a text, got 3"),
        (
            "stable-diffusion",
            {"negative_prompt": ["b"]},
            "negative_prompt must be a text, got ['b']",
        ),
        ("stable-diffusion", {"seed": -1}, "seed must be 0..9223372036854775807, got -1"),
        (
            "stable-diffusion",
            {"num_inference_steps": 1001},
            "num_inference_steps must be 1..1000, got 1001",
        ),
        (
            "stable-diffusion",
            {"num_inference_steps": True},
            "num_inference_steps must be a whole number, got True",
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused_and_says_what_it_can(
    models: Mapping[str, ModelSpec], name: str, values: dict[str, object], message: str
) -> None:
    assert refusal(models[name], {**PROMPT, **values}) == message


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("ddpm", {"height": 17}, "height must be a multiple of 2, got 17; the nearest: 16 and 18"),
        ("ddpm", {"guidance_scale": 2.0}, "guidance_scale must be 1 for a model"),
        ("ddpm", {"label": "0"}, "this model takes no label, got '0'; leave it out"),
        ("labelled", {"label": "bag", "width": 1}, "width must be a multiple of 2, got 1"),
        ("gan", {"label": "bag", "width": 8}, "width must be 16, got 8"),
        ("gan", {"label": "bag", "num_inference_steps": 1}, "a GAN takes one step and no num_inf"),
        ("gan", {"label": "bag", "sampler": "ddim"}, "a GAN takes one step and no sampler, got"),
        ("gan", {"label": "bag", "guidance_scale": 1.0}, "a GAN takes one step and no guidance_"),
    ],
)
def test_models_without_prompts_refuse_the_rest(
    models: Mapping[str, ModelSpec], name: str, values: dict[str, object], message: str
) -> None:
    assert refusal(models[name], values).startswith(message)


def test_a_build_for_one_size_refuses_another(models: Mapping[str, ModelSpec]) -> None:
    message = refusal(models["stable-diffusion"], {**PROMPT, "width": 64}, size=(64, 32))
    assert message == "width must be 32, got 64"


@pytest.mark.parametrize("field", ["strength", "guidance_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_are_finite(models: Mapping[str, ModelSpec], field: str, value: float) -> None:
    message = refusal(models["stable-diffusion"], {**PROMPT, "image": IMAGE, field: value})
    assert message == f"{field} must be a finite number, got {value!r}"


@pytest.mark.parametrize("strength", [0, -0.1, 1.5])
def test_strength_is_a_share(models: Mapping[str, ModelSpec], strength: float) -> None:
    values = {**PROMPT, "image": IMAGE, "strength": strength}
    message = refusal(models["stable-diffusion"], values)
    assert message == f"strength must be more than 0 and at most 1, got {strength}"


# Arrays


@pytest.mark.parametrize(
    ("picture", "got"),
    [
        (IMAGE.astype(np.float32), "got float32 [32, 48, 3]"),
        (IMAGE.astype(np.int64), "got int64 [32, 48, 3]"),
        (IMAGE[..., :2], "got uint8 [32, 48, 2]"),
        (np.zeros((32, 48, 4), np.uint8), "got uint8 [32, 48, 4]"),
        (IMAGE[..., 0], "got uint8 [32, 48]"),
        (IMAGE[None], "got uint8 [1, 32, 48, 3]"),
    ],
)
def test_an_image_is_uint8_with_three_channels(
    models: Mapping[str, ModelSpec], picture: np.ndarray, got: str
) -> None:
    message = refusal(models["stable-diffusion"], {**PROMPT, "image": picture})
    assert message == f"image must be uint8 [H, W, 3], {got}"


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (MASK.astype(bool), "got bool [32, 48, 1]"),
        (MASK[..., 0], "got uint8 [32, 48]"),
        (IMAGE, "got uint8 [32, 48, 3]"),
    ],
)
def test_a_mask_is_uint8_with_one_channel(
    models: Mapping[str, ModelSpec], mask: np.ndarray, got: str
) -> None:
    message = refusal(models["inpainting"], {**PAINTED, "mask": mask})
    assert message == f"mask must be uint8 [H, W, 1], {got}"


@pytest.mark.parametrize("name", ["image", "mask"])
def test_a_picture_has_pixels(models: Mapping[str, ModelSpec], name: str) -> None:
    message = refusal(models["inpainting"], {**PAINTED, name: PAINTED[name][:0]})
    channels = PAINTED[name].shape[2]
    assert message == f"{name} must not be empty, got [0, 48, {channels}]"


@pytest.mark.parametrize("value", ["photo.png", [[1]], b"bytes"])
def test_what_is_no_array_is_refused_by_name(
    models: Mapping[str, ModelSpec], value: object
) -> None:
    message = refusal(models["stable-diffusion"], {**PROMPT, "image": value})
    assert message.startswith("image")
    assert message.endswith(f"got {value!r}")


def test_an_unknown_field_is_refused_with_the_known_ones(models: Mapping[str, ModelSpec]) -> None:
    message = refusal(models["flux"], {**PROMPT, "cfg": 3})
    assert message.startswith("unknown key 'cfg'; allowed: label, prompt, negative_prompt, seed,")
