"""Quantized variants of an artifact: what the manifest says of them, when they are made anew."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import LABELS
from damage import Damage, contents, flip_a_bit, read_manifest, truncate_file
from damaged_graphs import sign
from in_process import run
from torch import nn

from engine.artifact import read_artifact
from engine.backends.openvino import OpenVINOBackend, cpu_has_bf16
from engine.checkpoint import file_sha256
from engine.errors import ArtifactError, OptionError
from engine.pipeline import open_pipeline
from engine.request import Request
from export.build import Export, export
from export.calibrate import CalibrationOptions, batches, calibrate, load_rows
from export.gate import check
from export.variant import VariantOptions

CALIBRATION = CalibrationOptions(rows=32)  # the fewest that are allowed
FLOAT_GRAPH = "graphs/fp32/unet.onnx"
NEEDS_NNCF = pytest.mark.skipif(find_spec("nncf") is None, reason="NNCF is not installed")
FORMS = {
    "onnxruntime-int8": {},
    "onnxruntime-int8-weights": {"weights_only": True},
    "openvino-int8": {"runtime": "openvino"},
    "tensorrt-int8": {"runtime": "tensorrt"},
    "tensorrt-fp8": {"runtime": "tensorrt", "precision": "fp8"},
}
WITHOUT_NNCF = [name for name in FORMS if name != "openvino-int8"]
ALL = [*WITHOUT_NNCF, pytest.param("openvino-int8", marks=NEEDS_NNCF)]
HERE = [name for name in ALL if not str(name).startswith("tensorrt")]  # that can run here

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def options(name: str, **more: object) -> VariantOptions:
    """How a variant is asked for."""
    values = {"precision": "int8", "calibration": CALIBRATION, **FORMS[name], **more}
    return VariantOptions(**values)


@pytest.fixture(scope="module")
def quantized(
    diffusion_artifact: Path,
    diffusion_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """`diffusion_artifact` with every quantized variant beside the fp32 one; read only."""
    folder = tmp_path_factory.mktemp("quantized") / "tiny"
    shutil.copytree(diffusion_artifact, folder)
    for name in FORMS if find_spec("nncf") else WITHOUT_NNCF:
        made = export(diffusion_checkpoint, folder, options(name))
        assert (made.variant, made.unchanged) == (name, False)
    return folder


@pytest.fixture
def copy(quantized: Path, tmp_path: Path) -> Path:
    """A copy of `quantized` to change, alone in its folder."""
    return Path(shutil.copytree(quantized, tmp_path / "artifacts" / "tiny"))


@pytest.fixture(scope="module")
def module_names(diffusion_checkpoint: Path) -> set[str]:
    """The convolutions and linear layers that torch knows the U-Net to have."""
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_pretrained(diffusion_checkpoint / "unet")
    return {name for name, m in unet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


# What the manifest says


@pytest.mark.parametrize("name", ALL)
def test_every_layer_is_quantized_or_kept_for_a_reason(
    name: str, quantized: Path, module_names: set[str]
) -> None:
    entry = read_artifact(quantized).manifest.variants[name]
    found = entry.quantization
    assert found is not None
    assert found.network == "unet"
    assert found.weights_only == name.endswith("weights")
    kept = [layer.name for layer in found.kept]
    assert len(found.layers) > 0
    assert len({*found.layers, *kept}) == len(found.layers) + len(kept)  # none twice
    attention = {name for name in found.layers if ".attentions." in name and ".to_" not in name}
    assert {*found.layers, *kept} - attention == module_names
    assert not attention or entry.runtime == "openvino"  # NNCF quantizes products of two tensors
    assert all(layer.reason for layer in found.kept)
    if entry.runtime == "tensorrt":  # its rules leave these out; other runtimes take everything
        assert {"conv_in", "conv_out"} <= set(kept)
    else:
        assert kept == []


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_quantized_is_computed_in_the_precision_that_the_manifest_names(
    name: str, quantized: Path
) -> None:
    found = read_artifact(quantized).manifest.variants[name].quantization
    assert found is not None
    bf16 = name == "openvino-int8" and cpu_has_bf16()
    expected = "fp16" if name.startswith("tensorrt") else "bf16" if bf16 else "fp32"
    assert found.kept_precision == expected


def test_all_variants_share_one_calibration_whose_hash_is_kept(
    quantized: Path, diffusion_checkpoint: Path
) -> None:
    manifest = read_artifact(quantized).manifest
    made = [entry.quantization for entry in manifest.variants.values() if entry.quantization]
    (file,) = {each.calibration for each in made if not each.weights_only}
    assert file is not None
    assert all(each.calibration is None for each in made if each.weights_only)
    assert manifest.files[file] == file_sha256(quantized / file)
    assert [name for name in manifest.files if name.startswith("calibration/")] == [file]
    again = calibrate(open_pipeline(diffusion_checkpoint), CALIBRATION)
    recorded = load_rows(quantized / file)
    assert recorded.keys() == {"sample", "timestep", "label"}
    for name, rows in again.items():
        np.testing.assert_array_equal(recorded[name], rows)
        assert len(rows) == 32


@pytest.mark.parametrize("name", ALL)
def test_size_is_that_of_its_files_and_smaller_than_fp32(name: str, quantized: Path) -> None:
    variants = read_artifact(quantized).manifest.variants
    entry = variants[name]
    (graph,) = (entry.networks or entry.graphs).values()
    files = list(
        (quantized / graph).parent.glob("unet.*")
    )  # OpenVINO's weights lie beside its graph
    assert entry.size_bytes == sum(file.stat().st_size for file in files)
    before = read_artifact(quantized).manifest.variants["onnxruntime-fp32"]
    if before.size_bytes is None:
        raise AssertionError("the fp32 variant has no size")
    weights = sum(
        file.stat().st_size for file in files if file.suffix != ".xml"
    )  # text, for tiny ones
    assert weights < before.size_bytes


# When a variant is made anew


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Functions that may not be called any more."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("work was done that had been done already")

    for name in names:
        monkeypatch.setattr(name, refuse)


@pytest.mark.parametrize("name", ALL)
def test_exporting_again_changes_nothing(
    name: str, copy: Path, diffusion_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "export.build.quantize", "torch.onnx.export")
    before, written_ns = contents(copy), (copy / "manifest.json").stat().st_mtime_ns
    again = export(diffusion_checkpoint, copy, options(name))
    assert (again.variant, again.unchanged) == (name, True)
    assert contents(copy) == before
    assert (copy / "manifest.json").stat().st_mtime_ns == written_ns


def test_a_variant_takes_the_calibration_that_another_one_recorded(
    copy: Path, diffusion_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "export.quantize.calibrate")
    layers = first_layers(copy, "onnxruntime-int8", 3)
    made = export(diffusion_checkpoint, copy, options("onnxruntime-int8", layers=layers))
    assert not made.unchanged


def first_layers(artifact: Path, name: str, count: int) -> tuple[str, ...]:
    quantization = read_manifest(artifact).variants[name].quantization
    assert quantization is not None
    return quantization.layers[:count]


@pytest.mark.parametrize(
    "name", ["onnxruntime-int8", pytest.param("openvino-int8", marks=NEEDS_NNCF)]
)
def test_other_layers_make_it_anew_and_leave_the_rest(
    name: str, copy: Path, diffusion_checkpoint: Path
) -> None:
    check_any(copy, name)
    before, layers = contents(copy), first_layers(copy, name, 3)
    made = export(diffusion_checkpoint, copy, options(name, layers=layers))
    assert_rebuilt(made, name, layers)
    own = f"graphs/{name}/"
    after = contents(copy)
    assert {n for n in before if n.startswith(own)} == {n for n in after if n.startswith(own)}
    for file in before.keys() - {"manifest.json"}:
        if file.startswith("quality/"):
            assert file not in after  # evidence of other layers
        else:
            assert (before[file] == after[file]) == (not file.startswith(own)), file
    assert export(diffusion_checkpoint, copy, options(name, layers=layers)).unchanged
    assert export(diffusion_checkpoint, copy, options(name)).unchanged  # any layers are right


def check_any(artifact: Path, name: str) -> None:
    """Let the gate write figures and evidence, whatever they are."""
    from engine.manifest import Floors

    check(artifact, pictures=1, floors=Floors(psnr_db=0, ssim=-1), variant=name)


def assert_rebuilt(made: Export, name: str, layers: tuple[str, ...]) -> None:
    entry = made.artifact.manifest.variants[name]
    assert not made.unchanged
    assert entry.quantization is not None
    assert entry.quantization.layers == layers
    assert (entry.accepted, entry.quality, entry.reason) == (None, None, "")


@pytest.mark.parametrize("name", ALL)
def test_an_unknown_layer_is_named_and_the_artifact_stays_whole(
    name: str, copy: Path, diffusion_checkpoint: Path
) -> None:
    before = contents(copy.parent)
    with pytest.raises(OptionError, match="'conv_nowhere'"):
        export(diffusion_checkpoint, copy, options(name, layers=("conv_in", "conv_nowhere")))
    assert contents(copy.parent) == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    read_artifact(copy)


# What may be asked


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "fp8"}, "onnxruntime computes nothing in fp8: choose int8, or tensorrt"),
        (
            {"runtime": "openvino", "precision": "fp8"},
            "openvino computes nothing in fp8: choose int8, or tensorrt",
        ),
        ({"precision": "bf16"}, "onnxruntime computes nothing in bf16 on a CPU: choose precision"),
        (
            {"precision": "fp32", "weights_only": True},
            "weights only are quantized for onnxruntime, in int8; got onnxruntime fp32",
        ),
        (
            {"runtime": "tensorrt", "precision": "int8", "weights_only": True},
            "weights only are quantized for onnxruntime, in int8; got tensorrt int8",
        ),
    ],
    ids=str,
)
def test_what_no_runtime_computes_is_refused_before_any_work(
    values: dict[str, object],
    message: str,
    diffusion_checkpoint: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(OptionError) as raised:
        VariantOptions.parse(values)
    assert message in str(raised.value)
    words = [f"--{k.replace('_', '-')}" if v is True else f"--{k}={v}" for k, v in values.items()]
    done = run("export", diffusion_checkpoint, "--output", tmp_path / "new", *words)
    assert done.code == 2
    assert message in done.said
    assert list(tmp_path.iterdir()) == []


def test_too_few_rows_are_refused_and_the_artifact_stays_whole(
    copy: Path, diffusion_checkpoint: Path
) -> None:
    before = contents(copy)
    few = options("onnxruntime-int8", calibration=CalibrationOptions(rows=31), layers=("conv_in",))
    with pytest.raises(OptionError, match="calibration needs at least 32 rows, got 31: with few"):
        export(diffusion_checkpoint, copy, few)
    assert contents(copy) == before


# What the graphs compute


@NEEDS_NNCF
def test_openvino_without_layers_computes_the_float_graphs_bytes(
    quantized: Path, tmp_path: Path
) -> None:
    from export.quantize_openvino import OpenVINOQuantizer

    manifest = read_artifact(quantized).manifest
    feeds = batches(load_rows(quantized / CALIBRATION.file))
    quantizer = OpenVINOQuantizer(quantized / FLOAT_GRAPH, feeds)
    quantizer.write((), tmp_path / "none.xml")
    quantizer.write(quantizer.layers, tmp_path / "all.xml")
    spec = manifest.model.networks["unet"]
    outputs = {}
    for path in (quantized / FLOAT_GRAPH, tmp_path / "none.xml", tmp_path / "all.xml"):
        backend = OpenVINOBackend(path, spec, "fp32", {"height": 8, "width": 8})
        outputs[path.name] = backend.run(feeds[0])["prediction"].copy()
        backend.close()
    np.testing.assert_array_equal(outputs["none.xml"], outputs["unet.onnx"])
    error = outputs["all.xml"] - outputs["unet.onnx"]
    signal = np.square(outputs["unet.onnx"]).mean()
    # 65 layers rounded to 8 bits: an error of some percent of the signal's power, and never none
    assert 1e-7 < np.square(error).mean() / signal < 0.1


@pytest.mark.parametrize("name", HERE)
def test_a_quantized_picture_is_the_same_in_any_batch(name: str, quantized: Path) -> None:
    pipeline = open_pipeline(quantized, name)
    requests = [
        Request(
            label=LABELS[number % 3],
            seed=number,
            num_inference_steps=(4, 7, 5)[number % 3],
            guidance_scale=(1.0, 3.5)[number % 2],
            sampler=("ddim", "euler", "dpmpp_2m")[number % 3],
        )
        for number in range(7)
    ]
    together = list(pipeline.generate(requests))
    for request, picture in zip(requests, together, strict=True):
        (alone,) = pipeline.generate([request])
        np.testing.assert_array_equal(picture, alone)
    pipeline.close()
    assert len({picture.tobytes() for picture in together}) == 7


# What is refused


@NEEDS_NNCF
@pytest.mark.parametrize("file", ["unet.xml", "unet.bin"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "does not match its manifest"),
        (truncate_file, "does not match its manifest"),
        (Path.unlink, "lacks graphs/openvino-int8/unet"),
    ],
    ids=["bit flipped", "truncated", "missing"],
)
def test_a_damaged_openvino_file_is_refused_when_it_is_opened(
    file: str, damage: Damage, message: str, copy: Path, diffusion_checkpoint: Path
) -> None:
    damage(copy / "graphs" / "openvino-int8" / file)
    with pytest.raises(ArtifactError, match=message) as raised:
        open_pipeline(copy, "openvino-int8")
    assert file in str(raised.value)
    assert f"vitrine export {diffusion_checkpoint} --output {copy}, which" in str(raised.value)


@NEEDS_NNCF
@pytest.mark.parametrize("file", ["unet.xml", "unet.bin"])
def test_half_an_openvino_file_that_somebody_signed_is_refused_too(file: str, copy: Path) -> None:
    path = copy / "graphs" / "openvino-int8" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    sign(copy)
    with pytest.raises(ArtifactError, match=r"openvino cannot load '.*unet.xml'"):
        open_pipeline(copy, "openvino-int8")


def test_linting_for_a_runtime_leaves_out_what_was_quantized_for_another(quantized: Path) -> None:
    for target in ("tensorrt", "onnxruntime"):
        done = run("lint", quantized, "--target", target)
        assert done.code == 0, done.said
        assert f" 0 errors, 0 warnings for {target}" in done.said
    done = run("lint", quantized / "graphs/onnxruntime-int8/unet.onnx", "--target", "tensorrt")
    assert done.code == 1  # what it would have said of that graph
    assert "uint8" in done.said
