"""From checkpoint to artifact, and what the gate says of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from damage import contents, read_manifest, set_in, truncate_file
from numpy.typing import NDArray
from PIL import Image

from engine.artifact import hash_files, read_artifact, write_manifest
from engine.checkpoint import file_sha256, read_checkpoint
from engine.errors import ArtifactError, OptionError, QualityError
from engine.images import from_network_range, to_pillow
from engine.manifest import Manifest
from engine.pipeline import open_pipeline
from engine.request import Request
from export.build import export
from export.gate import Floors, check, gate_requests
from export.variant import VariantOptions

VARIANT = "onnxruntime-fp32"
UNET = "graphs/fp32/unet.onnx"

pytestmark = pytest.mark.usefixtures("one_torch_thread")


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


def test_exporting_another_checkpoint_replaces_the_artifact(
    checkpoint: Path, artifact: Path
) -> None:
    (artifact / "stale.txt").write_text("old")
    set_in("labels.json", labels=["bag", "boot", "hat"])(checkpoint)
    exported = export(checkpoint, artifact)
    assert not exported.unchanged
    assert exported.replaced == (VARIANT,)  # the command says so
    assert exported.artifact == read_artifact(artifact)
    assert exported.artifact.manifest.model.labels == ("bag", "boot", "hat")
    assert exported.artifact.manifest.source.sha256 == read_checkpoint(checkpoint).sha256()
    assert set(contents(artifact)) == {"manifest.json", UNET}
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]


def test_exporting_an_unchanged_checkpoint_does_no_work(
    checkpoint: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_tracing(monkeypatch)
    check(artifact, pictures=1)
    before, written_ns = contents(artifact), (artifact / "manifest.json").stat().st_mtime_ns
    again = export(checkpoint, artifact)  # elsewhere by now, and the same
    assert (again.unchanged, again.variant) == (True, VARIANT)
    assert again.artifact.manifest.variants[VARIANT].accepted is True  # what a check found stays
    assert contents(artifact) == before
    assert (artifact / "manifest.json").stat().st_mtime_ns == written_ns


def forbid_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(*arguments: object, **options: object) -> None:
        raise AssertionError("a graph that is there already was exported again")

    monkeypatch.setattr("torch.onnx.export", trace)


def test_exporting_again_mends_a_damaged_artifact(checkpoint: Path, artifact: Path) -> None:
    whole = (artifact / UNET).read_bytes()
    truncate_file(artifact / UNET)
    assert not export(checkpoint, artifact).unchanged
    assert (artifact / UNET).read_bytes() == whole
    assert set(contents(artifact)) == {"manifest.json", UNET}


def test_a_second_variant_joins_the_first_and_shares_its_graphs(
    checkpoint: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_tracing(monkeypatch)
    check(artifact, pictures=1)
    before = read_artifact(artifact).manifest
    joined = export(checkpoint, artifact, VariantOptions(runtime="openvino"))
    manifest = joined.artifact.manifest
    assert (joined.variant, joined.unchanged) == ("openvino-fp32", False)
    assert manifest.variants[joined.variant].networks == {"unet": UNET}
    assert manifest.variants[VARIANT] == before.variants[VARIANT]
    assert (manifest.selected, manifest.files) == (VARIANT, before.files)


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
    artifact = export(checkpoint, tmp_path / "artifact").artifact.path
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
