"""`vitrine export` and `vitrine plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine.artifact import is_artifact, read_artifact
from engine.console import AsJson, console, emit, progress
from engine.errors import OptionError, QualityError, RuntimeUnavailableError
from engine.manifest import Goal, Precision
from export import check_commands
from export.check_commands import floor_options
from export.terminal import print_finding, print_variants, say_selected

if TYPE_CHECKING:
    from export.variant import PlanBuild

app = typer.Typer()
app.add_typer(check_commands.app)

_PLAN = "TensorRT plans"
_AUTO = "The best variant"


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a folder in the diffusers layout")],
    output: Annotated[Path, typer.Option(help="the artifact to write, or to add a variant to")],
    runtime: Annotated[
        Literal["onnxruntime", "openvino", "tensorrt"] | None,
        typer.Option(help="what shall run it; default: onnxruntime"),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="of weights and arithmetic; int8, fp8: of the denoiser; default: fp32"),
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="int8 weights, float arithmetic: smaller files")
    ] = False,
    calibration_rows: Annotated[
        int, typer.Option(help="network evaluations that int8 and fp8 ranges are measured on")
    ] = 384,
    height: Annotated[
        int | None, typer.Option(help="with --width: a build for this picture size only")
    ] = None,
    width: Annotated[int | None, typer.Option(help="see --height")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE.safetensors[=SCALE] to fuse; may be repeated")
    ] = None,
    auto: Annotated[
        bool,
        typer.Option("--auto", help="build every variant, keep the best", rich_help_panel=_AUTO),
    ] = False,
    goal: Annotated[
        Goal | None,
        typer.Option("--for", help="default: throughput", rich_help_panel=_AUTO),
    ] = None,
    floor_psnr_db: Annotated[
        float | None, typer.Option(help="for the worst picture; default 35", rich_help_panel=_AUTO)
    ] = None,
    floor_ssim: Annotated[
        float | None, typer.Option(help="for the mean; default 0.98", rich_help_panel=_AUTO)
    ] = None,
    pictures: Annotated[
        int | None, typer.Option(help="to judge each by; default 64", rich_help_panel=_AUTO)
    ] = None,
    search_minutes: Annotated[
        float | None, typer.Option(help="for int8 layers; default 10", rich_help_panel=_AUTO)
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
    """Turn a checkpoint into an artifact that runs without torch: one variant, or the best."""
    from export.build import export as build
    from export.variant import PlanBuild, VariantOptions

    chosen: dict[str, object] = {
        "--runtime": runtime,
        "--precision": precision,
        "--weights-only": weights_only,
    }
    asked: dict[str, object] = {
        "--for": goal, "--floor-psnr-db": floor_psnr_db, "--floor-ssim": floor_ssim,
        "--pictures": pictures, "--search-minutes": search_minutes,
    }  # fmt: skip
    _refuse_mixed(auto, chosen, asked)
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
    if auto and plan != PlanBuild():
        raise OptionError(
            "--auto builds TensorRT's graphs and no plans; leave the options of plans out, and "
            "export the TensorRT variant with them: --runtime tensorrt"
        )
    if auto:
        values: dict[str, object] = {
            "goal": goal, "pictures": pictures, "search_minutes": search_minutes,
            "floors": floor_options(floor_psnr_db, floor_ssim), "height": height, "width": width,
            "calibration": {"rows": calibration_rows},
        }  # fmt: skip
        given = {name: value for name, value in values.items() if value is not None}
        _export_best(checkpoint, output, given, _loras(lora or ()), as_json)
        return
    options = VariantOptions.parse(
        {
            "runtime": runtime or "onnxruntime", "precision": precision or "fp32",
            "weights_only": weights_only,
            "calibration": {"rows": calibration_rows}, "height": height, "width": width,
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
        print_finding(network, finding)
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


def _refuse_mixed(auto: bool, chosen: dict[str, object], asked: dict[str, object]) -> None:
    """Options that --auto decides itself, or that only it has. Raises OptionError."""
    given = chosen if auto else asked
    wrong = [name for name, value in given.items() if value is not None and value is not False]
    if wrong and auto:
        raise OptionError(f"--auto tries every runtime and precision; leave {wrong[0]} out")
    if wrong:
        raise OptionError(f"{wrong[0]} is for --auto; add --auto, or leave it out")


def _export_best(
    checkpoint: Path,
    output: Path,
    values: dict[str, object],
    loras: list[tuple[Path, float]],
    as_json: bool,
) -> None:
    """Build, judge and time every variant; a table of all of them, and what was chosen."""
    from export.auto import auto as build_all
    from export.candidates import AutoOptions

    options = AutoOptions.parse(values)
    try:
        with progress(f"exporting {checkpoint}") as report_progress:
            made = build_all(checkpoint, output, options, loras, report_progress)
    except KeyboardInterrupt:
        console.print(f"{output}: stopped; the same command goes on where it was", markup=False)
        raise
    except QualityError:
        if is_artifact(output):
            print_variants(read_artifact(output).manifest)
        raise
    say_selected(made.manifest, output, as_json)


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
