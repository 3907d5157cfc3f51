"""The gate: an artifact's pictures against its checkpoint's, and which check refuses what."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from damage import contents, read_manifest, set_in
from damaged_graphs import add_batch_mean_to_output, add_to_output, fill, multiply
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from engine.artifact import hash_files, read_artifact, write_manifest
from engine.checkpoint import read_checkpoint
from engine.errors import ArtifactError, OptionError, QualityError
from engine.images import to_pillow
from engine.manifest import Floors, Variant
from engine.pipeline import open_pipeline
from engine.request import Request
from export.build import export
from export.calibrate import CalibrationOptions
from export.gate import check
from export.requests import gate_requests
from export.variant import VariantOptions
from serving.repository import write_repository

FP32, INT8 = "onnxruntime-fp32", "onnxruntime-int8"
UNET, GENERATOR = "graphs/fp32/unet.onnx", "graphs/fp32/generator.onnx"
INT8_UNET = f"graphs/{INT8}/unet.onnx"
CALIBRATION = CalibrationOptions(rows=32)  # the fewest that are allowed
ANY = Floors(psnr_db=0, ssim=-1)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def with_int8(
    diffusion_artifact: Path,
    diffusion_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """`diffusion_artifact` with an int8 variant beside the fp32 one; read only."""
    folder = tmp_path_factory.mktemp("int8") / "tiny"
    shutil.copytree(diffusion_artifact, folder)
    options = VariantOptions(precision="int8", calibration=CALIBRATION)
    return export(diffusion_checkpoint, folder, options).artifact.path


@pytest.fixture
def int8(with_int8: Path, tmp_path: Path) -> Path:
    """A copy of `with_int8` to damage or to check."""
    return Path(shutil.copytree(with_int8, tmp_path / "tiny"))


@pytest.fixture
def gan_copy(gan_artifact: Path, tmp_path: Path) -> Path:
    """A copy of `gan_artifact` to damage or to check."""
    return Path(shutil.copytree(gan_artifact, tmp_path / "tiny-gan"))


def verdict(artifact: Path, name: str = FP32) -> Variant:
    """What the manifest says of a variant; reading verifies every hash."""
    return read_artifact(artifact).manifest.variants[name]


def pictures(path: Path, requests: Sequence[Request], variant: str | None = None):
    """What a pipeline draws, `[H, W, C]` in [0, 1], by arithmetic of our own."""
    pipeline = open_pipeline(path, variant)
    rows = list(pipeline.run(requests))
    pipeline.close()
    return [np.clip(np.moveaxis(row.x, 0, -1) / 2 + 0.5, 0, 1) for row in rows]


# What is asked


def test_the_gate_asks_for_every_sampler_and_label_at_the_guidance_of_the_model(
    diffusion_checkpoint: Path,
) -> None:
    model = read_checkpoint(diffusion_checkpoint).model
    assert model.defaults is not None
    requests = gate_requests(model, 32)
    assert {request.label for request in requests} == set(model.labels)
    assert {request.sampler for request in requests} == set(model.samplers)
    assert {request.guidance_scale for request in requests} == {model.defaults.guidance_scale}
    steps = [request.num_inference_steps or 0 for request in requests]
    assert min(steps) == 4
    assert max(steps) == 30
    assert {(r.sampler, r.num_inference_steps) for r in requests[::4]} == {
        (model.defaults.sampler, model.defaults.num_inference_steps)
    }


# What is measured


@pytest.mark.parametrize("kind", ["diffusion", "gan"])
def test_an_artifact_draws_the_pictures_of_its_checkpoint(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(f"{kind}_artifact")
    folder = Path(shutil.copytree(source, tmp_path / kind))
    floors = Floors(psnr_db=60.0, ssim=0.9999)
    quality = check(folder, pictures=32, floors=floors)
    assert quality.pictures == 32
    assert quality.psnr_db_min >= 60
    assert quality.ssim_min >= 0.9999
    checked = read_artifact(folder).manifest  # which verifies every hash
    variant = checked.variants[checked.selected]
    assert (variant.accepted, variant.reason, variant.quality) == (True, "", quality)
    assert quality.worst_picture in checked.files
    assert (quality.floors, quality.simulated) == (floors, False)


def test_the_figures_are_those_of_scikit_image(int8: Path, diffusion_checkpoint: Path) -> None:
    quality = check(int8, pictures=6, floors=ANY, variant=INT8)
    requests = gate_requests(read_manifest(int8).model, 6)
    pairs = list(
        zip(pictures(diffusion_checkpoint, requests), pictures(int8, requests, INT8), strict=True)
    )
    psnrs = [peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    ssims = [
        structural_similarity(*pair, data_range=1, channel_axis=-1, **options) for pair in pairs
    ]
    isrs = [10 * np.log10((a.astype(float) ** 2).sum() / ((a - b) ** 2).sum()) for a, b in pairs]
    expected = {
        "psnr_db_min": min(psnrs), "psnr_db_mean": np.mean(psnrs),
        "ssim_min": min(ssims), "ssim_mean": np.mean(ssims),
        "isr_db_min": min(isrs), "isr_db_mean": np.mean(isrs),
    }  # fmt: skip
    found = quality.model_dump(include=set(expected))
    assert found == pytest.approx(expected, rel=1e-5)  # sums in float32 here, in float64 there
    assert quality.worst_seed == int(np.argmin(psnrs))
    assert quality.psnr_db_min < quality.psnr_db_mean < 100  # pictures that do differ


def test_the_evidence_is_reference_result_and_difference_of_the_worst_three(
    artifact: Path, diffusion_checkpoint: Path
) -> None:
    multiply(artifact, UNET, "conv_out.weight", 1.5)
    quality = check(artifact, pictures=5, floors=ANY)
    requests = gate_requests(read_manifest(artifact).model, 5)
    of_both = [pictures(path, requests) for path in (diffusion_checkpoint, artifact)]
    psnrs = [peak_signal_noise_ratio(*pair, data_range=1) for pair in zip(*of_both, strict=True)]
    worst = np.argsort(psnrs)[:3]
    assert quality.worst_seed == worst[0]
    with Image.open(artifact / quality.worst_picture) as sheet:
        # three panels of 192 pixels across; a caption of 14 under each; gaps of 6
        assert sheet.size == (3 * 198 + 6, 3 * 212 + 6)
        for row, seed in enumerate(worst):
            reference, result = (found[seed] for found in of_both)
            difference = np.abs(reference - result)
            for column, expected in enumerate((reference, result, difference / difference.max())):
                left, top = 6 + 198 * column, 6 + 212 * row
                assert_shows(sheet.crop((left, top, left + 192, top + 192)), expected)


def assert_shows(panel: Image.Image, expected: NDArray[np.float32]) -> None:
    small = np.asarray(panel.convert("L").resize((16, 16), Image.Resampling.NEAREST))
    wanted = np.asarray(to_pillow(np.rint(expected * 255).astype(np.uint8)))
    assert np.abs(small.astype(int) - wanted).max() <= 1  # one level: rounding of a half


def test_checking_again_replaces_the_evidence(artifact: Path) -> None:
    before = check(artifact, pictures=1)
    after = check(artifact, pictures=3)
    assert check(artifact, pictures=3) == after
    assert before.worst_picture != after.worst_picture
    assert set(contents(artifact)) == {"manifest.json", UNET, after.worst_picture}
    read_artifact(artifact)


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
def test_a_tensorrt_variant_without_plans_is_judged_by_its_graphs_on_the_cpu(
    precision: str, gan_checkpoint: Path, gan_copy: Path
) -> None:
    options = VariantOptions(runtime="tensorrt", precision=precision, calibration=CALIBRATION)
    name = export(gan_checkpoint, gan_copy, options).variant
    quality = check(gan_copy, pictures=4, floors=ANY, variant=name)
    assert quality.simulated
    manifest = read_artifact(gan_copy).manifest
    entry = manifest.variants[name]
    assert (entry.networks, entry.accepted, entry.quality) == ({}, True, quality)
    assert quality.psnr_db_min < 100  # not the fp32 graph's


# What is refused, each by the check that should catch it


def test_an_int8_variant_is_accepted_until_the_scale_of_one_layer_is_eight_times_too_large(
    int8: Path,
) -> None:
    floors = Floors(psnr_db=25)  # weights at random take int8 worse than trained ones
    check(int8, pictures=4, floors=floors, variant=INT8)
    assert verdict(int8, INT8).accepted is True
    multiply(int8, INT8_UNET, "mid_block.resnets.0.conv1.weight/scale", 8)
    with pytest.raises(QualityError, match=r"^PSNR .* below the floor 25.0 dB \(onnxruntime-int8"):
        check(int8, pictures=4, floors=floors, variant=INT8)
    refused = verdict(int8, INT8)
    assert refused.accepted is False
    assert re.fullmatch(r"PSNR \d+\.\d dB is below the floor 25.0 dB", refused.reason)
    assert verdict(int8, FP32).accepted is None


def test_one_value_that_is_no_number_is_refused_by_the_detector(gan_copy: Path) -> None:
    one = np.zeros((1, 1, 16, 16), np.float32)
    one[0, 0, 3, 5] = np.nan
    check(gan_copy, pictures=2)
    add_to_output(gan_copy, GENERATOR, one)
    message = r"the picture of seed 0 is broken \(NaN\): 1 of 256 values are NaN or infinite"
    with pytest.raises(QualityError, match=f"^{FP32}: {message}"):
        check(gan_copy, pictures=2)
    refused = verdict(gan_copy)
    assert (refused.accepted, refused.quality) == (False, None)
    assert re.match(message, refused.reason)
    assert not list((gan_copy / "quality").iterdir())  # the evidence of what it was before


def test_black_pictures_are_refused_by_the_detector(gan_copy: Path) -> None:
    fill(gan_copy, GENERATOR, "output.weight", 0)
    fill(gan_copy, GENERATOR, "output.bias", -1)
    message = r"the picture of seed 0 is broken \(black\): its brightest value is 0.0 of 255"
    with pytest.raises(QualityError, match=f"^{FP32}: {message}"):
        check(gan_copy, pictures=2)
    assert re.match(message, verdict(gan_copy).reason)


@pytest.mark.parametrize(("kind", "graph"), [("diffusion", UNET), ("gan", GENERATOR)])
def test_pictures_that_depend_on_their_batch_are_refused(
    kind: str, graph: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(f"{kind}_artifact")
    folder = Path(shutil.copytree(source, tmp_path / kind))
    add_batch_mean_to_output(folder, graph, 1e-4)  # 80 dB: no floor would find it
    with pytest.raises(QualityError, match=r"the picture of seed \d depends on the batch: alone"):
        check(folder, pictures=4)
    assert "depends on the batch" in verdict(folder).reason


def test_a_wrong_network_is_under_the_floor_and_the_manifest_says_so(artifact: Path) -> None:
    multiply(artifact, UNET, "conv_out.weight", 1.5)
    with pytest.raises(QualityError) as raised:
        check(artifact, pictures=4)
    variant = verdict(artifact)
    assert variant.quality is not None
    evidence = artifact / variant.quality.worst_picture
    assert str(raised.value) == (
        f"PSNR {variant.quality.psnr_db_min:.1f} dB is below the floor 35.0 dB "
        f"({FP32}, worst seed {variant.quality.worst_seed}); see {evidence}"
    )
    assert evidence.is_file()
    assert raised.value.exit_code == 1
    assert variant.accepted is False
    assert "below the floor 35.0 dB" in variant.reason


def test_an_overridden_floor_is_recorded_with_what_it_let_through(artifact: Path) -> None:
    multiply(artifact, UNET, "conv_out.weight", 1.01)
    with pytest.raises(QualityError, match=r"below the floor 60\.0 dB"):
        check(artifact, pictures=2, floors=Floors(psnr_db=60))
    recorded = verdict(artifact).quality
    assert recorded is not None
    assert recorded.floors == Floors(psnr_db=60.0, ssim=0.98)
    lower = Floors(psnr_db=10.0, ssim=0.5)
    check(artifact, pictures=2, floors=lower)
    accepted = verdict(artifact)
    assert accepted.quality == recorded.model_copy(update={"floors": lower})
    assert (accepted.accepted, accepted.reason) == (True, "")
    assert (Floors().psnr_db, Floors().ssim) == (35.0, 0.98)


def test_ssim_has_a_floor_of_its_own(int8: Path) -> None:
    with pytest.raises(QualityError, match=r"mean SSIM 0.\d{4} is below the floor 1.0000 .*seed"):
        check(int8, pictures=2, floors=Floors(psnr_db=0, ssim=1), variant=INT8)


def test_a_floor_that_is_not_a_number_is_refused_before_any_work() -> None:
    for name in ("psnr_db", "ssim"):
        with pytest.raises(OptionError, match=f"{name} must be a finite number, got nan"):
            Floors.parse({name: float("nan")})


# What it cannot be asked


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
    assert verdict(artifact).accepted is None


def test_a_variant_that_is_not_there_is_refused(artifact: Path) -> None:
    with pytest.raises(OptionError, match=f"variant must be one of {FP32}, got 'fp8'"):
        check(artifact, pictures=1, variant="fp8")


# What a server gets


def test_a_tensorrt_variant_is_served_without_the_graphs_that_its_plans_came_from(
    gan_checkpoint: Path, gan_copy: Path, tmp_path: Path
) -> None:
    name = export(gan_checkpoint, gan_copy, VariantOptions(runtime="tensorrt")).variant
    plan = gan_copy / name / "generator.plan"
    plan.parent.mkdir()
    plan.write_bytes(b"a plan")
    manifest = read_artifact(gan_copy).manifest
    entry = manifest.variants[name].model_copy(
        update={"networks": {"generator": f"{name}/generator.plan"}}
    )
    update = {
        "variants": {**manifest.variants, name: entry},
        "selected": name,
        "files": hash_files(gan_copy),
    }
    write_manifest(gan_copy, manifest.model_copy(update=update))
    repository = write_repository([gan_copy], tmp_path / "repository")
    served = read_artifact(repository / gan_copy.name / "1" / "artifact").manifest
    assert set(served.files) == {f"{name}/generator.plan"}
    assert served.variants[name].graphs == {}
