"""Regression: pictures against a committed baseline, and what of them moved."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from damage import contents, edit
from damaged_graphs import multiply
from in_process import run

from engine import postprocess
from engine.artifact import read_artifact
from engine.errors import ArtifactError, OptionError
from engine.images import Picture
from engine.json_files import read_json
from export.baseline import OPERATIONS, Baseline, compare, read_baseline, write_baseline
from export.build import export
from export.variant import VariantOptions

ROOT = Path(__file__).parent.parent
FP32 = "onnxruntime-fp32"
CALIBRATION_ROWS = 64  # of the committed baselines, which were written with one torch thread
GENERATOR = "graphs/fp32/generator.onnx"

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def written(gan_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The baseline of `gan_artifact`, three pictures; read only."""
    file = tmp_path_factory.mktemp("baselines") / "tiny" / "gan.json"
    done = run("check", gan_artifact, "--baseline", file, "--write-baseline", "--pictures", 3)
    assert done.code == 0, done.said
    assert f"{file}: 1 variants written" in done.said
    return file


@pytest.fixture
def baseline(written: Path, tmp_path: Path) -> Path:
    """A copy of `written` to change."""
    return Path(shutil.copyfile(written, tmp_path / "baseline.json"))


@pytest.fixture
def artifact(gan_artifact: Path, tmp_path: Path) -> Path:
    """A copy of `gan_artifact` to worsen."""
    return Path(shutil.copytree(gan_artifact, tmp_path / "tiny-gan"))


# What moved


def test_a_baseline_holds_every_variant_and_operation_by_seed(
    written: Path, gan_artifact: Path
) -> None:
    found = read_baseline(written)
    assert found.checkpoint_sha256 == read_artifact(gan_artifact).manifest.source.sha256
    assert set(found.variants) == {FP32}
    assert set(found.postprocess) == set(OPERATIONS)
    assert {text.partition("=")[0] for text in OPERATIONS} == set(postprocess.OPERATIONS)
    for entry in (*found.variants.values(), *found.postprocess.values()):
        assert list(entry.pictures) == [0, 1, 2]
    assert all(figures.psnr_db > 60 for figures in found.variants[FP32].pictures.values())


def test_nothing_has_moved_right_after_it_was_written(written: Path, gan_artifact: Path) -> None:
    before = contents(gan_artifact)
    done = run("check", gan_artifact, "--baseline", written, "--json")
    assert done.code == 0, done.said
    assert json.loads(done.out) == {
        "artifact": str(gan_artifact), "moved": [], "bytes_compared": [FP32, *OPERATIONS],
    }  # fmt: skip
    assert "0 figures of 3 pictures a variant moved" in done.said
    assert contents(gan_artifact) == before


def test_a_worsened_graph_moves_and_the_table_says_what_by_how_much(
    written: Path, artifact: Path
) -> None:
    multiply(artifact, GENERATOR, "output.weight", 1.1)
    done = run("check", artifact, "--baseline", written, "--json")
    assert done.code == 1
    moved = json.loads(done.out)["moved"]
    assert {each["what"] for each in moved} == {FP32}  # no operation has
    old = read_baseline(written).variants[FP32].pictures
    for seed in (0, 1, 2):
        figures = {each["figure"]: each for each in moved if each["seed"] == seed}
        assert figures.keys() >= {"PSNR dB", "bytes"}
        before, now = figures["PSNR dB"]["before"], figures["PSNR dB"]["now"]
        assert before == f"{old[seed].psnr_db:.2f}"
        assert float(now) < float(before) - 0.5
        assert f"{FP32} {seed} PSNR dB {before} {now}" in done.said
    assert f"{len(moved)} figures of 3 pictures a variant moved from {written}" in done.said


