"""A wrong option is refused in a sentence: what, what is allowed, what was given."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import OptionError
from engine.manifest import Defaults, ImageSpec, ModelSpec, NetworkSpec
from engine.request import Request, Resolved, resolve
from engine.training.config import GanConfig, read_config

GOOD = {"kind": "gan", "data": {"path": "photos"}}

DIFFUSION = ModelSpec(
    family="pixel_unet",
    labels=("bag", "boot"),
    image=ImageSpec(height=8, width=8, channels=1),
    networks={"unet": NetworkSpec(inputs=(), outputs=())},
    samplers=("ddim", "euler"),
    null_label=2,
    defaults=Defaults(num_inference_steps=20, guidance_scale=2.0, sampler="ddim"),
)
GAN = ModelSpec(
    family="gan",
    labels=("bag", "boot"),
    image=ImageSpec(height=8, width=8, channels=1),
    networks={"generator": NetworkSpec(inputs=(), outputs=())},
)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seed": 2**32}, "seed must be at least 0 and less than 4294967296, got 4294967296"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"steps": "100"}, "steps must be a whole number, got '100'"),
        ({"steps": float("nan")}, "steps must be a whole number, got nan"),
        ({"penalty_weight": float("nan")}, "penalty_weight must be a finite number, got nan"),
        ({"penalty_weight": float("inf")}, "penalty_weight must be a finite number, got inf"),
        ({"penalty_weight": -1.0}, "penalty_weight must be at least 0, got -1.0"),
        ({"penalty_weight": "strong"}, "penalty_weight must be a number, got 'strong'"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, got 'fp8'"),
        ({"data": 3}, "data must be a table, got 3"),
        ({"data": {}}, "data.path is required"),
        ({"data": {"path": 3}}, "data.path must be a text, got 3"),
        ({"data": {"path": "x", "resolution": 4}}, "data.resolution must be 8..1024, got 4"),
        ({"data": {"path": "x", "channels": 2}}, "data.channels must be one of 1, 3, got 2"),
        ({"data": {"path": "x", "labels": "bag"}}, "data.labels must be a list, got 'bag'"),
        ({"data": {"path": "x", "labels": ["a", 3]}}, "data.labels.1 must be a text, got 3"),
        (
            {"optimizer": {"learning_rate": 0.0}},
            "optimizer.learning_rate must be more than 0 and at most 1, got 0.0",
        ),
        (
            {"optimizer": {"beta1": 1.0}},
            "optimizer.beta1 must be at least 0 and less than 1, got 1.0",
        ),
        (
            {"network": {"latent": 3}},
            "unknown key 'network.latent'; allowed: latent_size, block_out_channels, "
            "layers_per_block",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(
    wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError) as raised:
        GanConfig.parse({**GOOD, **wrong})
    assert str(raised.value) == message


def test_an_unknown_key_is_refused_with_every_key_that_is_known() -> None:
    with pytest.raises(OptionError, match="unknown key 'stepz'; allowed: ") as raised:
        GanConfig.parse({**GOOD, "stepz": 3})
    allowed = str(raised.value).split("allowed: ")[1].split(", ")
    assert allowed == list(GanConfig.model_fields)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(OptionError, match=r"^data is required$"):
        GanConfig.parse({"kind": "gan"})


def test_the_source_goes_in_front() -> None:
    with pytest.raises(OptionError, match=r"^train.toml: steps must be at least 1, got 0$"):
        GanConfig.parse({**GOOD, "steps": 0}, "train.toml")


def test_options_cannot_be_changed_once_parsed() -> None:
    config = GanConfig.parse(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("kind = 'vae'", "kind must be one of diffusion, gan, got 'vae'"),
        ("kind = ['gan']", r"kind must be one of diffusion, gan, got \['gan'\]"),
        ("steps = 3", "kind must be one of diffusion, gan, got None"),
        ("kind = 'gan'\ndata = 'photos'", "data must be a table, got 'photos'"),
        ("kind = 'gan'\nseed = 2026-01-01", "not JSON serializable"),
        ("kind = ", "is not readable TOML"),
    ],
)
def test_a_wrong_config_file_is_named(toml: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text(toml)
    with pytest.raises(OptionError, match=message) as raised:
        read_config(path, data_path="elsewhere")
    assert str(path) in str(raised.value)


def test_a_config_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"config '.*absent.toml' does not exist"):
        read_config(tmp_path / "absent.toml")


def test_the_command_line_replaces_data_path_and_steps_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text("kind = 'gan'\nsteps = 7")
    config = read_config(path, data_path="elsewhere", steps=9)
    assert (config.data.path, config.steps) == ("elsewhere", 9)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be 1..1000, got 0"),
        ({"num_inference_steps": 1001}, "num_inference_steps must be 1..1000, got 1001"),
        ({"num_inference_steps": "4"}, "num_inference_steps must be a whole number, got '4'"),
        ({"guidance_scale": 0.5}, "guidance_scale must be 1..100, got 0.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number, got inf"),
        ({"seed": -1}, "seed must be 0..9223372036854775807, got -1"),
        ({"seed": 2**63}, f"seed must be 0..9223372036854775807, got {2**63}"),
        ({"sampler": 3}, "sampler must be a text, got 3"),
        ({"label": 3}, "label must be a text, got 3"),
        ({"height": 0}, "height must be 1..8192, got 0"),
        ({"strength": 0.0}, "strength must be more than 0 and at most 1, got 0.0"),
        (
            {"steps": 4},
            "unknown key 'steps'; allowed: label, prompt, negative_prompt, seed, "
            "num_inference_steps, guidance_scale, sampler, height, width, strength, image, mask, "
            "postprocess",
        ),
    ],
)
def test_a_wrong_request_is_refused_with_what_is_allowed(
    parameters: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError) as raised:
        Request.of({"label": "bag", **parameters})
    assert str(raised.value) == message


def test_a_request_takes_the_defaults_of_its_model_where_it_does_not_say() -> None:
    resolved = resolve(
        Request.of({"label": "boot", "seed": 3, "num_inference_steps": 5}), DIFFUSION
    )
    assert resolved == Resolved(
        label="boot", prompt="", negative_prompt=None, seed=3, num_inference_steps=5,
        guidance_scale=2.0, sampler="ddim", height=8, width=8, strength=1.0, image=None, mask=None,
    )  # fmt: skip
    assert resolve(Request(label="bag"), GAN) == replace(
        resolved, label="bag", seed=0, num_inference_steps=1, guidance_scale=1.0, sampler=""
    )


@pytest.mark.parametrize(
    ("model", "parameters", "message"),
    [
        (DIFFUSION, {"label": "hat"}, "label must be one of bag, boot, got 'hat'"),
        (GAN, {"label": "hat"}, "label must be one of bag, boot, got 'hat'"),
        (DIFFUSION, {"label": None}, "label must be one of bag, boot, got None"),
        (
            DIFFUSION.model_copy(update={"labels": (), "null_label": None}),
            {"guidance_scale": 1.0},
            "this model takes no label, got 'bag'; leave it out",
        ),
        (DIFFUSION, {"prompt": "hat"}, "this model takes no prompt, got 'hat'; leave it out"),
        (GAN, {"strength": 0.5}, "this model takes no strength, got 0.5; leave it out"),
        (DIFFUSION, {"height": 16}, "height must be 8, got 16"),
        (DIFFUSION, {"sampler": "heun"}, "sampler must be one of ddim, euler, got 'heun'"),
        (
            GAN,
            {"num_inference_steps": 4},
            "a GAN takes one step and no num_inference_steps, got 4; leave it out",
        ),
        (
            GAN,
            {"guidance_scale": 1.0},
            "a GAN takes one step and no guidance_scale, got 1.0; leave it out",
        ),
        (GAN, {"sampler": "ddim"}, "a GAN takes one step and no sampler, got 'ddim'; leave it out"),
        (
            DIFFUSION.model_copy(update={"null_label": None}),
            {"guidance_scale": 3.0},
            "guidance_scale must be 1 for a model trained without label dropout, got 3.0",
        ),
    ],
)
def test_a_request_that_its_model_does_not_take_is_refused(
    model: ModelSpec, parameters: dict[str, object], message: str
) -> None:
    request = Request(**{"label": "bag", **parameters})
    with pytest.raises(OptionError) as raised:
        resolve(request, model)
    assert str(raised.value) == message
