"""The report says what the manifest says: every candidate, every reason, no figure of its own."""

import base64
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from engine.errors import ArtifactError
from engine.images import grid
from engine.machine import Machine
from engine.manifest import (
    Floors,
    ImageSpec,
    KeptLayer,
    Manifest,
    ModelSpec,
    NetworkSpec,
    Quality,
    Quantization,
    Selection,
    Source,
    Speed,
    TensorSpec,
    Variant,
)
from export.report import write_report
from export.scatter import Box, log_ticks, place
from export.summary import significant

SVG = "{http://www.w3.org/2000/svg}"
MACHINE = Machine(processor="AMD EPYC 9R14", cores=2)
FLOORS = Floors()
RUNTIMES = {"onnxruntime": "1.32.0", "openvino": "2026.4.1", "tensorrt": "10.16.1"}

# name: (worst PSNR, mean SSIM), (latency, images/s), size in MB, accepted, reason
FIGURES = {
    "onnxruntime-fp32": ((138.2, 1.0), (71.3, 14.3), 88.1, True, ""),
    "openvino-fp32": ((131.9, 1.0), (66.0, 15.9), 88.4, True, ""),
    "openvino-bf16": ((50.4, 0.9991), (35.1, 31.2), 88.4, True, ""),
    "openvino-int8": ((37.25, 0.9921), (27.9, 41.7), 23.9, True, ""),
    "openvino-int8-all": (
        (28.81, 0.9512), (24.0, 48.3), 22.6, False,
        "PSNR 28.8 dB is below the floor 35.0 dB",
    ),
    "onnxruntime-int8": (
        (44.0, 0.9975), (79.2, 12.9), 24.0, False,
        "12.9 images/s are no faster than onnxruntime-fp32, 14.3 images/s",
    ),
    "onnxruntime-int8-nan": (
        None, None, 24.0, False, "onnxruntime-int8-nan makes NaN or infinite pixels for seed 3",
    ),
    "tensorrt-fp8": ((39.4, 0.9950), None, 24.2, True, ""),
}  # fmt: skip
NOT_BUILT = {"onnxruntime-bf16": "onnxruntime computes nothing in bf16 on a CPU"}
LABELS = ("bag", "<script>alert('boot')</script>", "coat")
KEPT = KeptLayer(name="/conv_in/Conv", reason="costs 4.1 dB, saves 0.2 ms")


def evidence(folder: Path, name: str) -> str:
    """A grid of two seeds, as the gate leaves it."""
    picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    path = folder / "quality" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    captions = ["seed 17: reference", "result", "difference"] * 2
    grid([picture] * 6, 3, captions, 8).save(path)
    return path.relative_to(folder).as_posix()


def variant(folder: Path, name: str) -> Variant:
    pictures, clocks, size_mb, accepted, reason = FIGURES[name]
    runtime, precision = name.split("-")[:2]
    is_tensorrt = runtime == "tensorrt"
    return Variant(
        runtime=runtime,
        precision=precision,
        runtime_version=RUNTIMES[runtime],
        networks={} if is_tensorrt else {"unet": "graphs/unet.onnx"},
        graphs={"unet": "graphs/unet.onnx"} if is_tensorrt else {},
        quantization=quantization() if precision in ("int8", "fp8") else None,
        size_bytes=int(size_mb * 1e6),
        quality=quality(evidence(folder, name), is_tensorrt, *pictures) if pictures else None,
        speed=speed(*clocks) if clocks else None,
        accepted=accepted,
        reason=reason,
    )


def quality(picture: str, simulated: bool, psnr_db: float, ssim: float) -> Quality:
    return Quality(
        pictures=64,
        psnr_db_min=psnr_db,
        psnr_db_mean=psnr_db + 2.5,
        ssim_min=ssim - 0.003,
        ssim_mean=ssim,
        isr_db_min=psnr_db - 6.0,
        isr_db_mean=psnr_db - 4.0,
        floors=FLOORS,
        simulated=simulated,
        worst_seed=17,
        worst_picture=picture,
    )