def test_a_changed_operation_is_caught(
    written: Path, gan_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = postprocess.OPERATIONS["sharpen"]

    def weaker(picture: Picture, strength: float) -> Picture:
        return whole(picture, 0.5 * strength)

    monkeypatch.setitem(postprocess.OPERATIONS, "sharpen", weaker)  # type: ignore[arg-type]
    found = compare(written, gan_artifact, None)
    assert {moved.what for moved in found.moved} == {"sharpen=1"}
    # half as strong is closer to the picture before it: not worse, and yet not what it was
    psnrs = [moved for moved in found.moved if moved.figure == "PSNR dB"]
    assert psnrs
    assert all(float(moved.now) > float(moved.before) for moved in psnrs)


def test_a_variant_that_comes_closer_to_torch_has_not_moved(
    baseline: Path, gan_artifact: Path
) -> None:
    def was_worse(values: dict) -> None:
        for figures in values["variants"][FP32]["pictures"].values():
            figures["psnr_db"], figures["ssim"] = 40.0, 0.99

    edit(baseline, was_worse)
    assert compare(baseline, gan_artifact, None).moved == ()


def of_another_machine(entry: dict) -> None:
    entry["machine"]["processor"] = "another one"


def of_another_version(entry: dict) -> None:
    entry["runtime_version"] = "0.0.1"


@pytest.mark.parametrize("change", [of_another_machine, of_another_version])
def test_bytes_are_compared_only_where_machine_and_runtime_are_the_same(
    baseline: Path, gan_artifact: Path, change: Callable[[dict], None]
) -> None:
    def other_bytes(values: dict) -> None:
        values["variants"][FP32]["pictures"]["1"]["sha256"] = "0" * 64

    edit(baseline, other_bytes)
    found = compare(baseline, gan_artifact, None)
    assert [(moved.what, moved.seed, moved.figure) for moved in found.moved] == [(FP32, 1, "bytes")]
    assert found.moved[0].before == "00000000"
    edit(baseline, lambda values: change(values["variants"][FP32]))
    found = compare(baseline, gan_artifact, None)
    assert found.moved == ()
    assert found.bytes_compared == OPERATIONS


# What cannot be compared


def test_a_baseline_of_another_checkpoint_is_refused(
    written: Path, diffusion_artifact: Path
) -> None:
    with pytest.raises(ArtifactError, match="is of another checkpoint") as raised:
        compare(written, diffusion_artifact, None)
    mend = f"vitrine check {diffusion_artifact} --baseline {written} --write-baseline"
    assert str(raised.value).endswith(mend)


def test_a_variant_that_the_artifact_lacks_is_named_with_its_export(
    baseline: Path, gan_artifact: Path, gan_checkpoint: Path
) -> None:
    def one_more(values: dict) -> None:
        values["variants"]["openvino-bf16"] = values["variants"][FP32]

    edit(baseline, one_more)
    with pytest.raises(
        OptionError, match=r"has openvino-bf16, which .* lacks; export it"
    ) as raised:
        compare(baseline, gan_artifact, None)
    command = f"vitrine export {gan_checkpoint} --output {gan_artifact} --runtime openvino"
    assert str(raised.value).endswith(f"{command} --precision bf16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not readable JSON"),
        ('{"format": 1', "is not readable JSON"),
        ("[1, 2]", "baseline"),
        ("{}", "baseline '.*checkpoint_sha256 is required"),
        ('{"format": 2}', "baseline '.*format must be 1, got 2"),
        (
            f'{{"checkpoint_sha256": "{64 * "0"}", "variants": {{}}, "postprocess": {{}}}}',
            "variants",
        ),
        (f'{{"checkpoint_sha256": "{64 * "0"}", "variants": {{"ghost": {{}}}}}}', "ghost"),
    ],
)
def test_a_damaged_baseline_is_named(
    text: str, message: str, tmp_path: Path, gan_artifact: Path
) -> None:
    file = tmp_path / "damaged.json"
    file.write_text(text, "utf-8")
    with pytest.raises(ArtifactError, match=message) as raised:
        compare(file, gan_artifact, None)
    assert "damaged.json" in str(raised.value)


