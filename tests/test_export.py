"""From checkpoint to artifact: what is written, and what its networks compute."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from damage import contents, set_in, truncate_file
from numpy.typing import NDArray

from engine.artifact import read_artifact
from engine.checkpoint import file_sha256, read_checkpoint
from engine.manifest import Manifest
from export.build import export
from export.gate import check
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
