"""The command as a user runs it: exit codes, messages, and what is left behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

VARIANT = "onnxruntime-fp32"


def vitrine(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vitrine", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_export_check_and_generate_print_one_json_document(
    diffusion_checkpoint: Path, tmp_path: Path
) -> None:
    artifact = tmp_path / "artifact"
    done = vitrine("export", diffusion_checkpoint, "--output", artifact, "--json")
    assert done.returncode == 0, done.stderr
    exported = {
        "artifact": str(artifact), "variant": VARIANT, "variants": [VARIANT],
        "replaced": [], "unchanged": False, "pending": False,
    }  # fmt: skip
    assert json.loads(done.stdout) == exported
    done = vitrine("export", diffusion_checkpoint, "--output", artifact, "--json")
    assert json.loads(done.stdout) == {**exported, "unchanged": True}
    assert f"{VARIANT} is up to date, nothing to do" in done.stderr.replace("\n", " ")
    done = vitrine("check", artifact, "--pictures", 4, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["psnr_db_min"] >= 60
    short = vitrine("check", artifact, "--pictures", 2, "--floor-psnr-db", 199, "--json")
    assert short.returncode == 1
    assert "is below the floor 199.0 dB" in json.loads(short.stdout)["error"]
    assert "is below the floor 199.0 dB" in short.stderr.replace("\n", " ")
    refused = vitrine("generate", artifact, "--label", "bag", "--output", tmp_path / "none")
    assert refused.returncode == 1
    assert "was refused: PSNR" in refused.stderr
    assert not (tmp_path / "none").exists()
    assert vitrine("check", artifact, "--pictures", 1).returncode == 0
    pictures = {}
    for model in (diffusion_checkpoint, artifact):
        folder = tmp_path / "pictures" / model.name
        done = vitrine(
            "generate", model, "--label", "bag", "--seed", 5, "--count", 2, "--steps", 4,
            "--guidance-scale", 2, "--sampler", "euler", "--output", folder, "--json",
        )  # fmt: skip
        assert json.loads(done.stdout) == {"files": [f"{folder}/5.png", f"{folder}/6.png"]}
        pictures[model] = np.asarray(Image.open(folder / "6.png")).astype(int)
    of_torch, of_artifact = pictures.values()
    assert np.abs(of_torch - of_artifact).max() <= 1  # a rounding apart at most


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--label", "hat"), "label must be one of bag, boot, coat, got 'hat'"),
        (
            ("--label", "bag", "--sampler", "x"),
            "sampler must be one of ddim, euler, euler_ancestral, ",
        ),
        (("--label", "bag", "--prompt", "a bag"), "this model takes no prompt, got 'a bag'; leave"),
        (("--label", "bag", "--height", 63), "height must be a multiple of 2, got 63; the near"),
        (("--label", "bag", "--image", "no.png"), "no.png"),
        (("--label", "bag", "--steps", 0), "num_inference_steps must be 1..1000, got 0"),
        (("--label", "bag", "--steps", 1001), "num_inference_steps must be 1..1000, got 1001"),
        (("--label", "bag", "--guidance-scale", "nan"), "guidance_scale must be a finite number"),
        (("--label", "bag", "--guidance-scale", "inf"), "guidance_scale must be a finite number"),
        (("--label", "bag", "--seed", -1), "seed must be 0..9223372036854775807, got -1"),
        (
            ("--label", "bag", "--variant", "int8"),
            "variant must be one of onnxruntime-fp32, got 'int8'",
        ),
        (("--label", "bag", "--count", 0), "--count"),
        (("--label", "bag", "--colour", "red"), "--colour"),
        ((), "label must be one of bag, boot, coat, got None"),
    ],
    ids=str,
)
def test_a_wrong_generate_exits_2_with_a_reason_and_leaves_nothing(
    arguments: tuple[object, ...], message: str, diffusion_artifact: Path, tmp_path: Path
) -> None:
    output = tmp_path / "pictures"
    done = vitrine("generate", diffusion_artifact, *arguments, "--output", output)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()


def test_a_checkpoint_and_an_artifact_are_not_taken_for_each_other(
    diffusion_checkpoint: Path, diffusion_artifact: Path, tmp_path: Path
) -> None:
    done = vitrine("check", diffusion_checkpoint)
    assert done.returncode == 2
    mend = f"export it first: vitrine export {diffusion_checkpoint} --output"
    assert mend in (done.stderr)
    done = vitrine("export", diffusion_artifact, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "is an artifact already" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_error_is_the_json_document_too(tmp_path: Path) -> None:
    done = vitrine("export", tmp_path / "none", "--output", tmp_path / "out", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout) == {"error": f"'{tmp_path / 'none'}' does not exist"}
    assert not (tmp_path / "out").exists()


def test_a_damaged_artifact_is_refused_by_every_command_that_reads_one(
    diffusion_artifact: Path, tmp_path: Path
) -> None:
    artifact = shutil.copytree(diffusion_artifact, tmp_path / "artifact")
    network = artifact / "graphs" / "fp32" / "unet.onnx"
    network.write_bytes(network.read_bytes()[:-1])
    for command in (
        ("generate", artifact, "--label", "bag", "--output", tmp_path / "out"),
        ("check", artifact),
        ("serve", artifact, "--repository", tmp_path / "repository"),
    ):
        done = vitrine(*command)
        assert done.returncode == 2
        assert "unet.onnx does not match its manifest" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


@pytest.mark.parametrize(
    "command", ["train", "generate", "export", "plan", "lint", "check", "serve", "demo"]
)
def test_every_command_explains_itself_and_takes_json(command: str) -> None:
    done = vitrine(command, "--help")
    assert done.returncode == 0
    assert "--json" in done.stdout


def test_a_missing_extra_a_bad_floor_and_an_unwritable_output_are_one_error_each(
    diffusion_artifact: Path, diffusion_checkpoint: Path, tmp_path: Path
) -> None:
    blocked = "import sys; sys.modules[{!r}] = None; import vitrine; vitrine.main()"
    for module, extra, command in (
        ("torch", "train", ["export", str(diffusion_checkpoint), "--output", str(tmp_path / "a")]),
        ("skimage", "export", ["check", str(diffusion_artifact), "--pictures", "1"]),
        ("onnxruntime", "cpu", ["export", str(diffusion_checkpoint), "--output", "a"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", blocked.format(module), *command],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 2
        assert f"{module} is not installed; pip install 'vitrine[{extra}]'" in done.stderr
    (tmp_path / "file").touch()
    done = vitrine("export", diffusion_checkpoint, "--output", tmp_path / "file" / "x", "--json")
    assert done.returncode == 2
    assert str(tmp_path / "file") in json.loads(done.stdout)["error"]
    done = vitrine("check", diffusion_artifact, "--floor-psnr-db", "nan", "--json")
    assert done.returncode == 2
    assert "psnr_db must be a finite number, got nan" in json.loads(done.stdout)["error"]
    done = vitrine("check", diffusion_artifact, "--floor-psnr-db", 500, "--json")
    assert done.returncode == 2
    assert "psnr_db must be" in json.loads(done.stdout)["error"]
    done = vitrine("check", diffusion_artifact, "--pictures", "many", "--json")
    assert done.returncode == 2
    assert "wrong use" in json.loads(done.stdout)["error"]
    assert "--pictures" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