def test_a_missing_baseline_is_named_with_the_command_that_writes_it(
    tmp_path: Path, gan_artifact: Path
) -> None:
    file = tmp_path / "none.json"
    done = run("check", gan_artifact, "--baseline", file)
    assert done.code == 2
    assert f"baseline '{file}' does not exist; write it with: vitrine check ARTIFACT" in done.said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--variant", FP32), "leave --variant out"),
        (("--floor-psnr-db", 30), "leave --floor-psnr-db out"),
        (("--floor-ssim", 0), "leave --floor-ssim out"),
        (("--pictures", 4), "leave --pictures out"),
        (("--write-baseline", "--variant", FP32), "leave --variant out"),
    ],
    ids=str,
)
def test_a_baseline_has_its_own_variants_pictures_and_figures(
    flags: tuple[object, ...], message: str, baseline: Path, gan_artifact: Path
) -> None:
    before = baseline.read_bytes()
    done = run("check", gan_artifact, "--baseline", baseline, *flags)
    assert done.code == 2
    assert message in done.said
    assert baseline.read_bytes() == before


def test_writing_a_baseline_needs_its_file(gan_artifact: Path) -> None:
    done = run("check", gan_artifact, "--write-baseline")
    assert done.code == 2
    assert "--write-baseline needs the file: --baseline FILE" in done.said


# The shipped checkpoints


def why_not_here(variant: str) -> str:
    """Why a variant of a baseline cannot run on this machine, or nothing."""
    runtime, precision, *rest = variant.split("-")
    package = "onnxruntime" if runtime == "tensorrt" else runtime  # which simulates it
    if find_spec(package) is None:
        return f"{package} is not installed"
    if (runtime, precision, rest) == ("openvino", "int8", []) and find_spec("nncf") is None:
        return "nncf is not installed"
    if (runtime, precision) == ("openvino", "bf16"):
        from engine.backends.openvino import cpu_has_bf16

        return "" if cpu_has_bf16() else "this CPU has no bf16"
    return ""


def exported_for(baseline: Path, checkpoint: Path, artifact: Path) -> Path:
    """An artifact with the variants of a baseline that run here; the baseline of these alone."""
    found = read_baseline(baseline)
    here = {name: entry for name, entry in found.variants.items() if not why_not_here(name)}
    for name in here:
        runtime, precision, *rest = name.split("-")
        values = {
            "runtime": runtime, "precision": precision, "weights_only": rest == ["weights"],
            "calibration": {"rows": CALIBRATION_ROWS},
        }  # fmt: skip
        export(checkpoint, artifact, VariantOptions.parse(values))
    reduced = artifact.with_name("baseline.json")
    values = found.model_copy(update={"variants": here}).model_dump(mode="json")
    reduced.write_text(json.dumps(values), "utf-8")
    return reduced


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion-diffusion", "fashion-gan"])
def test_the_shipped_checkpoints_draw_what_their_baselines_say(name: str, tmp_path: Path) -> None:
    checkpoint = ROOT / "checkpoints" / name
    baseline = ROOT / "tests" / "baselines" / f"{name}.json"
    artifact = tmp_path / name
    reduced = exported_for(baseline, checkpoint, artifact)
    variants = read_baseline(reduced).variants
    if not variants:
        pytest.skip("; ".join(why_not_here(each) for each in read_baseline(baseline).variants))
    found = compare(reduced, artifact, checkpoint)
    assert found.moved == ()


def test_variants_of_a_baseline_that_cannot_run_here_are_left_out(
    baseline: Path, gan_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_more(values: dict) -> None:
        values["variants"]["openvino-fp32"] = values["variants"][FP32]

    edit(baseline, one_more)
    real = find_spec
    monkeypatch.setattr(
        "test_baseline.find_spec", lambda name: None if name == "openvino" else real(name)
    )
    reduced = exported_for(baseline, gan_checkpoint, tmp_path / "artifact")
    assert set(read_baseline(reduced).variants) == {FP32}
    assert compare(reduced, tmp_path / "artifact", None).moved == ()


def test_every_picture_of_a_rewritten_baseline_is_drawn_anew(
    baseline: Path, gan_artifact: Path
) -> None:
    edit(baseline, lambda values: values.update(checkpoint_sha256="0" * 64))
    drawn = write_baseline(baseline, gan_artifact, None, 2)
    assert isinstance(drawn, Baseline)
    assert Baseline.parse(read_json(baseline, baseline.parent)) == drawn
    assert compare(baseline, gan_artifact, None).pictures == 2
