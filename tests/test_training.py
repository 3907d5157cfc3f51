"""Training: resumes bit for bit, writes what diffusers opens, follows its formulas."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from test_data import write_idx

from engine.errors import ArtifactError, OptionError
from engine.pipeline import open_pipeline
from engine.quality import psnr_db
from engine.request import Request
from engine.training.config import DiffusionConfig, GanConfig
from engine.training.diffusion import DiffusionTrainer, make_scheduler
from engine.training.gan import GanTrainer, squared_gradient
from engine.training.loop import train

QUIET = Console(quiet=True)
NETWORKS = {
    "diffusion": {"block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 8},
    "gan": {"block_out_channels": [8, 8], "latent_size": 4},
}
KINDS = [
    ("diffusion", {"prediction_type": "epsilon"}),
    ("diffusion", {"prediction_type": "v_prediction"}),
    ("diffusion", {"prediction_type": "flow_prediction"}),
    ("gan", {"loss": "relativistic"}),
    ("gan", {"loss": "non_saturating"}),
]


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of 8x8 in three classes: bright left, bright right, bright middle."""
    pixels = np.full((24, 8, 8), 20)
    for index in range(24):
        column = (0, 5, 2)[index % 3]
        pixels[index, :, column : column + 3] = 200 + index
    return write_idx(tmp_path_factory.mktemp("photos"), pixels, np.arange(24) % 3)


def values(kind: str, photos: Path, **options: object) -> dict[str, object]:
    data = {"path": str(photos), "resolution": 8, "channels": 1, "labels": ["l", "r", "m"]}
    defaults = {"steps": 6, "batch_size": 8, "save_every": 2, "sample_every": 6}
    return {"kind": kind, **defaults, "data": data, "network": NETWORKS[kind], **options}


