"""The demo with the shipped checkpoints: what the project promises of them."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.demo import run_demo
from engine.errors import ArtifactError, QualityError

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


@pytest.mark.slow
def test_the_demo_serves_every_picture_as_it_was_made_alone(tmp_path: Path) -> None:
    report = run_demo(CHECKPOINTS, tmp_path)
    assert report == json.loads((tmp_path / "report.json").read_text())
    for model in ("fashion-diffusion", "fashion-gan"):
        parity, served = report["parity"][model], report["served"][model]  # type: ignore[index]
        assert parity["pictures"] == 32
        assert parity["psnr_db_min"] >= 60
        assert parity["ssim_min"] >= 0.9999
        assert served["requests"] == served["byte_identical"] == 32
        # a GAN answers as fast as one client asks, so its batches depend on the machine
        assert served["rows_per_tick"] >= (8 if model == "fashion-diffusion" else 1.2)
        assert 0 < served["p50_ms"] <= served["p95_ms"]
    width, height = Image.open(tmp_path / "gallery.png").size
    assert width >= 8 * 96
    assert height >= 8 * 96


def test_the_demo_without_checkpoints_says_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="name the folder with --checkpoints"):
        run_demo(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_ends_the_demo_with_its_name(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS / "fashion-gan", tmp_path / "checkpoints" / "fashion-gan")
    weights = next((tmp_path / "checkpoints").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises((ArtifactError, QualityError), match="fashion-gan"):
        run_demo(tmp_path / "checkpoints", tmp_path / "out")
    assert not (tmp_path / "out" / "artifacts" / "fashion-gan").exists()
