"""Variants of one artifact: typed graphs, one picture size, other runtimes, plans to be built."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from tiny_pipelines import one_level_stable_diffusion, save

import export.plans
import vitrine
from engine.artifact import read_artifact
from engine.backends.target import PlanTarget, check_device
from engine.checkpoint import read_checkpoint
from engine.errors import ArtifactError, OptionError
from engine.manifest import ModelSpec
from engine.pipeline import open_pipeline
from engine.quality import psnr_db
from engine.request import Request
from export.build import export as build
from export.plan import PlanOptions
from export.plans import build_plans
from export.variant import PlanBuild, VariantOptions, parse_ranges

HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FLOAT, FLOAT16, BFLOAT16, INT64 = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.INT64,
)
HEIGHT, WIDTH = 24, 40  # of the build for one size
NO_TENSORRT = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed"
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion whose U-Net has one level; its VAE says `force_upcast`."""
    folder = tmp_path_factory.mktemp("pipelines")
    pipeline = one_level_stable_diffusion(folder / "tokenizers")
    pipeline.save_pretrained(folder / "shoes")
    return folder / "shoes"


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant that shares fp32 or fp16 graphs, added one after the other."""
    folder = tmp_path_factory.mktemp("artifacts") / "shoes"
    for runtime, precision in (
        ("onnxruntime", "fp32"), ("onnxruntime", "fp16"),
        ("openvino", "fp32"), ("openvino", "fp16"), ("openvino", "bf16"),
    ):  # fmt: skip
        before = files(folder) if folder.exists() else {}
        made = build(checkpoint, folder, VariantOptions(runtime=runtime, precision=precision))
        assert made.variant == f"{runtime}-{precision}"
        after = files(folder)
        assert {name: after[name] for name in before} == before
    return folder


@pytest.fixture(scope="module")
def one_size(checkpoint: Path, artifact: Path) -> Path:
    """`artifact` with a build for one picture size beside the others."""
    build(checkpoint, artifact, VariantOptions(height=HEIGHT, width=WIDTH))
    return artifact


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> ModelSpec:
    return read_checkpoint(checkpoint).model


@pytest.fixture(scope="module")
def fixed_model(gan_checkpoint: Path) -> ModelSpec:
    """A model of one picture size."""
    return read_checkpoint(gan_checkpoint).model


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Inode and content of every file but the manifest."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def pictures(folder: Path, variant: str, **more: object) -> list[NDArray[np.float32]]:
    pipeline = open_pipeline(folder, variant)
    size = {"height": HEIGHT, "width": WIDTH}
    values = {"prompt": "a red shoe", "num_inference_steps": 4, **size, **more}
    requests = [Request.of({**values, "seed": seed}) for seed in range(3)]
    decoded = [pipeline.decode(row) for row in pipeline.run(requests)]
    pipeline.close()
    return decoded


def least_psnr_db(folder: Path, variant: str, reference: str = "onnxruntime-fp32") -> float:
    pairs = zip(pictures(folder, reference), pictures(folder, variant), strict=True)
    return min(psnr_db(expected, found) for expected, found in pairs)


# How graphs are typed


def graph(folder: Path, variant: str, network: str) -> onnx.ModelProto:
    entry = read_artifact(folder).manifest.variants[variant]
    return onnx.load(folder / {**entry.networks, **entry.graphs}[network])


def heavy_types(model: onnx.ModelProto) -> set[int]:
    """The element types of all inputs of convolutions and matrix products."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {weight.name: weight.data_type for weight in inferred.initializer}
    nodes = [node for node in inferred.node if node.op_type in HEAVY]
    assert len(nodes) > 8
    return {types[name] for node in nodes for name in node.input if name}


def large_weights(model: onnx.ModelProto) -> set[int]:
    """The element types of all weights of more than a few numbers; a mask is none."""
    weights = [w for w in model.graph.initializer if np.prod(w.dims) > 8 * 8]
    return {w.data_type for w in weights} - {INT64, onnx.TensorProto.BOOL}


def callers_types(model: onnx.ModelProto) -> set[int]:
    tensors = (*model.graph.input, *model.graph.output)
    return {tensor.type.tensor_type.elem_type for tensor in tensors} - {INT64}


@pytest.mark.parametrize(
    ("variant", "network", "expected"),
    [
        ("onnxruntime-fp32", "text_encoder", FLOAT),
        ("onnxruntime-fp32", "unet", FLOAT),
        ("onnxruntime-fp16", "text_encoder", FLOAT16),
        ("onnxruntime-fp16", "unet", FLOAT16),
        ("openvino-fp16", "unet", FLOAT16),
        ("openvino-bf16", "unet", FLOAT),  # bfloat16 by a hint
    ],
)
def test_a_graph_computes_in_its_variants_precision_and_speaks_float32(
    artifact: Path, variant: str, network: str, expected: int
) -> None:
    found = graph(artifact, variant, network)
    assert heavy_types(found) == {expected}
    assert large_weights(found) == {expected}
    assert callers_types(found) == {FLOAT}


