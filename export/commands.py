"""`vitrine export`, `plan`, `lint` and `check`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine.console import AsJson, console, emit
from engine.errors import OptionError, QualityError, RuntimeUnavailableError

if TYPE_CHECKING:
    from export.finding import Finding
    from export.variant import PlanBuild

app = typer.Typer()

VariantName = Annotated[str | None, typer.Option(help="default: the selected one")]
_PLAN = "TensorRT plans"


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a folder in the diffusers layout")],
    output: Annotated[Path, typer.Option(help="the artifact to write, or to add a variant to")],
    runtime: Annotated[
        Literal["onnxruntime", "openvino", "tensorrt"], typer.Option(help="what shall run it")
    ] = "onnxruntime",
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"], typer.Option(help="of the graphs' weights and arithmetic")
    ] = "fp32",
    height: Annotated[
        int | None, typer.Option(help="with --width: a build for this picture size only")
    ] = None,
    width: Annotated[int | None, typer.Option(help="see --height")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE.safetensors[=SCALE] to fuse; may be repeated")
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="BATCH[:HEIGHT:WIDTH], each MIN..OPT..MAX; may be repeated",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    optimization_level: Annotated[int, typer.Option(help="0..5", rich_help_panel=_PLAN)] = 3,
    workspace_gib: Annotated[
        float | None, typer.Option(help="default: all memory", rich_help_panel=_PLAN)
    ] = None,
    tf32: Annotated[
        bool, typer.Option(help="fp32 products with 10 bits", rich_help_panel=_PLAN)
    ] = False,
    refit: Annotated[
        bool, typer.Option(help="other weights may be put in later", rich_help_panel=_PLAN)
    ] = False,
    strip_plan: Annotated[
        bool, typer.Option(help="leave the weights out", rich_help_panel=_PLAN)
    ] = False,
    weight_streaming: Annotated[
        bool, typer.Option(help="weights may stay in host memory", rich_help_panel=_PLAN)
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option(help="later TensorRT versions run it too", rich_help_panel=_PLAN)
    ] = False,
    hardware_compatibility: Annotated[
        Literal["none", "ampere_plus", "same_compute_capability"],
        typer.Option(help="which other GPUs run it too", rich_help_panel=_PLAN),
    ] = "none",
    as_json: AsJson = False,
) -> None:
    """Turn a checkpoint into an artifact that runs without torch, one variant a call."""
    from export.build import export as build
    from export.variant import VariantOptions

    plan = _plan_build(
        profile,
        optimization_level=optimization_level,
        workspace_gib=workspace_gib,
        tf32=tf32,
        refit=refit,
        strip_plan=strip_plan,
        weight_streaming=weight_streaming,
        version_compatible=version_compatible,
        hardware_compatibility=hardware_compatibility,
    )
    options = VariantOptions.parse(
        {
            "runtime": runtime, "precision": precision, "height": height, "width": width,
            "plan": plan.model_dump(mode="json"),
        }
    )  # fmt: skip
    with console.status(f"exporting {checkpoint}") as status:
        made = build(checkpoint, output, options, _loras(lora or ()), status.update)
    variants = made.artifact.manifest.variants
    if made.replaced:
        console.print(
            f"{output} was of other weights: its variants {', '.join(made.replaced)} are gone",
            style="yellow",
            markup=False,
        )
    for network, finding in made.findings:
        _print_finding(network, finding)
    pending = not variants[made.variant].networks and _plans_are_missing(output, made.variant)
    if made.unchanged and not pending:
        console.print(f"{output}: {made.variant} is up to date, nothing to do", markup=False)
    elif not pending:
        selected = made.artifact.manifest.selected
        console.print(
            f"{output}: {made.variant} exported; variants: {', '.join(variants)}; "
            f"selected: {selected}; next: vitrine check {output}"
            + ("" if made.variant == selected else f" --variant {made.variant}"),
            markup=False,
        )
    emit(
        {
            "artifact": str(output),
            "variant": made.variant,
            "variants": list(variants),
            "replaced": list(made.replaced),
            "unchanged": made.unchanged,
            "pending": pending,
        },
        as_json,
    )


def _plans_are_missing(artifact: Path, variant: str) -> bool:
    """Build the plans here; where that is not possible, say what is left to do where."""
    try:
        _build_plans(artifact, variant)
    except RuntimeUnavailableError as error:
        console.print(
            f"{artifact}: {variant} has its graphs, its plans are not built: {error}; on the "
            f"machine with the GPU that shall run it: vitrine plan {artifact}",
            markup=False,
        )
        return True
    return False


def _build_plans(artifact: Path, variant: str | None, refit: bool = False) -> None:
    from export.plans import build_plans

    with console.status(f"building plans of {artifact}") as status:
        build_plans(artifact, variant, refit, status.update)


def _plan_build(profiles: list[str] | None, **options: object) -> "PlanBuild":
    from export.variant import PlanBuild, parse_ranges

    values: dict[str, object] = {"options": options}
    if profiles:
        values["ranges"] = [parse_ranges(text).model_dump() for text in profiles]
    return PlanBuild.parse(values)


def _loras(texts: list[str] | tuple[()]) -> list[tuple[Path, float]]:
    loras = []
    for text in texts:
        path, separator, scale = text.rpartition("=")
        try:
            loras.append((Path(path), float(scale)) if separator else (Path(text), 1.0))
        except ValueError:
            raise OptionError(f"--lora must be FILE or FILE=SCALE, got {text!r}") from None
    return loras


@app.command()
def plan(
    artifact: Annotated[Path, typer.Argument(help="an artifact with a TensorRT variant")],
    variant: Annotated[str | None, typer.Option(help="default: every TensorRT variant")] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="put weights into plans built with --strip-plan")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Build an artifact's TensorRT plans for the GPU of this machine; torch is not needed."""
    _build_plans(artifact, variant, refit)
    console.print(f"{artifact}: plans built; next: vitrine check {artifact}", markup=False)
    emit({"artifact": str(artifact)}, as_json)


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
    from engine.artifact import is_artifact, read_artifact
    from export.lint import lint as examine
    from export.profile import parse_profile

    profiles = [parse_profile(text) for text in profile or ()]
    graphs = {path.name: path}
    if is_artifact(path):
        files = read_artifact(path).manifest.files
        graphs = {name: path / name for name in files if name.endswith(".onnx")}
    found = [
        (name, finding)
        for name, file in graphs.items()
        for finding in examine(file, target, profiles)
    ]
    for name, finding in found:
        _print_finding(name, finding)
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


