"""`vitrine lint`, `check` and `select`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from engine.artifact import is_artifact, read_artifact
from engine.console import AsJson, console, emit, progress
from engine.errors import OptionError, QualityError
from engine.manifest import Floors, Goal, Manifest
from export.terminal import print_finding, print_regression, say_selected

app = typer.Typer()

VariantName = Annotated[str | None, typer.Option(help="default: the selected one")]


def floor_options(psnr_db: float | None, ssim: float | None) -> dict[str, float]:
    """The floors that the user overrides."""
    given = {"psnr_db": psnr_db, "ssim": ssim}
    return {name: value for name, value in given.items() if value is not None}


@app.command()
def lint(
    path: Annotated[Path, typer.Argument(help="an ONNX file, or an artifact")],
    target: Annotated[
        Literal["tensorrt", "onnxruntime", "openvino"], typer.Option(help="what shall run it")
    ],
    profile: Annotated[
        list[str] | None,
        typer.Option(help="NAME:MIN..OPT..MAX,... to check too (tensorrt); may be repeated"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Name each node that a runtime cannot run or silently runs badly; exit 1 if one cannot."""
    from export.lint import lint as examine
    from export.profile import parse_profile

    profiles = [parse_profile(text) for text in profile or ()]
    graphs = {path.name: path}
    if is_artifact(path):
        names = _graphs_for(target, read_artifact(path).manifest)
        graphs = {name: path / name for name in names}
    found = [
        (name, finding)
        for name, file in graphs.items()
        for finding in examine(file, target, profiles)
    ]
    for name, finding in found:
        print_finding(name, finding)
    errors = sum(finding.severity == "error" for _, finding in found)
    warnings = len(found) - errors
    console.print(
        f"{path}: {len(graphs)} graphs, {errors} errors, {warnings} warnings for {target}",
        markup=False,
    )
    emit(
        {"path": str(path), "findings": [{"graph": n, **f.model_dump()} for n, f in found]}, as_json
    )
    if errors:
        raise typer.Exit(QualityError.exit_code)


def _graphs_for(target: str, manifest: Manifest) -> list[str]:
    """The ONNX files of the variants for a target; where there are none, those of full float."""
    variants = manifest.variants.values()
    chosen = [v for v in variants if v.runtime == target] or [
        v for v in variants if not v.quantization
    ]
    files = {file for v in chosen for file in (*v.networks.values(), *v.graphs.values())}
    return [name for name in manifest.files if name.endswith(".onnx") and name in files]


@app.command()
def check(
    artifact: Annotated[Path, typer.Argument(help="an artifact folder")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="where its checkpoint is, if that has moved")
    ] = None,
    pictures: Annotated[
        int | None, typer.Option(min=1, help="one a seed, from 0; default 32")
    ] = None,
    floor_psnr_db: Annotated[
        float | None, typer.Option(help="for the worst picture; default 35")
    ] = None,
    floor_ssim: Annotated[float | None, typer.Option(help="for the mean; default 0.98")] = None,
    variant: VariantName = None,
    baseline: Annotated[
        Path | None, typer.Option(help="compare with this file; exit 1 if a picture moved")
    ] = None,
    write_baseline: Annotated[
        bool, typer.Option("--write-baseline", help="make the baseline what the pictures are now")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare an artifact's pictures with its checkpoint's in torch; exit 1 if one falls short."""
    from export.gate import check as compare

    if write_baseline and baseline is None:
        raise OptionError("--write-baseline needs the file: --baseline FILE")
    if baseline is not None:
        given = {
            "--floor-psnr-db": floor_psnr_db, "--floor-ssim": floor_ssim, "--variant": variant,
            "--pictures": None if write_baseline else pictures,
        }  # fmt: skip
        _refuse(given, "a baseline has its own variants, pictures and figures")
        _check_baseline(artifact, checkpoint, baseline, pictures, write_baseline, as_json)
        return
    floors = Floors.parse(floor_options(floor_psnr_db, floor_ssim), "floor")
    with console.status(f"checking {artifact}"):
        quality = compare(artifact, checkpoint, pictures or 32, floors, variant)
    console.print(
        f"{artifact}: PSNR at least {quality.psnr_db_min:.1f} dB (seed {quality.worst_seed}), "
        f"mean SSIM {quality.ssim_mean:.6f} over {quality.pictures} pictures; "
        f"see {artifact / quality.worst_picture}",
        markup=False,
    )
    emit({"artifact": str(artifact), **quality.model_dump()}, as_json)


def _refuse(given: Mapping[str, object], reason: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise OptionError(f"{reason}; leave {name} out")


def _check_baseline(
    artifact: Path,
    checkpoint: Path | None,
    file: Path,
    pictures: int | None,
    write: bool,
    as_json: bool,
) -> None:
    from export.baseline import compare, write_baseline

    if write:
        with console.status(f"drawing {artifact}"):
            drawn = write_baseline(file, artifact, checkpoint, pictures or 8)
        console.print(f"{file}: {len(drawn.variants)} variants written", markup=False)
        emit({"baseline": str(file), "variants": list(drawn.variants)}, as_json)
        return
    with console.status(f"comparing {artifact} with {file}"):
        found = compare(file, artifact, checkpoint)
    print_regression(found)
    same = len(found.bytes_compared)
    console.print(
        f"{artifact}: {len(found.moved)} figures of {found.pictures} pictures a variant moved from "
        f"{file}; bytes compared for {same} variants and operations, those of this machine",
        markup=False,
    )
    emit(
        {
            "artifact": str(artifact),
            "moved": [vars(moved) for moved in found.moved],
            "bytes_compared": list(found.bytes_compared),
        },
        as_json,
    )
    if found.moved:
        raise typer.Exit(QualityError.exit_code)


@app.command()
def select(
    artifact: Annotated[Path, typer.Argument(help="an artifact with several variants")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="where its checkpoint is, if that has moved")
    ] = None,
    goal: Annotated[Goal, typer.Option("--for", help="what is to be best")] = "throughput",
    floor_psnr_db: Annotated[
        float | None, typer.Option(help="for the worst picture; default 35")
    ] = None,
    floor_ssim: Annotated[float | None, typer.Option(help="for the mean; default 0.98")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="to judge each by")] = 64,
    as_json: AsJson = False,
) -> None:
    """Judge and time the variants that are there, on this machine, and choose again."""
    from export.auto import select_anew

    floors = Floors.parse(floor_options(floor_psnr_db, floor_ssim), "floor")
    with progress(f"selecting a variant of {artifact}") as report_progress:
        made = select_anew(artifact, checkpoint, goal, floors, pictures, report_progress)
    say_selected(made.manifest, artifact, as_json)
