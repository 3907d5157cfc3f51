"""`vitrine export --auto`: every candidate built, judged and timed, and the best one chosen."""

import json
import shutil
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from damage import contents, read_manifest
from in_process import run

from engine.artifact import read_artifact, write_manifest
from engine.errors import ArtifactError, QualityError, RuntimeUnavailableError
from engine.manifest import Floors, Manifest, Variant
from engine.pipeline import open_pipeline
from engine.request import Request
from export import auto as auto_module
from export.auto import auto, select_anew
from export.build import export
from export.calibrate import CalibrationOptions
from export.candidates import CANDIDATES, SMALL, AutoOptions, Candidate
from export.gate import check, refuse
from export.ledger import Ledger
from export.select import Timing, choose, no_gain, select
from export.trials import DenoiserTrials
from export.variant import VariantOptions

FP32, INT8 = "onnxruntime-fp32", "onnxruntime-int8"
OPTIONS = AutoOptions(pictures=4, search_minutes=10, calibration=CalibrationOptions(rows=32))
FLAGS = ("--auto", "--pictures", 4, "--search-minutes", 0.1, "--calibration-rows", 32)
ONNXRUNTIME = (Candidate("onnxruntime", "fp32"), Candidate("onnxruntime", "int8"))
KEYS = {
    "variant", "psnr_db_min", "psnr_db_mean", "ssim_mean", "latency_ms", "images_per_s",
    "size_bytes", "accepted", "reason",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Fewer pictures and shorter readings: these cost time and decide nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.auto.PROBES", 1)
        patch.setattr("export.select.ROUNDS", 3)
        patch.setattr("export.select.LEAST_SECONDS", 0.01)
        # on a network this small clocks measure chance: let every layer and every set gain
        patch.setattr(DenoiserTrials, "saved_ms", lambda self: dict.fromkeys(self.layers, 1.0))
        patch.setattr(
            DenoiserTrials, "call_ms", lambda self, sets: [10.0 / (1 + len(s)) for s in sets]
        )
        yield


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def only_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two candidates instead of eight."""
    monkeypatch.setattr("export.candidates.CANDIDATES", ONNXRUNTIME)


@pytest.fixture(scope="module")
def made(quick: None, diffusion_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with every candidate that this machine can build; read only."""
    folder = tmp_path_factory.mktemp("auto") / "tiny"
    return auto(diffusion_checkpoint, folder, OPTIONS, (), lambda _: None).path


def names(candidates: Sequence[Candidate]) -> set[str]:
    return {OPTIONS.variant(each).name for each in candidates}


def figures(artifact: Path) -> dict:
    return json.loads((artifact / "quality" / "report.json").read_text("utf-8"))


# What it leaves


def test_every_candidate_is_a_variant_or_was_not_built_for_a_reason(made: Path) -> None:
    manifest = read_artifact(made).manifest  # which verifies every hash
    selection = manifest.selection
    assert selection is not None
    assert selection.goal == "throughput"
    assert set(manifest.variants) | set(selection.not_built) == names(CANDIDATES)
    assert not set(manifest.variants) & set(selection.not_built)
    if find_spec("openvino") and find_spec("nncf"):
        assert selection.not_built == {}
    assert all(variant.accepted is not None for variant in manifest.variants.values())
    assert all(v.reason for v in manifest.variants.values() if not v.accepted)


def test_the_selected_variant_is_accepted_timed_and_runs_unnamed(made: Path) -> None:
    manifest = read_artifact(made).manifest
    chosen = manifest.variants[manifest.selected]
    assert chosen.accepted
    assert chosen.speed is not None
    assert chosen.quality is not None
    assert chosen.quality.pictures == 4
    assert chosen.quality.psnr_db_min >= 35
    rivals = [v for v in manifest.variants.values() if v.accepted and v.speed]
    fastest = max(v.speed.images_per_s for v in rivals if v.speed)
    within_noise = manifest.selection.within_noise if manifest.selection else ()
    if not within_noise:
        assert chosen.speed.images_per_s == fastest
    pipeline = open_pipeline(made)
    assert next(pipeline.generate([Request(label="bag")])).shape == (16, 16, 1)
    pipeline.close()


def test_variants_without_plans_are_judged_as_simulated_and_never_selected(made: Path) -> None:
    manifest = read_artifact(made).manifest
    for name in ("tensorrt-fp16", "tensorrt-int8", "tensorrt-fp8"):
        entry = manifest.variants[name]
        assert entry.quality is not None
        assert entry.quality.simulated
        assert (entry.networks, entry.speed) == ({}, None)
        assert manifest.selected != name


def test_the_report_has_the_figures_of_the_manifest(made: Path) -> None:
    manifest, report = read_artifact(made).manifest, figures(made)
    assert {"quality/report.json", "quality/report.html"} <= set(manifest.files)
    assert report["selected"] == manifest.selected
    selection = manifest.selection
    assert selection is not None
    candidates = {each["variant"]: each for each in report["candidates"]}
    assert set(candidates) == {*manifest.variants, *selection.not_built}
    for name, entry in manifest.variants.items():
        found = candidates[name]
        assert found.keys() >= KEYS
        quality, speed = entry.quality, entry.speed
        expected = {
            "psnr_db_min": quality and quality.psnr_db_min,
            "psnr_db_mean": quality and quality.psnr_db_mean,
            "ssim_mean": quality and quality.ssim_mean,
            "latency_ms": speed and speed.latency_ms,
            "images_per_s": speed and speed.images_per_s,
            "size_bytes": entry.size_bytes,
            "accepted": entry.accepted,
            "reason": entry.reason,
        }
        assert {key: found[key] for key in expected} == expected


def test_layers_that_a_search_kept_are_listed_with_the_reason(made: Path) -> None:
    manifest = read_artifact(made).manifest
    for name in {INT8, "openvino-int8"} & set(manifest.variants):
        found = manifest.variants[name].quantization
        assert found is not None
        kept = [layer.name for layer in found.kept]
        assert all(layer.reason for layer in found.kept)
        assert len({*kept, *found.layers}) == len(kept) + len(found.layers)
    of_tensorrt = manifest.variants["tensorrt-int8"].quantization
    of_onnxruntime = manifest.variants[INT8].quantization
    assert of_tensorrt is not None
    assert of_onnxruntime is not None
    every_layer = {*of_tensorrt.layers, *(layer.name for layer in of_tensorrt.kept)}
    assert every_layer == {
        *of_onnxruntime.layers, *(layer.name for layer in of_onnxruntime.kept)
    }  # fmt: skip


def test_nothing_else_is_left_behind(made: Path) -> None:
    assert [path.name for path in made.parent.iterdir()] == [made.name]
    assert set(contents(made)) == {"manifest.json", *read_manifest(made).files}


# Floors


def test_a_floor_that_nothing_meets_keeps_fp32_and_names_the_closest(
    gan_checkpoint: Path, tmp_path: Path, only_onnxruntime: None
) -> None:
    folder = tmp_path / "tiny"
    flags = (*FLAGS, "--floor-psnr-db", 199, "--json")
    done = run("export", gan_checkpoint, "--output", folder, *flags)
    assert done.code == 1
    manifest = read_artifact(folder).manifest
    by_psnr = {n: v.quality.psnr_db_min for n, v in manifest.variants.items() if v.quality}
    assert set(by_psnr) == {FP32, INT8}
    closest = max(by_psnr, key=lambda name: by_psnr[name])
    message = (
        f"no variant reaches the floors (PSNR 199 dB, mean SSIM 0.98); the closest is {closest} "
        f"with {by_psnr[closest]:.1f} dB"
    )
    assert message in json.loads(done.out)["error"]
    assert f"{FP32} is kept; see {folder}/quality/report.html" in done.said
    assert manifest.selected == FP32
    assert [v.accepted for v in manifest.variants.values()] == [False, False]
    assert all("floor 199.0 dB" in v.reason for v in manifest.variants.values())
    assert figures(folder)["selected"] == FP32
    with pytest.raises(QualityError, match=r"was refused: PSNR"):
        open_pipeline(folder)
    open_pipeline(folder, FP32).close()  # by its name it runs
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_an_overridden_floor_is_in_the_manifest_of_every_candidate(
    gan_checkpoint: Path, tmp_path: Path, only_onnxruntime: None
) -> None:
    folder = tmp_path / "tiny"
    flags = (*FLAGS, "--floor-psnr-db", 20, "--floor-ssim", 0.5, "--json")
    done = run("export", gan_checkpoint, "--output", folder, *flags)
    assert done.code == 0, done.said
    manifest = read_artifact(folder).manifest
    floors = {v.quality.floors for v in manifest.variants.values() if v.quality}
    assert floors == {Floors(psnr_db=20, ssim=0.5)}
    assert json.loads(done.out) == {
        "artifact": str(folder),
        "selected": manifest.selected,
        "within_noise": list(manifest.selection.within_noise) if manifest.selection else None,
        "report": f"{folder}/quality/report.json",
    }


# An interrupted search


def test_an_interrupted_search_goes_on_where_it_was(
    gan_checkpoint: Path,
    tmp_path: Path,
    only_onnxruntime: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, work = tmp_path / "tiny", tmp_path / ".tiny.search"
    measured: list[str] = []
    measure = DenoiserTrials.error

    def stop_at_the_third(self: DenoiserTrials, layers: Sequence[str]) -> float:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.extend(layers)
        return measure(self, layers)

    monkeypatch.setattr(DenoiserTrials, "error", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        auto(gan_checkpoint, folder, OPTIONS, (), lambda _: None)
    stopped = read_artifact(folder).manifest
    assert list(stopped.variants) == [FP32]
    assert stopped.variants[FP32].accepted
    ledger = (work / "onnxruntime.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line).get("name") for line in ledger] == [
        None, "saved_ms", *(f"error of {layer}" for layer in measured)
    ]  # fmt: skip

    again: list[str] = []

    def count(self: DenoiserTrials, layers: Sequence[str]) -> float:
        again.extend(layers)
        return measure(self, layers)

    monkeypatch.setattr(DenoiserTrials, "error", count)
    said: list[str] = []
    auto(gan_checkpoint, folder, OPTIONS, (), said.append)
    assert "going on with 3 measurements from before" in said
    assert not set(again) & set(measured)
    entry = read_artifact(folder).manifest.variants[INT8]
    assert entry.quantization is not None
    assert entry.quantization.layers
    kept = {k.name for k in entry.quantization.kept if "'s work" not in k.reason}  # too small
    assert {*again, *measured} == {*entry.quantization.layers, *kept}
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_the_command_says_that_it_can_be_gone_on_with(
    gan_checkpoint: Path,
    tmp_path: Path,
    only_onnxruntime: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(self: DenoiserTrials) -> dict[str, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(DenoiserTrials, "saved_ms", stop)
    folder = tmp_path / "tiny"
    done = run("export", gan_checkpoint, "--output", folder, *FLAGS)
    assert done.code != 0
    assert f"{folder}: stopped; the same command goes on where it was" in done.said
    assert list(read_artifact(folder).manifest.variants) == [FP32]


@pytest.mark.parametrize("end", ['{"name": "saved_ms"', '{"name": "x"}', "[1]", ""])
def test_a_ledger_that_was_cut_off_or_is_of_another_search_is_begun_anew(
    end: str, tmp_path: Path
) -> None:
    path = tmp_path / "search" / "ledger.jsonl"
    first = Ledger(path, {"floor": 35})
    assert first.recall("error of a", lambda: 0.5, float) == 0.5
    assert Ledger(path, {"floor": 35}).recall("error of a", lambda: 0.7, float) == 0.5
    assert Ledger(path, {"floor": 35}).resumed == 1
    if end:
        path.write_text(path.read_text("utf-8") + end, "utf-8")
        assert Ledger(path, {"floor": 35}).resumed == 0
    else:
        assert Ledger(path, {"floor": 40}).resumed == 0


def test_no_more_trial_pictures_are_drawn_once_one_is_below_the_floor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[int] = []

    class Part:
        def __init__(self, worst_db: float, ssim: float) -> None:
            self.worst_db, self.ssim = worst_db, ssim

        def compare(self, _: object) -> SimpleNamespace:
            drawn.append(1)
            return SimpleNamespace(psnrs_db=[60.0, self.worst_db], ssims=[self.ssim])

    def margin_db(*parts: Part) -> float:
        drawn.clear()
        trials = DenoiserTrials.__new__(DenoiserTrials)
        trials._floors = Floors(psnr_db=35, ssim=0.98)
        trials._gates = parts  # type: ignore[assignment]
        return trials.margin_db([])

    for name in ("_write", "_trial_artifact"):
        monkeypatch.setattr(DenoiserTrials, name, lambda *_: None)
    monkeypatch.setattr("export.trials.open_artifact", lambda *_: None)
    assert (margin_db(Part(50, 0.99), Part(38, 0.99), Part(41, 0.99)), len(drawn)) == (3, 3)
    assert (margin_db(Part(50, 0.99), Part(33, 0.99), Part(41, 0.99)), len(drawn)) == (-2, 2)
    assert (margin_db(Part(50, 0.97), Part(50, 0.99)), len(drawn)) == (-1, 1)


# What is not installed


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    monkeypatch.setattr(
        "export.candidates.find_spec", lambda name: None if name in packages else find_spec(name)
    )


def test_a_runtime_that_is_not_installed_is_listed_with_the_command_that_brings_it(
    gan_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = (Candidate("openvino", "fp32"), Candidate("openvino", "int8"))
    monkeypatch.setattr("export.candidates.CANDIDATES", (ONNXRUNTIME[0], *openvino))
    without(monkeypatch, "openvino")
    made = auto(gan_checkpoint, tmp_path / "tiny", OPTIONS, (), lambda _: None)
    reason = "openvino is not installed; pip install 'vitrine[openvino]'"
    manifest = made.manifest
    assert manifest.selection is not None
    assert manifest.selection.not_built == dict.fromkeys(names(openvino), reason)
    assert (list(manifest.variants), manifest.selected) == ([FP32], FP32)
    listed = {each["variant"]: each for each in figures(made.path)["candidates"]}
    for name in names(openvino):
        assert (listed[name]["accepted"], listed[name]["reason"]) == (False, reason)


def test_what_a_candidate_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "nncf", "onnxruntime")
    for candidate, package, extra in (
        (Candidate("openvino", "int8"), "nncf", "export"),
        (Candidate("onnxruntime", "int8"), "onnxruntime", "cpu"),
        (Candidate("tensorrt", "fp8"), "onnxruntime", "cpu"),  # which simulates it
    ):
        with pytest.raises(RuntimeUnavailableError) as raised:
            candidate.require_packages()
        message = f"{package} is not installed; pip install 'vitrine[{extra}]'"
        assert str(raised.value) == message
    without(monkeypatch, "nncf")
    SMALL[0].require_packages()  # weights alone need no NNCF


def test_without_any_runtime_nothing_is_written(
    gan_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "openvino", "onnxruntime")
    with pytest.raises(RuntimeUnavailableError, match=r"no candidate .*'vitrine\[cpu\]'"):
        auto(gan_checkpoint, tmp_path / "tiny", OPTIONS, (), lambda _: None)
    assert list(tmp_path.iterdir()) == []


# Wrong use


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--auto", "--runtime", "openvino"), "--auto tries every runtime and precision; leave"),
        (("--auto", "--precision", "int8"), "leave --precision out"),
        (("--auto", "--weights-only"), "leave --weights-only out"),
        (("--for", "size"), "--for is for --auto; add --auto, or leave it out"),
        (("--pictures", "4"), "--pictures is for --auto"),
        (("--search-minutes", "4"), "--search-minutes is for --auto"),
        (("--floor-psnr-db", "30"), "--floor-psnr-db is for --auto"),
        (("--floor-ssim", "0.9"), "--floor-ssim is for --auto"),
        (("--auto", "--for", "fun"), "'fun' is not one of"),
        (("--auto", "--pictures", "0"), "pictures must be 1..100000, got 0"),
        (("--auto", "--search-minutes", "0"), "search_minutes must be more than 0, got 0"),
        (("--auto", "--floor-psnr-db", "nan"), "psnr_db must be a finite number, got nan"),
        (("--auto", "--floor-psnr-db", "-1"), "psnr_db must be 0..200, got -1"),
        (("--auto", "--calibration-rows", "3"), "calibration needs at least 32 rows, got 3"),
        (("--auto", "--calibration-rows", "0"), "calibration.rows must be at least 1, got 0"),
        (("--auto", "--height", "32"), "give both or none"),
        (("--auto", "--height", "32", "--width", "32"), "this model makes 16x16 only, got 32x32"),
    ],
    ids=str,
)
def test_a_wrong_use_is_named_and_nothing_is_written(
    flags: tuple[str, ...], message: str, gan_checkpoint: Path, tmp_path: Path
) -> None:
    done = run("export", gan_checkpoint, "--output", tmp_path / "new", *flags)
    assert done.code == 2
    assert message in done.said
    assert list(tmp_path.iterdir()) == []


# The choice


def test_size_tries_weights_alone_and_picks_the_smallest(
    gan_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert names(AutoOptions(goal="size").candidates) == names((*CANDIDATES, *SMALL))
    assert names(AutoOptions().candidates) == names(CANDIDATES)
    monkeypatch.setattr("export.candidates.CANDIDATES", ONNXRUNTIME[:1])
    options = OPTIONS.model_copy(update={"goal": "size"})
    manifest = auto(gan_checkpoint, tmp_path / "tiny", options, (), lambda _: None).manifest
    assert set(manifest.variants) == {FP32, f"{INT8}-weights"}
    assert manifest.selection is not None
    assert not manifest.selection.not_built
    accepted = {n: v.size_bytes or 0 for n, v in manifest.variants.items() if v.accepted}
    assert accepted[manifest.selected] == min(accepted.values())


def timings(manifest: Manifest, **batch_s: Sequence[float]) -> dict[str, Timing]:
    """Rounds of variants by runtime and precision, `openvino_int8=(..)`."""
    by_name = {name.replace("_", "-"): series for name, series in batch_s.items()}
    assert set(by_name) <= set(manifest.variants)
    return {name: Timing(alone=series, batches=series) for name, series in by_name.items()}


def accepted(manifest: Manifest) -> Manifest:
    """The same with every variant accepted."""
    variants = {
        name: variant.model_copy(update={"accepted": True, "reason": ""})
        for name, variant in manifest.variants.items()
    }
    return manifest.model_copy(update={"variants": variants})


def test_an_int8_variant_that_is_slower_than_fp32_is_refused_with_both_figures(
    made: Path,
) -> None:
    manifest = accepted(read_artifact(made).manifest)
    slow = timings(manifest, onnxruntime_fp32=(0.4, 0.4, 0.5), onnxruntime_int8=(0.6, 0.64, 0.7))
    assert no_gain(INT8, manifest.variants, slow, "throughput") == (
        f"not faster than {FP32}, which it would replace: "
        "80.0 ms a picture in a batch of 8 against 50.0 ms"
    )
    assert no_gain(INT8, manifest.variants, slow, "latency") == (
        f"not faster than {FP32}, which it would replace: 640.0 ms a picture alone against 400.0 ms"
    )
    fast = timings(manifest, onnxruntime_fp32=(0.4, 0.4, 0.5), onnxruntime_int8=(0.3, 0.3, 0.3))
    assert no_gain(INT8, manifest.variants, fast, "throughput") == ""
    assert no_gain(FP32, manifest.variants, fast, "throughput") == ""  # it replaces nothing


def test_the_refusal_of_a_slow_variant_is_in_manifest_and_report(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "tiny"))
    manifest = accepted(read_manifest(folder))
    from engine.artifact import write_manifest

    write_manifest(folder, manifest)
    slow = timings(manifest, onnxruntime_fp32=(0.4, 0.4, 0.5), onnxruntime_int8=(0.6, 0.64, 0.7))
    monkeypatch.setattr("export.select.measure", lambda *arguments: slow)
    chosen = select(folder, "throughput", [FP32, INT8], {}, lambda _: None).manifest
    assert chosen.selected == FP32
    refused = chosen.variants[INT8]
    assert refused.accepted is False
    assert "80.0 ms a picture in a batch of 8 against 50.0 ms" in refused.reason
    assert refused.speed is not None
    assert refused.speed.images_per_s == pytest.approx(8 / 0.64)
    listed = {each["variant"]: each for each in figures(folder)["candidates"]}
    assert listed[INT8]["reason"] == refused.reason


def test_variants_that_no_round_tells_apart_are_named_and_the_better_pictures_win(
    made: Path,
) -> None:
    manifest = accepted(read_artifact(made).manifest)
    equal = timings(
        manifest, onnxruntime_fp32=(0.401, 0.399, 0.402), onnxruntime_int8=(0.4, 0.4, 0.4)
    )
    assert choose(manifest.variants, equal, "throughput") == (FP32, (INT8,))
    apart = timings(manifest, onnxruntime_fp32=(0.5, 0.5, 0.5), onnxruntime_int8=(0.4, 0.4, 0.4))
    assert choose(manifest.variants, apart, "throughput") == (INT8, ())
    nothing = {n: v.model_copy(update={"accepted": False}) for n, v in manifest.variants.items()}
    assert choose(nothing, apart, "throughput") == (None, ())


def test_choosing_twice_gives_the_same_or_names_the_other_as_within_noise(
    made: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "tiny"))
    candidates = [
        name for name in (FP32, "openvino-fp32") if name in read_manifest(folder).variants
    ]
    chosen = []
    for _ in range(2):
        manifest = select(folder, "throughput", candidates, {}, lambda _: None).manifest
        assert manifest.selection is not None
        chosen.append((manifest.selected, manifest.selection.within_noise))
    (first, tied_first), (second, tied_second) = chosen
    assert second in (first, *tied_first) or first in tied_second


def test_the_command_select_judges_what_is_there_and_chooses_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "tiny"))
    before = read_artifact(folder).manifest
    done = run(
        "select", folder, "--for", "latency", "--pictures", 2, "--floor-psnr-db", 5, "--json"
    )
    assert done.code == 0, done.said
    after = read_artifact(folder).manifest  # which verifies every hash
    assert after.selection is not None
    assert after.selection.goal == "latency"
    assert set(after.variants) == set(before.variants)
    qualities = [entry.quality for entry in after.variants.values() if entry.quality]
    assert qualities
    assert {(quality.pictures, quality.floors.psnr_db) for quality in qualities} == {(2, 5.0)}
    assert figures(folder)["selected"] == after.selected
    assert after.selected in done.said