def speed(latency_ms: float, images_per_s: float) -> Speed:
    return Speed(
        latency_ms=latency_ms,
        images_per_s=images_per_s,
        spread=0.012,
        batch=8,
        num_inference_steps=10,
        guidance_scale=2.0,
        machine=MACHINE,
    )


def quantization() -> Quantization:
    return Quantization(
        network="unet",
        calibration="calibration/unet.npz",
        kept_precision="bf16",
        layers=("/down/0/Conv", "/mid/Conv", "/up/0/Conv"),
        kept=(KEPT, KeptLayer(name="/conv_out/Conv", reason="the last layer")),
    )


def model() -> ModelSpec:
    sample = TensorSpec(name="sample", dtype="float32", shape=("batch", 3, 64, 64))
    return ModelSpec(
        family="pixel_unet",
        labels=LABELS,
        image=ImageSpec(height=64, width=64, channels=3),
        networks={"unet": NetworkSpec(inputs=(sample,), outputs=(sample,))},
    )


def manifest_of(folder: Path, **changes: object) -> Manifest:
    made = Manifest(
        vitrine_version="0.1.0",
        source=Source(path="checkpoints/shoes & boots", sha256="ab" * 32),
        model=model(),
        variants={name: variant(folder, name) for name in FIGURES},
        selected="openvino-int8",
        selection=Selection(goal="throughput", within_noise=(), not_built=NOT_BUILT),
        files={},
    )
    return made.model_copy(update=changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shoes-64"


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    return manifest_of(folder)


class Page(HTMLParser):
    """The tags of a page, the cells of its rows, and its text outside of styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "style" and not self.text.strip():
            return
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        rows = ([" ".join(cell.split()) for cell in row] for row in self.rows)
        return next(row for row in rows if row[0] == name)


def written(folder: Path, manifest: Manifest) -> tuple[str, dict[str, object]]:
    html, figures = write_report(folder, manifest)
    return (folder / html).read_text("utf-8"), json.loads((folder / figures).read_text("utf-8"))


def svg(html: str) -> ElementTree.Element:
    """The plot, read by an XML parser: it raises where the markup is not well formed."""
    plot = re.search(r'<svg class="plot".*?</svg>', html, re.DOTALL)
    assert plot
    return ElementTree.fromstring(plot[0])


def spots(html: str) -> dict[str, tuple[float, float]]:
    """Where the plot has each candidate."""
    root = svg(html)
    marks = [group.get("transform", "") for group in root.iter(f"{SVG}g")]
    names = [text.text for text in root.iter(f"{SVG}text") if text.text in FIGURES]
    numbers = [re.findall(r"[\d.]+", mark) for mark in marks]
    return {str(n): (float(x), float(y)) for n, (x, y) in zip(names, numbers, strict=True)}


def test_the_figures_are_the_manifests(folder: Path, manifest: Manifest) -> None:
    _, report = written(folder, manifest)
    assert {c["variant"] for c in report["candidates"]} == {*FIGURES, *NOT_BUILT}
    for candidate in report["candidates"]:
        if candidate["variant"] in NOT_BUILT:
            continue
        source = manifest.variants[candidate["variant"]]
        for key in ("psnr_db_min", "psnr_db_mean", "ssim_min", "ssim_mean", "isr_db_min",
                    "isr_db_mean", "worst_seed"):  # fmt: skip
            assert candidate[key] == getattr(source.quality, key, None)
        for key in ("latency_ms", "images_per_s", "spread"):
            assert candidate[key] == getattr(source.speed, key, None)
        for key in ("size_bytes", "accepted", "reason", "runtime", "precision"):
            assert candidate[key] == getattr(source, key)
    assert report["selected"] == "openvino-int8"
    assert report["goal"] == "throughput"
    assert report["floors"] == {"psnr_db": 35.0, "ssim": 0.98}
    assert report["machine"] == {"processor": "AMD EPYC 9R14", "cores": 2}
    assert report["checkpoint"]["sha256"] == "ab" * 32


def test_what_was_not_measured_is_null(folder: Path, manifest: Manifest) -> None:
    _, report = written(folder, manifest)
    by_name = {c["variant"]: c for c in report["candidates"]}
    unbuilt = by_name["onnxruntime-bf16"]
    figures = ("psnr_db_min", "psnr_db_mean", "ssim_mean", "latency_ms", "images_per_s")
    assert all(unbuilt[key] is None for key in (*figures, "size_bytes"))
    assert unbuilt["accepted"] is False
    assert unbuilt["reason"] == NOT_BUILT["onnxruntime-bf16"]
    assert by_name["tensorrt-fp8"]["latency_ms"] is None
    assert "GPU" in by_name["tensorrt-fp8"]["not_timed"]
    assert by_name["tensorrt-fp8"]["simulated"] is True


def test_accepted_candidates_come_first_and_fast_ones_before_slow(
    folder: Path, manifest: Manifest
) -> None:
    _, report = written(folder, manifest)
    assert [c["variant"] for c in report["candidates"]] == [
        "openvino-int8", "openvino-bf16", "openvino-fp32", "onnxruntime-fp32", "tensorrt-fp8",
        "openvino-int8-all", "onnxruntime-int8", "onnxruntime-int8-nan", "onnxruntime-bf16",
    ]  # fmt: skip


def test_the_page_needs_nothing_else(folder: Path, manifest: Manifest) -> None:
    html, _ = written(folder, manifest)
    page = Page(html)
    links = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "data") if key in a]
    assert all(str(link).startswith("data:image/png;base64,") for link in links)
    assert not {"script", "link", "iframe", "object", "use"} & {tag for tag, _ in page.tags}
    assert "url(" not in html
    assert "@import" not in html


def test_the_page_holds_the_evidence_itself(folder: Path, manifest: Manifest) -> None:
    html, _ = written(folder, manifest)
    images = [str(attributes["src"]) for tag, attributes in Page(html).tags if tag == "img"]
    assert len(images) == sum(v.quality is not None for v in manifest.variants.values())
    png = (folder / "quality/openvino-int8.png").read_bytes()
    assert base64.b64decode(images[0].partition(",")[2]) == png


def test_every_candidate_is_in_the_table_with_its_reason(folder: Path, manifest: Manifest) -> None:
    page = Page(written(folder, manifest)[0])
    for name, (*_, reason) in FIGURES.items():
        assert reason in page.row(name)[-1]
    for name, reason in NOT_BUILT.items():
        assert page.row(name)[1] == "not built"
        assert reason in page.row(name)[-1]
    assert page.row("openvino-int8")[1] == "selected"
    assert page.row("onnxruntime-int8")[1] == "refused"
    assert "not timed" in page.row("tensorrt-fp8")
    assert "GPU" in page.row("tensorrt-fp8")[-1]


def test_the_table_has_the_manifests_figures_rounded(folder: Path, manifest: Manifest) -> None:
    page = Page(written(folder, manifest)[0])
    assert page.row("openvino-bf16")[2:-1] == [
        "50.4", "52.9", "0.9991", "44.4", "35.1", "31.2", "1.2", "88.4",
    ]  # fmt: skip


def test_the_first_sentence_says_what_was_chosen_and_why(folder: Path, manifest: Manifest) -> None:
    text = Page(written(folder, manifest)[0]).text
    assert (  # 41.7 / 31.2 = 1.337; 41.7 / 15.9 = 2.623
        "openvino-int8 was selected for throughput: 41.7 images/s in batches of 8, "
        "1.34 times as fast as openvino-bf16 (the next one accepted), "
        "2.62 times as fast as openvino-fp32 (the best in fp32)." in text
    )
    assert "The worst of its 64 pictures is 37.2 dB from the fp32 torch reference" in text


@pytest.mark.parametrize(
    ("goal", "selected", "expected"),
    [
        # 35.1 / 27.9 = 1.258; 23.9 / 88.1 = 0.271; untimed tensorrt-fp8 has no latency, but a size
        ("latency", "openvino-int8", "27.9 ms for a picture alone, 1.26 times as fast as openv"),
        ("size", "openvino-int8", "23.9 MB, 0.99 times the size of tensorrt-fp8"),
    ],
)
def test_the_first_sentence_speaks_of_the_goal(
    folder: Path, goal: str, selected: str, expected: str
) -> None:
    selection = Selection(goal=goal, within_noise=(), not_built={})
    made = manifest_of(folder, selected=selected, selection=selection)
    assert f"selected for {goal}: {expected}" in Page(written(folder, made)[0]).text


def test_ties_are_named(folder: Path) -> None:
    selection = Selection(goal="throughput", within_noise=("openvino-bf16",), not_built={})
    html, report = written(folder, manifest_of(folder, selection=selection))
    page = Page(html)
    assert report["within_noise"] == ["openvino-bf16"]
    assert "openvino-bf16 is as fast, as far as was measured" in page.text
    assert "within the noise of openvino-int8" in page.row("openvino-bf16")[-1]
    assert "as fast as openvino-bf16" not in page.text


def test_where_no_candidate_is_accepted_the_closest_is_named(folder: Path) -> None:
    floor = "PSNR {:.1f} dB is below the floor 150.0 dB"
    variants = {
        name: variant(folder, name).model_copy(
            update={"accepted": False, "reason": floor.format(FIGURES[name][0][0])}
        )
        for name in ("openvino-fp32", "onnxruntime-fp32", "openvino-bf16")
    }
    made = manifest_of(folder, variants=variants, selected="openvino-fp32")
    page = Page(written(folder, made)[0])
    assert "No candidate was accepted; openvino-fp32 is kept: PSNR 131.9 dB is below" in page.text
    assert "The closest is onnxruntime-fp32: PSNR 138.2 dB is below" in page.text
    assert page.row("openvino-fp32")[1] == "refused, kept"


def test_a_selected_variant_that_was_refused_is_not_praised(folder: Path) -> None:
    text = Page(written(folder, manifest_of(folder, selected="openvino-int8-all"))[0]).text
    assert "openvino-int8-all is selected, but refused: PSNR 28.8 dB is below the floor" in text
    assert "Accepted: openvino-int8, openvino-bf16" in text
    assert "was selected for" not in text


def test_a_choice_of_the_user_is_not_called_a_measurement(folder: Path) -> None:
    html, report = written(folder, manifest_of(folder, selection=None))
    assert report["goal"] is None
    assert "openvino-int8 is selected; it was not chosen by measurement." in Page(html).text


def test_an_artifact_that_nobody_checked_has_a_report_without_plot(folder: Path) -> None:
    bare = {"quality": None, "speed": None, "accepted": None, "quantization": None}
    only = variant(folder, "openvino-bf16").model_copy(update=bare)
    made = manifest_of(
        folder, variants={"openvino-bf16": only}, selected="openvino-bf16", selection=None
    )
    html, report = written(folder, made)
    assert 'class="plot"' not in html
    assert report["candidates"][0]["accepted"] is None
    assert report["candidates"][0]["not_timed"] == "not timed"
    assert "have not been compared with the reference" in html


def test_speeds_of_another_machine_are_not_compared(folder: Path) -> None:
    variants = {name: variant(folder, name) for name in ("openvino-int8", "openvino-bf16")}
    elsewhere = speed(35.1, 31.2).model_copy(
        update={"machine": Machine(processor="Intel Xeon 8488C", cores=4)}
    )
    variants["openvino-bf16"] = variants["openvino-bf16"].model_copy(update={"speed": elsewhere})
    text = Page(written(folder, manifest_of(folder, variants=variants))[0]).text
    assert "41.7 images/s in batches of 8." in text
    assert "Intel Xeon 8488C, 4 cores" in text
    assert "AMD EPYC 9R14, 2 cores" in text


def test_the_layers_kept_back_are_listed_with_their_reasons(
    folder: Path, manifest: Manifest
) -> None:
    html, report = written(folder, manifest)
    page = Page(html)
    assert page.row(KEPT.name) == [KEPT.name, KEPT.reason]
    assert "openvino-int8: unet, 3 layers in int8, 2 kept in bf16" in page.text
    kept = report["candidates"][0]["quantization"]["kept"]
    assert kept[0] == {"name": KEPT.name, "reason": KEPT.reason}


def test_names_of_users_are_text_and_never_markup(folder: Path) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    variants = {"openvino-int8": variant(folder, "openvino-int8").model_copy(
        update={"reason": evil}
    ), evil: variant(folder, "openvino-bf16")}  # fmt: skip
    selection = Selection(goal="throughput", within_noise=(evil,), not_built={evil + "2": evil})
    made = manifest_of(folder, variants=variants, selection=selection)
    write_report(folder, made, name=evil)
    html = (folder / "quality/report.html").read_text("utf-8")
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert page.text.count(evil) >= 8  # title, heading, names, reasons, labels of the plot
    assert LABELS[1] in page.text
    assert svg(html) is not None


def test_points_are_in_the_order_of_their_figures(folder: Path, manifest: Manifest) -> None:
    found = spots(written(folder, manifest)[0])
    assert found.keys() == {name for name, (pictures, *_) in FIGURES.items() if pictures}
    for one, other in combinations(found, 2):
        (psnr, _), (other_psnr, _) = FIGURES[one][0], FIGURES[other][0]
        assert (found[one][1] < found[other][1]) == (psnr > other_psnr)  # pixels count down
        clocks, other_clocks = FIGURES[one][1], FIGURES[other][1]
        if clocks and other_clocks:
            assert (found[one][0] < found[other][0]) == (clocks[1] < other_clocks[1])
    floor = next(line for line in svg_lines(folder) if line.get("class") == "floor")
    height = float(floor.get("y1", "nan"))
    assert found["openvino-int8"][1] < height < found["openvino-int8-all"][1]


def svg_lines(folder: Path) -> Iterator[ElementTree.Element]:
    return svg((folder / "quality/report.html").read_text("utf-8")).iter(f"{SVG}line")


def test_labels_cover_neither_each_other_nor_a_point() -> None:
    """Nine names of the longest kind, all at one spot in a corner."""
    spots = [(870.0 + i % 3, 30.0 + i // 3) for i in range(9)]
    taken = [Box(x - 8, y - 8, x + 8, y + 8) for x, y in spots]
    for x, y in spots:
        taken.append(place(x, y, "onnxruntime-fp16-1024x1024", taken).box)
    for label in taken[9:]:
        assert label.inside(Box(0, 0, 900, 460))
        assert sum(label.overlaps(box) for box in taken) == 1  # itself


@pytest.mark.parametrize(("low", "high"), [(100, 300), (8.7, 27), (0.2, 5000), (13, 49), (31, 93)])
def test_an_axis_has_a_few_round_ticks(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 4 <= len(ticks) <= 10
    assert all(low <= tick <= high for tick in ticks)
    assert all(len(f"{tick:.10g}".replace(".", "").strip("0")) <= 2 for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4, "0.400"), (39.84, "39.8"), (251.2, "251"), (1234.4, "1234"), (99.96, "100.0"), (0, "0")],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_a_report_is_replaced_and_never_written_into_a_shared_file(
    folder: Path, manifest: Manifest
) -> None:
    html, _ = write_report(folder, manifest)
    shared = folder.parent / "of-another-artifact.html"
    shared.hardlink_to(folder / html)
    before = shared.read_bytes()
    write_report(folder, manifest, name="renamed")
    assert shared.read_bytes() == before
    assert b"renamed" in (folder / html).read_bytes()
    assert not list((folder / "quality").glob("*.partial"))


def test_the_same_manifest_gives_the_same_bytes(folder: Path, manifest: Manifest) -> None:
    first = written(folder, manifest)
    assert written(folder, manifest) == first


def test_missing_evidence_is_named_with_the_command_that_makes_it(
    folder: Path, manifest: Manifest
) -> None:
    (folder / "quality/openvino-bf16.png").unlink()
    with pytest.raises(ArtifactError, match=r"openvino-bf16\.png.*vitrine check .*openvino-bf16"):
        write_report(folder, manifest)