@pytest.mark.parametrize("network", ["vae_encoder", "vae_decoder"])
def test_a_vae_that_overflows_in_half_precision_stays_float32(
    checkpoint: Path, artifact: Path, network: str
) -> None:
    assert '"force_upcast": true' in (checkpoint / "vae" / "config.json").read_text("utf-8")
    assert heavy_types(graph(artifact, "onnxruntime-fp16", network)) == {FLOAT}
    variants = read_artifact(artifact).manifest.variants
    shared = {variants[f"onnxruntime-{p}"].networks[network] for p in ("fp32", "fp16")}
    assert shared == {f"graphs/fp32/{network}.onnx"}


def test_a_bf16_graph_is_bfloat16_and_onnxruntime_is_refused_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = save("ddpm", tmp_path / "pipelines"), tmp_path / "ddpm"
    build(source, folder, VariantOptions(runtime="tensorrt", precision="bf16"))
    found = graph(folder, "tensorrt-bf16", "unet")
    assert heavy_types(found) == {BFLOAT16}
    assert large_weights(found) == {BFLOAT16}
    assert callers_types(found) == {FLOAT}
    with pytest.raises(OptionError, match=r"onnxruntime computes nothing in bf16 .* tensorrt"):
        VariantOptions.parse({"precision": "bf16"})
    assert [path.name for path in tmp_path.glob("*ddpm*")] == ["ddpm"]


# What variants draw


def test_variants_are_added_and_share_their_graphs(artifact: Path) -> None:
    manifest = read_artifact(artifact).manifest
    assert manifest.selected == "onnxruntime-fp32"
    variants = manifest.variants
    assert variants["openvino-fp32"].networks == variants["onnxruntime-fp32"].networks
    assert variants["openvino-bf16"].networks == variants["onnxruntime-fp32"].networks
    assert variants["openvino-fp16"].networks == variants["onnxruntime-fp16"].networks
    graphs = [name for name in manifest.files if name.endswith(".onnx")]
    assert len(graphs) == 4 + 2


@pytest.mark.parametrize(
    ("variant", "floor_db"),
    [
        ("openvino-fp32", 50.0),  # the same arithmetic, other kernels: 124 dB measured
        ("onnxruntime-fp16", 50.0),  # 11 bits of mantissa: 63 dB measured
        ("openvino-fp16", 50.0),  # 72 dB measured: OpenVINO computes in float32 on a CPU
        ("openvino-bf16", 30.0),  # 8 bits: 37 dB measured with bfloat16 instructions
    ],
)
def test_a_variant_draws_the_pictures_of_the_fp32_one(
    artifact: Path, variant: str, floor_db: float
) -> None:
    assert least_psnr_db(artifact, variant) >= floor_db


def test_a_build_for_one_size_draws_what_the_one_for_all_draws(one_size: Path) -> None:
    name = f"onnxruntime-fp32-{HEIGHT}x{WIDTH}"
    entry = read_artifact(one_size).manifest.variants[name]
    assert entry.size == (HEIGHT, WIDTH)
    assert entry.networks["text_encoder"] == "graphs/fp32/text_encoder.onnx"  # has no size
    shape = graph(one_size, name, "unet").graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_param or axis.dim_value for axis in shape] == ["batch", 4, 12, 20]
    assert least_psnr_db(one_size, name) >= 60  # the same kernels: identical where measured


def test_a_build_for_one_size_refuses_another(one_size: Path) -> None:
    name = f"onnxruntime-fp32-{HEIGHT}x{WIDTH}"
    with pytest.raises(OptionError, match=f"^width must be {WIDTH}, got 32$"):
        pictures(one_size, name, width=32)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 33, "width": 40}, "height must be a multiple of 2, got 33"),
        ({"height": 32, "width": 7}, "width must be a multiple of 2, got 7"),
    ],
)
def test_a_build_for_an_impossible_size_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, size: dict[str, int], message: str
) -> None:
    with pytest.raises(OptionError, match=f"^{message}$"):
        build(checkpoint, tmp_path / "new", VariantOptions(**size))
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_one_size_takes_no_other(gan_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="this model makes 16x16 only, got 32x32; leave height"):
        build(gan_checkpoint, tmp_path / "new", VariantOptions(height=32, width=32))


@pytest.mark.parametrize("values", [{"height": 32}, {"width": 32}])
def test_height_and_width_come_together(values: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="give both or none"):
        VariantOptions.parse(values)


