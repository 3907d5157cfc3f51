"""What a shop's folder or a hurried config gets wrong is named before anything is written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from engine.errors import ArtifactError, OptionError
from engine.training.config import DataConfig, DiffusionConfig, GanConfig
from engine.training.data import Dataset, load_dataset
from engine.training.loop import _batch, train

QUIET = Console(quiet=True)
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of four gray 8x8 pictures."""
    for shade, name in enumerate(("bag", "coat")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            picture = Image.new("L", (8, 8), 100 * shade + number)
            picture.save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def gan(photos: Path, **options: object) -> GanConfig:
    data = {"path": str(photos), "resolution": 8, "channels": 1}
    network = {"block_out_channels": [8, 8], "latent_size": 4}
    defaults = {"kind": "gan", "steps": 1, "batch_size": 4, "data": data, "network": network}
    return GanConfig.parse({**defaults, **options})


def diffusion(photos: Path, **network: object) -> DiffusionConfig:
    data = {"path": str(photos), "resolution": 8, "channels": 1}
    sizes = {"block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 8}
    return DiffusionConfig.parse(
        {"kind": "diffusion", "steps": 1, "data": data, "network": {**sizes, **network}}
    )


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"block_out_channels": []}, "at least 1 level.*got 0 levels"),
        ({"block_out_channels": [8] * 5}, "halves data.resolution 8.*got 5 levels"),
        ({"norm_num_groups": 3}, r"norm_num_groups must divide block_out_channels \(8, 8\), got 3"),
        ({"attention_head_dim": 16}, "attention_head_dim must be 1..8, .* got 16"),
        ({"attention_head_dim": 16, "attention_levels": 0}, "attention_head_dim must be 1..8"),
    ],
)
def test_a_unet_that_cannot_run_is_refused_before_a_folder_is_made(
    network: dict[str, object], message: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        train(diffusion(photos, **network), tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "network",
    [
        {"block_out_channels": [8]},
        {"block_out_channels": [8] * 4},
        {"block_out_channels": [8, 24], "attention_head_dim": 16},
        {"attention_levels": 9},
    ],
)
def test_a_unet_at_the_edge_of_what_is_allowed_trains(
    network: dict[str, object], photos: Path, tmp_path: Path
) -> None:
    assert train(diffusion(photos, **network), tmp_path / "out", QUIET) == 1


def test_a_training_does_not_go_on_with_another_number_of_classes(
    photos: Path, tmp_path: Path
) -> None:
    train(gan(photos), tmp_path / "out", QUIET)
    (photos / "shoe").mkdir()
    Image.new("L", (8, 8)).save(photos / "shoe" / "0.png")
    with pytest.raises(ArtifactError, match=r"state.safetensors' does not fit.*size mismatch"):
        train(gan(photos, steps=2), tmp_path / "out", QUIET)


@pytest.mark.parametrize("metadata", [None, {"step": "1"}, {"step": "1", "config": "{"}])
def test_a_safetensors_file_that_is_no_training_state_is_named(
    metadata: dict[str, str] | None, photos: Path, tmp_path: Path
) -> None:
    state = tmp_path / "out" / "training" / "state.safetensors"
    state.parent.mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, state, metadata)
    with pytest.raises(ArtifactError, match=r"state.safetensors' is damaged.*delete it"):
        train(gan(photos), tmp_path / "out", QUIET)


def test_the_noise_of_a_training_depends_on_seed_and_step() -> None:
    """torch's CPU generator takes the low 32 bits of what it is given."""
    dataset = Dataset(np.zeros((4, 1, 8, 8), np.uint8), np.zeros(4, np.int64), ("bag",))
    configs = [gan(Path(), seed=seed) for seed in (0, 1, 2**32 - 1)]
    generators = [_batch(dataset, config, step, CPU)[2] for config in configs for step in range(3)]
    assert len({tuple(torch.rand(4, generator=each).tolist()) for each in generators}) == 9


def test_a_png_with_a_damaged_chunk_is_skipped_by_name(photos: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (220, 220, 3), dtype=np.uint8)
    path = photos / "bag" / "torn.png"
    Image.fromarray(noise).save(path)
    raw = path.read_bytes()
    second = raw.index(b"IDAT", raw.index(b"IDAT") + 4)  # Pillow meets it while it decodes
    path.write_bytes(raw[:second] + b"I\xffAT" + raw[second + 4 :])
    dataset = load_dataset(DataConfig(path=str(photos), resolution=8, max_skipped=0.5))
    assert dataset.skipped == ("bag/torn.png",)


def test_a_16_bit_png_keeps_its_shades(photos: Path) -> None:
    ramp = np.repeat(np.arange(8, dtype=np.uint16)[:, None] * 8192, 8, axis=1)
    Image.fromarray(ramp).save(photos / "bag" / "0.png")
    dataset = load_dataset(DataConfig(path=str(photos), resolution=8, channels=1))
    assert dataset.images[0, 0, :, 0].tolist() == [32 * row for row in range(8)]