def test_the_command_select_keeps_fp32_where_nothing_reaches_the_floor(
    made: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "tiny"))
    done = run("select", folder, "--pictures", 1, "--floor-psnr-db", 199)
    assert done.code == 1
    assert "no variant reaches the floors (PSNR 199 dB" in done.said
    manifest = read_artifact(folder).manifest
    assert manifest.variants[manifest.selected].precision == "fp32"
    assert manifest.variants[manifest.selected].accepted is False


def test_where_no_set_of_layers_gains_int8_is_not_built_and_the_reason_is_listed(
    gan_checkpoint: Path,
    tmp_path: Path,
    only_onnxruntime: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(DenoiserTrials, "call_ms", lambda self, sets: [10.0 for _ in sets])
    manifest = auto(gan_checkpoint, tmp_path / "tiny", OPTIONS, (), lambda _: None).manifest
    assert set(manifest.variants) == {FP32}
    assert manifest.selection is not None
    assert manifest.selection.not_built == {
        INT8: "no set of its layers in int8 makes a network call faster here"
    }


def test_a_candidate_that_cannot_be_exported_is_listed_once_and_the_others_go_on(
    gan_checkpoint: Path,
    tmp_path: Path,
    only_onnxruntime: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "tiny"
    first = auto(gan_checkpoint, folder, OPTIONS, (), lambda _: None).manifest
    assert set(first.variants) == {FP32, INT8}

    def fail(*_: object) -> None:
        raise ArtifactError("its graph has an operator that nobody knows")

    monkeypatch.setattr("export.auto.open_quantizer", fail)
    manifest = auto(gan_checkpoint, folder, OPTIONS, (), lambda _: None).manifest
    assert manifest.selected == FP32
    assert manifest.selection is not None
    assert manifest.selection.not_built == {}  # the one from before is there, refused
    entry = manifest.variants[INT8]
    assert (entry.accepted, entry.speed) == (False, None)
    assert entry.reason == "its graph has an operator that nobody knows"
    listed = [each["variant"] for each in figures(folder)["candidates"]]
    assert sorted(listed) == [FP32, INT8]

    new = tmp_path / "new"
    made = auto(gan_checkpoint, new, OPTIONS, (), lambda _: None).manifest
    assert set(made.variants) == {FP32}
    assert made.selection is not None
    assert list(made.selection.not_built) == [INT8]


def test_a_candidate_that_does_not_load_is_refused_and_the_others_go_on(
    gan_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = Candidate("openvino", "fp32")
    monkeypatch.setattr("export.candidates.CANDIDATES", (openvino, *ONNXRUNTIME))
    judge_it = auto_module.judge

    def cannot_load(artifact: object, name: str, *rest: object) -> Variant:
        if name == "openvino-fp32":
            raise ArtifactError("openvino cannot compile 'generator.onnx'")
        return judge_it(artifact, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(auto_module, "judge", cannot_load)
    manifest = auto(gan_checkpoint, tmp_path / "tiny", OPTIONS, (), lambda _: None).manifest
    entry = manifest.variants["openvino-fp32"]
    assert (entry.accepted, entry.reason) == (False, "openvino cannot compile 'generator.onnx'")
    assert (entry.quality, entry.speed) == (None, None)
    assert manifest.variants[INT8].quality is not None
    assert manifest.selected in (FP32, INT8)


def test_trial_pictures_are_drawn_anew_where_there_are_to_be_more(
    gan_checkpoint: Path,
    tmp_path: Path,
    only_onnxruntime: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[int] = []

    def margin_db(self: DenoiserTrials, layers: Sequence[str]) -> float:
        drawn.append(sum(len(gate.requests) for gate in self._gates))
        if len(drawn) == 1:
            return 1.0
        raise KeyboardInterrupt

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DenoiserTrials, "margin_db", margin_db)
    monkeypatch.setattr(auto_module, "select", stop)
    with pytest.raises(KeyboardInterrupt):
        auto(gan_checkpoint, tmp_path / "tiny", OPTIONS, (), lambda _: None)
    more = OPTIONS.model_copy(update={"pictures": 20})
    with pytest.raises(KeyboardInterrupt):
        auto(gan_checkpoint, tmp_path / "tiny", more, (), lambda _: None)
    assert drawn == [16, 80]


def test_where_the_time_is_up_before_a_set_was_tried_that_is_the_reason(
    gan_checkpoint: Path, tmp_path: Path, only_onnxruntime: None
) -> None:
    hurried = OPTIONS.model_copy(update={"search_minutes": 1e-9})
    manifest = auto(gan_checkpoint, tmp_path / "tiny", hurried, (), lambda _: None).manifest
    assert manifest.selection is not None
    assert manifest.selection.not_built == {
        INT8: "the time of the search was up before a set of layers was tried; raise it"
    }


def test_where_the_gate_refuses_a_set_of_layers_the_next_one_is_tried(
    gan_checkpoint: Path,
    tmp_path: Path,
    only_onnxruntime: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[tuple[str, ...]] = []

    def stern(path: Path, name: str, *_: object) -> Variant:
        entry = read_artifact(path).manifest.variants[name]
        if entry.quantization is None:
            return refuse(read_artifact(path), name, "it is float")
        tried.append(entry.quantization.layers)
        if len(tried) < 3:
            return refuse(read_artifact(path), name, "too many layers")
        return judge_it(path, name, *_)

    judge_it = auto_module._judge
    monkeypatch.setattr(auto_module, "_judge", stern)
    monkeypatch.setattr(DenoiserTrials, "margin_db", lambda self, layers: 1.0)
    manifest = auto(gan_checkpoint, tmp_path / "tiny", OPTIONS, (), lambda _: None).manifest
    entry = manifest.variants[INT8]
    assert entry.accepted
    assert entry.quantization is not None
    assert entry.quantization.layers == tried[2]
    assert len(tried[0]) > len(tried[1]) > len(tried[2]) > 0
    names = {*entry.quantization.layers, *(layer.name for layer in entry.quantization.kept)}
    assert names >= set(tried[0])


def test_where_no_candidate_can_be_exported_every_reason_is_named_once(
    gan_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = (Candidate("onnxruntime", "fp32"), Candidate("openvino", "fp32"))
    monkeypatch.setattr("export.candidates.CANDIDATES", plain)

    def fail(*_: object) -> None:
        raise ArtifactError("its graph has an operator that nobody knows")

    monkeypatch.setattr("export.auto.export", fail)
    with pytest.raises(ArtifactError, match=r"^its graph has an operator that nobody knows$"):
        auto(gan_checkpoint, tmp_path / "tiny", OPTIONS, (), lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_a_check_leaves_a_report_that_says_what_it_found(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "tiny"))
    with pytest.raises(QualityError, match="below the floor 199"):
        check(folder, pictures=3, floors=Floors(psnr_db=199), variant=INT8)
    manifest = read_artifact(folder).manifest  # which verifies every hash
    assert {"quality/report.json", "quality/report.html"} <= set(manifest.files)
    listed = {each["variant"]: each for each in figures(folder)["candidates"]}
    assert (listed[INT8]["pictures"], listed[INT8]["accepted"]) == (3, False)
    assert listed[INT8]["reason"] == manifest.variants[INT8].reason
    assert listed[FP32]["pictures"] == OPTIONS.pictures


def test_a_check_of_its_pictures_does_not_accept_what_the_clock_refused(
    gan_checkpoint: Path, tmp_path: Path, only_onnxruntime: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny"
    slow = "not faster than onnxruntime-fp32, which it would replace: 2 ms against 1 ms"
    monkeypatch.setattr("export.select.no_gain", lambda name, *_: slow if name == INT8 else "")
    auto(gan_checkpoint, folder, OPTIONS, (), lambda _: None)
    checked = check(folder, pictures=3, variant=INT8)
    entry = read_artifact(folder).manifest.variants[INT8]
    assert (entry.accepted, entry.reason, entry.quality) == (False, slow, checked)
    with pytest.raises(QualityError, match="below the floor 199"):
        check(folder, pictures=3, floors=Floors(psnr_db=199), variant=INT8)
    check(folder, pictures=3, variant=INT8)
    assert read_artifact(folder).manifest.variants[INT8].reason == slow
    monkeypatch.setattr("export.select.no_gain", lambda *_: "")  # only another clock does
    select_anew(folder, None, "throughput", Floors(), 3, lambda _: None)
    assert read_artifact(folder).manifest.variants[INT8].accepted


def test_a_selected_variant_that_is_made_anew_is_not_selected_unmeasured(
    made: Path, diffusion_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "tiny"))
    manifest = read_artifact(folder).manifest
    selected = manifest.selected
    runtime, precision = selected.split("-")
    options = VariantOptions.parse(
        {"runtime": runtime, "precision": precision, "layers": ("conv_out",)}
        if precision == "int8"
        else {"runtime": runtime, "precision": precision}
    )
    entry = manifest.variants[selected].model_copy(update={"build": {"changed": True}})
    variants = {**manifest.variants, selected: entry}
    write_manifest(folder, manifest.model_copy(update={"variants": variants}))
    after = export(diffusion_checkpoint, folder, options).artifact.manifest
    assert after.variants[selected].accepted is None
    assert after.selected != selected
    assert after.variants[after.selected].accepted
    assert not (folder / "quality" / "report.html").exists()  # of what it was before