def _print_finding(graph: str, finding: "Finding") -> None:
    console.print(
        f"{finding.severity} {finding.rule}: {graph}: {finding.node}: {finding.message}; "
        f"{finding.mend}",
        style="red" if finding.severity == "error" else "yellow",
        markup=False,
    )


@app.command()
def check(
    artifact: Annotated[Path, typer.Argument(help="an artifact folder")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="where its checkpoint is, if that has moved")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="one a seed, from 0")] = 32,
    floor_psnr_db: Annotated[
        float | None, typer.Option(help="for the worst picture; default 35")
    ] = None,
    floor_ssim: Annotated[float | None, typer.Option(help="for the mean; default 0.98")] = None,
    variant: VariantName = None,
    as_json: AsJson = False,
) -> None:
    """Compare an artifact's pictures with its checkpoint's in torch; exit 1 if one falls short."""
    from export.gate import Floors
    from export.gate import check as compare

    given = {"psnr_db": floor_psnr_db, "ssim": floor_ssim}
    floors = Floors.parse(
        {key: value for key, value in given.items() if value is not None}, "floor"
    )
    with console.status(f"checking {artifact}"):
        quality = compare(artifact, checkpoint, pictures, floors, variant)
    console.print(
        f"{artifact}: PSNR at least {quality.psnr_db_min:.1f} dB (seed {quality.worst_seed}), "
        f"mean SSIM {quality.ssim_mean:.6f} over {quality.pictures} pictures; "
        f"see {artifact / quality.worst_picture}",
        markup=False,
    )
    emit({"artifact": str(artifact), **quality.model_dump()}, as_json)