def config(kind: str, photos: Path, **options: object) -> DiffusionConfig | GanConfig:
    model = DiffusionConfig if kind == "diffusion" else GanConfig
    return model.parse(values(kind, photos, **options))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a training is: weights, moments, EMA."""
    return load_file(folder / "training" / "state.safetensors")


def assert_same(left: Path, right: Path) -> None:
    first, second = weights(left), weights(right)
    assert first.keys() == second.keys()
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(
    kind: str, options: dict[str, object], photos: Path, tmp_path: Path
) -> None:
    train(config(kind, photos, **options), tmp_path / "whole", QUIET)
    assert train(config(kind, photos, **options, steps=3), tmp_path / "parts", QUIET) == 3
    assert train(config(kind, photos, **options), tmp_path / "parts", QUIET) == 6
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_training_writes_a_checkpoint_samples_and_scalars_and_no_pickle(
    kind: str, options: dict[str, object], photos: Path, tmp_path: Path
) -> None:
    train(config(kind, photos, **options, steps=2), tmp_path, QUIET)
    sheet = Image.open(tmp_path / "training" / "samples" / "0000002.png")
    assert sheet.size[0] > 3 * 64
    assert list((tmp_path / "training" / "log").glob("events.out.tfevents.*"))
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert {suffix for suffix in suffixes if not suffix[1:].isdigit()} <= {
        ".json", ".safetensors", ".png", ".vm", f".{os.uname().nodename}",
    }  # fmt: skip
    pipeline = open_pipeline(tmp_path)
    (row,) = pipeline.run([Request(label="r", seed=1)])
    assert pipeline.draw(row).shape == (8, 8, 1)


@pytest.mark.parametrize("kind", ["diffusion", "gan"])
def test_a_training_that_is_terminated_saves_and_the_same_command_goes_on(
    kind: str, photos: Path, tmp_path: Path
) -> None:
    steps = 400
    options = {"steps": steps, "save_every": 10_000, "sample_every": 10_000}
    toml = tmp_path / "train.toml"
    toml.write_text(to_toml(values(kind, photos, **options)))
    output = tmp_path / "stopped"
    command = [sys.executable, "-m", "vitrine", "train", str(toml), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--json"], env=environment, stdout=subprocess.PIPE)
    while not list((output / "training" / "log").glob("events*")):  # written before step 1
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=60)
    report = json.loads(stdout.splitlines()[-1])
    assert process.returncode == 0
    assert 0 < report["steps"] < steps
    assert report["finished"] is False
    subprocess.run(command, env=environment, check=True, capture_output=True)
    train(config(kind, photos, **options), tmp_path / "whole", QUIET)
    assert_same(tmp_path / "whole", output)


def to_toml(tables: dict[str, object]) -> str:
    def line(key: str, value: object) -> str:
        return f"{key} = {json.dumps(value)}\n"

    plain = "".join(line(k, v) for k, v in tables.items() if not isinstance(v, dict))
    nested = {k: v for k, v in tables.items() if isinstance(v, dict)}
    return plain + "".join(
        f"[{name}]\n" + "".join(line(k, v) for k, v in table.items())
        for name, table in nested.items()
    )


def test_the_loss_of_a_diffusion_training_falls(photos: Path) -> None:
    trainer = DiffusionTrainer(
        config("diffusion", photos, optimizer={"warmup_steps": 1}), ("l", "r", "m"), CPU
    )
    images, labels = batch(photos)
    losses = [trainer.step(images, labels, rng(step), step)["loss"] for step in range(60)]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])


CPU = torch.device("cpu")


def rng(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(step)


def batch(photos: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from engine.training.config import DataConfig
    from engine.training.data import load_dataset, to_network_range

    dataset = load_dataset(DataConfig(path=str(photos), resolution=8, channels=1))
    return torch.from_numpy(to_network_range(dataset.images)), torch.from_numpy(dataset.labels)


def test_another_config_is_refused_with_the_keys_that_differ(photos: Path, tmp_path: Path) -> None:
    train(config("gan", photos, steps=1), tmp_path, QUIET)
    before = weights(tmp_path)
    with pytest.raises(OptionError, match=r"another config \(batch_size, seed differ\)"):
        train(config("gan", photos, seed=1, batch_size=4), tmp_path, QUIET)
    assert weights(tmp_path).keys() == before.keys()


def test_a_damaged_training_state_is_named(photos: Path, tmp_path: Path) -> None:
    train(config("gan", photos, steps=1), tmp_path, QUIET)
    state = tmp_path / "training" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(ArtifactError, match=r"state.safetensors' is damaged.*delete it"):
        train(config("gan", photos), tmp_path, QUIET)


def test_a_training_that_cannot_start_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(ArtifactError):
        train(config("gan", tmp_path / "missing"), output, QUIET)
    with pytest.raises(OptionError, match=r"make 16x16 images, but data.resolution is 8"):
        train(config("gan", photos, network={"block_out_channels": [8, 8, 8]}), output, QUIET)
    assert not output.exists()


@pytest.fixture(scope="module")
def diffusion_folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    train(config("diffusion", photos, steps=4, precision="bf16"), folder, QUIET)
    return folder


def test_a_diffusion_checkpoint_opens_in_plain_diffusers(diffusion_folder: Path) -> None:
    pipeline = DDIMPipeline.from_pretrained(diffusion_folder)
    assert isinstance(pipeline.unet, UNet2DModel)
    assert pipeline.unet.config.num_class_embeds == 4
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_diffusers_makes_the_same_picture_with_the_same_seed(diffusion_folder: Path) -> None:
    unet = UNet2DModel.from_pretrained(diffusion_folder, subfolder="unet").eval()
    scheduler = DDIMScheduler.from_pretrained(diffusion_folder, subfolder="scheduler")
    scheduler.set_timesteps(10)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            prediction = unet(x, timestep, torch.tensor([1])).sample
            x = scheduler.step(prediction, timestep, x).prev_sample
    request = Request(label="r", seed=7, num_inference_steps=10, guidance_scale=1.0, sampler="ddim")
    pipeline = open_pipeline(diffusion_folder)
    ours = pipeline.decode(next(pipeline.run([request])))
    theirs = (x[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    assert psnr_db(theirs, ours) >= 60


def test_the_forward_process_is_the_product_of_its_small_steps(photos: Path) -> None:
    """x_t = sqrt(1 - b_t) x_{t-1} + sqrt(b_t) n, t + 1 times: its mean and variance."""
    scheduler = make_scheduler(config("diffusion", photos))
    mean, variance = 1.0, 0.0
    for beta in scheduler.betas[:301].double().tolist():
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
    ones, step = torch.ones(1, 1, 1, 1), torch.tensor([300])
    assert scheduler.add_noise(ones, 0 * ones, step).item() == pytest.approx(mean, rel=1e-5)
    assert scheduler.add_noise(0 * ones, ones, step).item() ** 2 == pytest.approx(
        variance, rel=1e-5
    )


def test_the_penalty_is_the_squared_norm_of_the_logit_s_gradient() -> None:
    images = torch.arange(8.0).reshape(2, 1, 2, 2).requires_grad_()
    logits = images.square().sum(dim=(1, 2, 3))  # gradient 2x, squared norm 4 |x|^2
    penalty = squared_gradient(logits, images)
    assert penalty.item() == 4 * sum(x * x for x in range(8)) / 2
    (gradient,) = torch.autograd.grad(penalty, images)  # differentiable: 8x / rows
    assert torch.equal(gradient, 4 * images)


@pytest.mark.parametrize(
    ("loss", "discriminator", "generator"),
    [
        # logits are 0 for equal class embeddings of zero: softplus(0) = log 2
        ("relativistic", np.log(2), np.log(2)),
        ("non_saturating", 2 * np.log(2), np.log(2)),
    ],
)
def test_the_losses_of_an_undecided_discriminator_are_known(
    loss: str, discriminator: float, generator: float, photos: Path
) -> None:
    trainer = GanTrainer(config("gan", photos, loss=loss), ("l", "r", "m"), CPU)
    torch.nn.init.zeros_(trainer.discriminator.class_embedding.weight)
    trainer.discriminator_adam.param_groups[0]["lr"] = 0.0
    trainer.learning_rate = lambda step: 0.0
    scalars = trainer.step(*batch(photos), rng(0), 0)
    assert scalars["discriminator_loss"] == pytest.approx(discriminator, rel=1e-6)
    assert scalars["generator_loss"] == pytest.approx(generator, rel=1e-6)
    assert scalars["penalty"] == 0
