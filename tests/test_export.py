"""From checkpoint to artifact, and what the gate says of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from engine.artifact import (
    hash_files,
    new_artifact,
    read_artifact,
    write_manifest,
)
from engine.checkpoint import file_sha256, read_checkpoint
from engine.errors import ArtifactError, OptionError, QualityError
from engine.images import from_network_range, to_pillow
from engine.manifest import Manifest
from engine.pipeline import open_pipeline
from engine.request import Request
from export.build import VARIANT, export
from export.gate import Floors, check, gate_requests

UNET = f"{VARIANT}/unet.onnx"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
Damage = Callable[[Path], object]


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def checkpoint(diffusion_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(diffusion_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def artifact(diffusion_artifact: Path, tmp_path: Path) -> Path:
    """A copy to damage or to check, alone in its folder."""
    return Path(shutil.copytree(diffusion_artifact, tmp_path / "artifacts" / "tiny"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def edit(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text("utf-8"))
    change(values)
    path.write_text(json.dumps(values), "utf-8")


# Writing an artifact


def test_export_writes_every_file_and_its_hash(diffusion_artifact: Path) -> None:
    manifest = read_artifact(diffusion_artifact).manifest
    assert set(contents(diffusion_artifact)) == {"manifest.json", UNET}
    assert manifest.files == {UNET: file_sha256(diffusion_artifact / UNET)}
    assert manifest.selected == VARIANT
    assert manifest.variants[VARIANT].networks == {"unet": UNET}
    assert manifest.variants[VARIANT].accepted is None


def test_the_manifest_round_trips(diffusion_artifact: Path, diffusion_checkpoint: Path) -> None:
    written = json.loads((diffusion_artifact / "manifest.json").read_text("utf-8"))
    manifest = Manifest.parse(written)
    assert manifest.model_dump(mode="json") == written
    checkpoint = read_checkpoint(diffusion_checkpoint)
    assert manifest.model == checkpoint.model
    assert manifest.source.sha256 == checkpoint.sha256()


def test_others_may_read_what_export_wrote(diffusion_artifact: Path) -> None:
    assert diffusion_artifact.stat().st_mode & 0o777 == 0o755


def test_exporting_again_replaces_the_artifact(checkpoint: Path, artifact: Path) -> None:
    (artifact / "stale.txt").write_text("old")
    export(checkpoint, artifact)
    assert "stale.txt" not in contents(artifact)
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]


# The network file


def feed(timesteps: list[float]) -> dict[str, NDArray[np.generic]]:
    count = len(timesteps)
    sample = np.random.default_rng(0).standard_normal((count, 1, 16, 16), np.float32)
    return {
        "sample": sample,
        "timestep": np.array(timesteps, np.float32),
        "label": np.arange(count, dtype=np.int64) % 4,
    }


def test_the_onnx_file_is_valid_and_its_batch_is_dynamic(diffusion_artifact: Path) -> None:
    model = onnx.load(diffusion_artifact / UNET)
    onnx.checker.check_model(model, full_check=True)
    first_axes = {
        tensor.name: tensor.type.tensor_type.shape.dim[0].dim_param
        for tensor in (*model.graph.input, *model.graph.output)
    }
    assert first_axes == dict.fromkeys(("sample", "timestep", "label", "prediction"), "batch")
    assert {opset.domain: opset.version for opset in model.opset_import}[""] == 20


@pytest.mark.parametrize("count", [1, 2, 3, 7, 33])
def test_rows_at_different_timesteps_in_one_call_equal_each_alone(
    diffusion_artifact: Path, count: int
) -> None:
    session = onnxruntime.InferenceSession(str(diffusion_artifact / UNET))
    inputs = feed([999.0 - 30.25 * row for row in range(count)])
    (together,) = session.run(None, inputs)
    for row in range(count):
        (alone,) = session.run(None, {name: x[row : row + 1] for name, x in inputs.items()})
        np.testing.assert_array_equal(together[row], alone[0])


def test_timestep_and_label_of_a_row_both_matter(diffusion_artifact: Path) -> None:
    session = onnxruntime.InferenceSession(str(diffusion_artifact / UNET))
    inputs = feed([500.0])
    (plain,) = session.run(None, inputs)
    for other in ({"timestep": np.float32([501])}, {"label": np.array([2])}):
        (changed,) = session.run(None, {**inputs, **other})
        assert np.abs(changed - plain).max() > 1e-4


def test_the_onnx_file_computes_what_diffusers_does(
    diffusion_artifact: Path, diffusion_checkpoint: Path
) -> None:
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_pretrained(diffusion_checkpoint / "unet").eval()
    inputs = feed([999.0, 500.0, 0.0])
    with torch.inference_mode():
        expected = unet(*(torch.from_numpy(x) for x in inputs.values())).sample.numpy()
    (result,) = onnxruntime.InferenceSession(str(diffusion_artifact / UNET)).run(None, inputs)
    # float32 sums in another order: a few hundred roundings of 2^-24, values of a few units
    np.testing.assert_allclose(result, expected, atol=2e-5, rtol=0)


# Checkpoints that cannot be exported


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def pickle_instead(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "unet/diffusion_pytorch_model.bin")


def reshape_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["conv_in.weight"] = weights["conv_in.weight"][:, :, :2].contiguous()
    save_file(weights, folder / WEIGHTS)


def drop_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["conv_in.bias"]
    save_file(weights, folder / WEIGHTS)


def set_in(file: str, **values: object) -> Damage:
    return lambda folder: edit(folder / file, lambda found: found.update(values))


def delete_from(file: str, key: str) -> Damage:
    return lambda folder: edit(folder / file, lambda found: found.pop(key))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
    "no config": (lambda f: (f / "unet/config.json").unlink(), "has no unet/config.json"),
    "no labels": (lambda f: (f / "labels.json").unlink(), "has no labels.json"),
    "no scheduler": (
        lambda f: (f / "scheduler/scheduler_config.json").unlink(),
        "has no scheduler/scheduler_config.json",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), "must hold a JSON"),
    "index is cut": (lambda f: (f / "model_index.json").write_text('{"un'), "not readable JSON"),
    "pickle": (pickle_instead, "diffusion_pytorch_model.bin' is a pickle, which can run code"),
    "truncated": (truncate, "unet' does not load"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "unet' does not load"),
    "other shape": (reshape_a_tensor, "size mismatch for conv_in.weight"),
    "tensor missing": (drop_a_tensor, r"Missing key\(s\) in state_dict: .conv_in.bias"),
    "other class": (
        set_in("model_index.json", unet=["diffusers", "UNet3DModel"]),
        "unet of class UNet3DModel, which is not known; known are unet of class UNet2DModel",
    ),
    "half an entry": (set_in("model_index.json", unet=["diffusers"]), "unet of class diffusers"),
    "two networks": (
        set_in("model_index.json", generator=["engine", "Generator"]),
        r"must have one network, got \['generator', 'unet'\]",
    ),
    "too few labels": (
        set_in("labels.json", labels=["bag"]),
        "num_class_embeds 4, but labels.json names 1 labels; it must have as many, or one more",
    ),
    "labels are numbers": (set_in("labels.json", labels=[1, 2, 3]), "a list of class names"),
    "no channels": (delete_from("unet/config.json", "in_channels"), "has no in_channels"),
    "four channels": (
        set_in("unet/config.json", in_channels=4),
        "unet/config.json': channels must be one of 1, 3, got 4",
    ),
    "channels are text": (set_in("unet/config.json", in_channels="x"), "unet/config.json': inv"),
    "no size": (set_in("unet/config.json", sample_size=None), "must name its sample_size"),
    "no groups": (set_in("unet/config.json", norm_num_groups=0), "unet' does not load"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_clear_error_and_the_old_artifact_stays(
    damage: str, checkpoint: Path, artifact: Path
) -> None:
    apply, message = DAMAGES[damage]
    apply(checkpoint)
    before = contents(artifact.parent)
    with pytest.raises(ArtifactError, match=message) as raised:
        export(checkpoint, artifact)
    assert len(str(raised.value).splitlines()) == 1
    assert contents(artifact.parent) == before
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]


@pytest.mark.parametrize("damage", ["truncated", "other class"])
def test_a_damaged_checkpoint_leaves_no_new_folder(
    damage: str, checkpoint: Path, tmp_path: Path
) -> None:
    DAMAGES[damage][0](checkpoint)
    with pytest.raises(ArtifactError):
        export(checkpoint, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_scheduler_option_that_is_not_honoured_is_refused(checkpoint: Path) -> None:
    set_in("scheduler/scheduler_config.json", trained_betas=[0.1])(checkpoint)
    with pytest.raises(OptionError, match=r"trained_betas must be null, got \[0.1\]"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("labels.json", {"labels": ["bag"]}, "num_class_embeds 3, but labels.json names 1"),
        ("labels.json", {"labels": list("abcd")}, "num_class_embeds 3, but labels.json names 4"),
        ("generator/config.json", {"out_channels": 2}, "channels must be one of 1, 3, got 2"),
        ("generator/config.json", {"block_out_channels": 5}, "generator/config.json'"),
        ("generator/config.json", {"block_out_channels": [8]}, "generator' does not load"),
    ],
)
def test_a_gan_checkpoint_that_does_not_fit_itself_is_one_clear_error(
    gan_checkpoint: Path, tmp_path: Path, file: str, values: dict[str, object], message: str
) -> None:
    folder = Path(shutil.copytree(gan_checkpoint, tmp_path / "gan"))
    set_in(file, **values)(folder)
    with pytest.raises(ArtifactError, match=message):
        open_pipeline(folder)


# Where an artifact may be written


def test_an_output_that_is_no_artifact_is_refused_and_kept(
    diffusion_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "dog.png").write_bytes(b"a dog")
    for output in (folder, folder / "dog.png"):
        with pytest.raises(ArtifactError, match=r"exists and is not an artifact; choose another"):
            export(diffusion_checkpoint, output)
    assert contents(tmp_path) == {"photos/dog.png": b"a dog"}


def test_an_empty_folder_may_become_an_artifact(tmp_path: Path) -> None:
    with new_artifact(tmp_path / "empty") as folder:
        (folder / "file").write_text("whole")
    (tmp_path / "other").mkdir()
    with new_artifact(tmp_path / "other") as folder:
        (folder / "file").write_text("whole")
    assert contents(tmp_path) == {"empty/file": b"whole", "other/file": b"whole"}


def stop_half_way(artifact: Path, error: type[BaseException]) -> None:
    with new_artifact(artifact) as folder:
        (folder / "half.onnx").write_bytes(b"half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_stop_in_the_middle_leaves_the_old_artifact(
    artifact: Path, error: type[BaseException]
) -> None:
    before = contents(artifact.parent)
    with pytest.raises(error):
        stop_half_way(artifact, error)
    assert contents(artifact.parent) == before
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]
    read_artifact(artifact)


# Artifacts that cannot be read


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-1]), f"{UNET} does not match"),
        (lambda f: flip_a_bit(f / UNET), f"{UNET} does not match its manifest .sha256"),
        (lambda f: (f / UNET).unlink(), f"lacks {UNET}"),
    ],
    ids=["truncated", "bit flipped", "missing"],
)
def test_a_damaged_artifact_names_the_file_and_the_command_that_mends_it(
    artifact: Path, diffusion_checkpoint: Path, damage: Damage, message: str
) -> None:
    damage(artifact)
    with pytest.raises(ArtifactError, match=message) as raised:
        open_pipeline(artifact)
    mend = f"export it again: vitrine export {diffusion_checkpoint} --output {artifact}"
    assert str(raised.value).endswith(mend)


def other_path(path: str) -> Damage:
    def apply(values: dict) -> None:
        values["variants"][VARIANT]["networks"]["unet"] = path
        values["files"] = {path: "0" * 64}

    return lambda folder: edit(folder / "manifest.json", apply)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").write_text('{"name": "shop"}'), "has format None, this"),
        (set_in("manifest.json", format=2), "has format 2, this version reads 1; export it again"),
        (set_in("manifest.json", colour="red"), "manifest.json: unknown key 'colour'.*export it"),
        (delete_from("manifest.json", "model"), "manifest.json: model is required; export it"),
        (
            set_in("manifest.json", selected="int8"),
            "selects int8, which is not one.*; export it",
        ),
        (set_in("manifest.json", files={}), f"names {UNET}, not in files; export it again"),
        (other_path("../unet.onnx"), "may not leave the artifact, got '../unet.onnx'; export it"),
        (other_path("/etc/passwd"), "may not leave the artifact, got '/etc/passwd'; export it"),
        (other_path("a/../../b"), "may not leave the artifact"),
        (other_path("..\\b"), "may not leave the artifact"),
        (other_path(""), "may not leave the artifact"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    artifact: Path, damage: Damage, message: str
) -> None:
    damage(artifact)
    with pytest.raises(ArtifactError, match=message) as raised:
        read_artifact(artifact)
    assert str(artifact) in str(raised.value)


def test_a_manifest_that_is_cut_off_is_not_readable_json(artifact: Path) -> None:
    path = artifact / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"manifest.json' is not readable JSON"):
        read_artifact(artifact)


def test_a_folder_that_is_neither_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"neither an artifact \(manifest.json\) nor a check"):
        open_pipeline(tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        read_artifact(tmp_path / "nothing")


def test_a_checkpoint_has_no_variants(diffusion_checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="a checkpoint has no variants, got 'fp8'"):
        open_pipeline(diffusion_checkpoint, "fp8")


# The gate


@pytest.mark.parametrize("kind", ["diffusion", "gan"])
def test_an_artifact_draws_the_pictures_of_its_checkpoint(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(f"{kind}_artifact")
    folder = Path(shutil.copytree(source, tmp_path / kind))
    quality = check(folder, pictures=32, floors=Floors(psnr_db=60.0, ssim=0.9999))
    assert quality.pictures == 32
    assert quality.psnr_db_min >= 60
    assert quality.ssim_min >= 0.9999
    checked = read_artifact(folder).manifest  # which verifies every hash
    variant = checked.variants[checked.selected]
    assert (variant.accepted, variant.reason, variant.quality) == (True, "", quality)
    assert quality.worst_picture in checked.files


def test_the_gate_asks_for_every_sampler_label_and_kind_of_guidance(
    diffusion_checkpoint: Path,
) -> None:
    model = read_checkpoint(diffusion_checkpoint).model
    requests = gate_requests(model, 32)
    assert {request.label for request in requests} == set(model.labels)
    assert {request.sampler for request in requests} == set(model.samplers)
    assert {request.guidance_scale for request in requests} == {1.0, 2.0, 3.5, 5.0}
    steps = [request.num_inference_steps or 0 for request in requests]
    assert min(steps) == 4
    assert max(steps) == 30


def worsen(artifact: Path, factor: float) -> None:
    """Multiply the last convolution and sign the artifact anew, as a bad quantizer would."""
    model = onnx.load(artifact / UNET)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("conv_out.weight"):
            scaled = onnx.numpy_helper.to_array(tensor) * np.float32(factor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(scaled, tensor.name))
            break
    else:
        raise AssertionError("no conv_out.weight to worsen")
    onnx.save(model, artifact / UNET)
    manifest = read_manifest(artifact)
    write_manifest(artifact, manifest.model_copy(update={"files": hash_files(artifact)}))


def read_manifest(artifact: Path) -> Manifest:
    return Manifest.parse(json.loads((artifact / "manifest.json").read_text("utf-8")))


def test_a_wrong_network_is_under_the_floor_and_the_manifest_says_so(artifact: Path) -> None:
    worsen(artifact, 1.5)
    with pytest.raises(QualityError) as raised:
        check(artifact, pictures=4)
    variant = read_artifact(artifact).manifest.variants[VARIANT]
    assert variant.quality is not None
    evidence = artifact / variant.quality.worst_picture
    assert str(raised.value) == (
        f"PSNR {variant.quality.psnr_db_min:.1f} dB is below the floor 35.0 dB "
        f"({VARIANT}, worst seed {variant.quality.worst_seed}); see {evidence}"
    )
    assert evidence.is_file()
    assert raised.value.exit_code == 1
    assert variant.accepted is False
    assert "below the floor 35.0 dB" in variant.reason


def test_ssim_has_a_floor_of_its_own(artifact: Path) -> None:
    with pytest.raises(QualityError, match=r"mean SSIM 1.0000 is below the floor 1.1000 .*seed"):
        check(artifact, pictures=2, floors=Floors(psnr_db=0, ssim=1.1))


def test_a_floor_that_is_not_a_number_is_refused_before_any_work() -> None:
    for name in ("psnr_db", "ssim"):
        with pytest.raises(OptionError, match=f"{name} must be a finite number, got nan"):
            Floors.parse({name: float("nan")})


def test_pixels_that_are_not_numbers_are_refused_and_the_manifest_says_so(artifact: Path) -> None:
    check(artifact, pictures=1)
    worsen(artifact, float("nan"))
    with pytest.raises(QualityError, match=f"{VARIANT} makes NaN or infinite pixels for seed 0"):
        check(artifact, pictures=1)
    variant = read_artifact(artifact).manifest.variants[VARIANT]
    assert variant.accepted is False
    assert "NaN" in variant.reason
    assert variant.quality is None


def test_the_evidence_is_reference_result_and_their_difference(
    artifact: Path, diffusion_checkpoint: Path
) -> None:
    worsen(artifact, 1.5)
    quality = check(artifact, pictures=3, floors=Floors(psnr_db=0, ssim=-1))
    request = gate_requests(read_manifest(artifact).model, 3)[quality.worst_seed]
    pictures = [_picture(path, request) for path in (diffusion_checkpoint, artifact)]
    difference = np.abs(pictures[0] - pictures[1])
    with Image.open(artifact / quality.worst_picture) as sheet:
        assert sheet.width == 3 * (192 + 6) + 6
        panels = [sheet.crop((6 + 198 * n, 6, 198 + 198 * n, 198)) for n in range(3)]
    for panel, expected in zip(panels, [*pictures, difference / difference.max()], strict=True):
        small = np.asarray(panel.convert("L").resize((16, 16), Image.Resampling.NEAREST))
        wanted = np.asarray(to_pillow(np.rint(expected * 255).astype(np.uint8)))
        assert np.abs(small.astype(int) - wanted).max() <= 1  # one level: rounding of a half


def _picture(path: Path, request: Request) -> NDArray[np.float32]:
    (row,) = open_pipeline(path).run([request])
    return from_network_range(row.x)


def test_checking_again_replaces_the_evidence(artifact: Path) -> None:
    before = check(artifact, pictures=1)
    after = check(artifact, pictures=3)
    assert check(artifact, pictures=3) == after
    assert before.worst_picture != after.worst_picture
    assert set(contents(artifact)) == {"manifest.json", UNET, after.worst_picture}
    read_artifact(artifact)


def test_a_checkpoint_that_has_gone_is_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    artifact = export(checkpoint, tmp_path / "artifact").path
    moved = checkpoint.rename(tmp_path / "moved")
    with pytest.raises(ArtifactError, match=r"checkpoint'.* does not exist; name its .*--checkpoi"):
        check(artifact, pictures=1)
    assert check(artifact, moved, pictures=1).pictures == 1


def test_another_checkpoint_is_not_taken_for_the_source(artifact: Path, checkpoint: Path) -> None:
    set_in("labels.json", labels=["bag", "boot", "hat"])(checkpoint)
    with pytest.raises(ArtifactError, match="is not the one that") as raised:
        check(artifact, checkpoint, pictures=1)
    assert f"vitrine export {checkpoint} --output {artifact}" in str(raised.value)
    assert read_artifact(artifact).manifest.variants[VARIANT].accepted is None


def test_a_variant_that_is_not_there_is_refused(artifact: Path) -> None:
    with pytest.raises(OptionError, match=f"variant must be one of {VARIANT}, got 'fp8'"):
        check(artifact, pictures=1, variant="fp8")