# TensorRT: graphs here, plans where the GPU is


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *command: str):
    """Exit code and stderr of `vitrine`, in this process."""
    monkeypatch.setattr("sys.argv", ["vitrine", *command])
    with pytest.raises(SystemExit) as left:
        vitrine.main()
    return left.value.code or 0, capsys.readouterr().err


@pytest.fixture(scope="module")
def with_tensorrt(checkpoint: Path, one_size: Path) -> Path:
    """`one_size` with the graphs of a TensorRT variant, for any size and for one."""
    plan = PlanBuild(ranges=(parse_ranges("1..2..4:16..32..64:16..32..48"),))
    build(checkpoint, one_size, VariantOptions(runtime="tensorrt", precision="fp16", plan=plan))
    options = VariantOptions(runtime="tensorrt", height=HEIGHT, width=WIDTH)
    build(checkpoint, one_size, options)
    return one_size


@NO_TENSORRT
def test_without_tensorrt_the_graphs_are_written_and_the_rest_is_said(
    gan_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = str(tmp_path / "new")
    command = ("export", str(gan_checkpoint), "--output", folder, "--runtime", "tensorrt")
    for _ in range(2):
        code, said = run(capsys, monkeypatch, *command)
        assert code == 0
        assert "tensorrt-fp32 has its graphs, its plans are not built" in said
        assert "tensorrt is not installed" in said.lower()
        assert f"vitrine plan {folder}" in said
    entry = read_artifact(Path(folder)).manifest.variants["tensorrt-fp32"]
    assert entry.networks == {}
    assert entry.graphs == {"generator": "graphs/fp32/generator.onnx"}
    code, said = run(capsys, monkeypatch, "plan", folder)
    assert code == 2
    assert "tensorrt is not installed" in said.lower()
    out = str(tmp_path / "pictures")
    code, said = run(capsys, monkeypatch, "generate", folder, "--label", "bag", "--output", out)
    assert code == 2
    assert (
        f"has no plans yet; on the machine with the GPU that shall run it: vitrine plan {folder}"
        in said
    )
    assert not (tmp_path / "pictures").exists()


def test_an_artifact_without_a_tensorrt_variant_has_no_plans_to_build(artifact: Path) -> None:
    with pytest.raises(OptionError, match=r"has no TensorRT variant .*--runtime tensorrt"):
        build_plans(artifact, "onnxruntime-fp32")


@pytest.fixture
def fake_tensorrt(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Plans that are the words `a plan`; what each was asked for, by file."""
    asked: dict[str, object] = {}

    def build_plan(source, plan, profiles, options, progress):
        plan.write_bytes(b"a plan")
        asked[f"{plan.parent.name}/{plan.name}"] = [profile.shapes for profile in profiles]
        return PlanTarget(
            tensorrt_version="10.16",
            gpu="G",
            compute_capability="9.0",
            has_weights=not options.strip_plan,
        )

    def refit_plan(plan, graph, out):
        assert plan.read_bytes() == b"a plan"
        assert graph.suffix == ".onnx"
        out.write_bytes(b"a plan with weights")

    monkeypatch.setattr(export.plans, "refit_plan", refit_plan)
    monkeypatch.setattr(export.plans, "build_plan", build_plan)
    monkeypatch.setattr(export.plans, "installed", lambda: None)
    return asked


def test_plans_are_built_for_the_profiles_that_were_asked_for(
    checkpoint: Path, with_tensorrt: Path, fake_tensorrt: dict[str, object]
) -> None:
    before = files(with_tensorrt)
    manifest = build_plans(with_tensorrt).manifest
    after = files(with_tensorrt)
    assert {name: after[name] for name in before} == before
    entry = manifest.variants["tensorrt-fp16"]
    assert entry.networks["unet"] == "tensorrt-fp16/unet.plan"
    (shapes,) = fake_tensorrt["tensorrt-fp16/unet.plan"]
    assert shapes["sample"] == ((1, 4, 8, 8), (2, 4, 16, 16), (4, 4, 32, 24))
    assert shapes["timestep"] == ((1,), (2,), (4,))
    (shapes,) = fake_tensorrt["tensorrt-fp16/vae_encoder.plan"]
    assert shapes == {"image": ((1, 3, 16, 16), (2, 3, 32, 32), (4, 3, 64, 48))}
    (shapes,) = fake_tensorrt[f"tensorrt-fp32-{HEIGHT}x{WIDTH}/unet.plan"]
    assert shapes["sample"] == ((1, 4, 12, 20), (2, 4, 12, 20), (8, 4, 12, 20))

    # another profile: other plans, and those that are there go
    options = VariantOptions(runtime="tensorrt", precision="fp16")
    again = build(checkpoint, with_tensorrt, options)
    assert not again.unchanged
    assert again.artifact.manifest.variants["tensorrt-fp16"].networks == {}
    plans = [name for name in again.artifact.manifest.files if name.endswith(".plan")]
    assert {Path(name).parts[0] for name in plans} == {f"tensorrt-fp32-{HEIGHT}x{WIDTH}"}
    assert build(checkpoint, with_tensorrt, options).unchanged


def test_refit_puts_weights_into_plans_that_were_built_without(
    gan_checkpoint: Path, tmp_path: Path, fake_tensorrt: dict[str, object]
) -> None:
    folder = tmp_path / "stripped"
    plan = PlanBuild(options=PlanOptions(strip_plan=True))
    build(gan_checkpoint, folder, VariantOptions(runtime="tensorrt", plan=plan))
    with pytest.raises(OptionError, match=f"has no plans to refit; .* vitrine plan {folder}"):
        build_plans(folder, refit=True)
    stripped = build_plans(folder).manifest.variants["tensorrt-fp32"].target
    assert stripped is not None
    with pytest.raises(ArtifactError, match=r"without weights .* vitrine plan shoes --refit"):
        check_device(stripped, stripped.device, "10.16", "shoes")
    target = build_plans(folder, refit=True).manifest.variants["tensorrt-fp32"].target
    assert target is not None
    check_device(target, target.device, "10.16", "shoes")
    assert (folder / "tensorrt-fp32/generator.plan").read_bytes() == b"a plan with weights"


# Profiles


@pytest.mark.parametrize(
    ("text", "batch", "height", "width"),
    [
        ("1..2..8", (1, 2, 8), None, None),
        ("1..1..1:512..512..768:256..512..512", (1, 1, 1), (512, 512, 768), (256, 512, 512)),
    ],
)
def test_ranges_are_batch_or_batch_and_size(
    text: str, batch: tuple[int, ...], height: object, width: object
) -> None:
    ranges = parse_ranges(text)
    assert (ranges.batch, ranges.height, ranges.width) == (batch, height, width)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--profile: batch must be MIN..OPT..MAX, got ''"),
        ("8", "--profile: batch must be MIN..OPT..MAX, got '8'"),
        ("1..8", "--profile: batch must be MIN..OPT..MAX, got '1..8'"),
        ("1..2..-3", "--profile: batch must be MIN..OPT..MAX, got '1..2..-3'"),
        ("1..2..x", "--profile: batch must be MIN..OPT..MAX, got '1..2..x'"),
        ("0..2..8", "--profile: batch must be 1 <= MIN <= OPT <= MAX, got '0..2..8'"),
        ("1..9..8", "--profile: batch must be 1 <= MIN <= OPT <= MAX, got '1..9..8'"),
        ("1..2..8:64", "--profile must be BATCH or BATCH:HEIGHT:WIDTH, got '1..2..8:64'"),
        ("1..2..8:8..8..8:64", "--profile: width must be MIN..OPT..MAX, got '64'"),
    ],
)
def test_a_wrong_range_is_named(text: str, message: str) -> None:
    with pytest.raises(OptionError) as raised:
        parse_ranges(text)
    assert str(raised.value) == message


def test_a_profile_without_a_size_is_for_the_models_own(model: ModelSpec) -> None:
    (profile,) = PlanBuild().profiles(model, "vae_decoder")
    assert profile.shapes == {"latents": ((1, 4, 16, 16), (2, 4, 16, 16), (8, 4, 16, 16))}
    (profile,) = PlanBuild().profiles(model, "text_encoder")
    assert profile.shapes == {"input_ids": ((1, 77), (2, 77), (8, 77))}


def impossible(
    model: ModelSpec, text: str, size: tuple[int, int] | None, expected: Mapping[str, str]
) -> None:
    plan = PlanBuild(ranges=(parse_ranges(text),))
    for network, message in expected.items():
        with pytest.raises(OptionError) as raised:
            plan.profiles(model, network, size)
        assert str(raised.value) == message


def test_a_profile_of_an_impossible_size_is_refused(
    model: ModelSpec, fixed_model: ModelSpec, gan_checkpoint: Path, tmp_path: Path
) -> None:
    odd = "height and width of a profile must be multiples of 2, got 33"
    impossible(model, "1..2..8:32..33..64:32..32..32", None, {"unet": odd, "vae_decoder": odd})
    sized = "1..2..8:32..32..64:32..32..32"
    only = "this build makes 24x40 only: a profile has no size, got 32"
    impossible(model, sized, (HEIGHT, WIDTH), {"unet": only})
    fixed = "this model makes 16x16 only: a profile has no size, got 32"
    impossible(fixed_model, sized, None, {"generator": fixed})
    plan = PlanBuild(ranges=(parse_ranges(sized),))
    options = VariantOptions(runtime="tensorrt", plan=plan)
    with pytest.raises(OptionError, match=fixed):  # before any graph is traced
        build(gan_checkpoint, tmp_path / "new", options)
    assert list(tmp_path.iterdir()) == []
