"""What commands of this folder show people: findings, variants, what moved."""

from pathlib import Path
from typing import TYPE_CHECKING

from engine.console import console, emit
from engine.manifest import Manifest, Variant

if TYPE_CHECKING:
    from export.baseline import Regression
    from export.finding import Finding


def print_variants(manifest: Manifest) -> None:
    """Pictures, speed, size and verdict of each, the accepted and fast ones first."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("variant", no_wrap=True)
    for column in ("PSNR dB", "SSIM", "ms", "images/s", "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, variant in sorted(manifest.variants.items(), key=_order):
        table.add_row(name, *_figures(variant), _verdict(name, variant, manifest))
    for name, reason in (manifest.selection.not_built if manifest.selection else {}).items():
        table.add_row(name, *["-"] * 5, f"not built: {reason}")
    console.print(table)


def _order(entry: tuple[str, Variant]) -> tuple[bool, float]:
    _, variant = entry
    return not variant.accepted, -(variant.speed.images_per_s if variant.speed else 0.0)


def _figures(variant: Variant) -> list[str]:
    quality, speed = variant.quality, variant.speed
    return [
        f"{quality.psnr_db_min:.1f}" if quality else "-",
        f"{quality.ssim_mean:.4f}" if quality else "-",
        f"{speed.latency_ms:.0f}" if speed else "-",
        f"{speed.images_per_s:.2f}" if speed else "-",
        f"{variant.size_bytes / 2**20:.1f}" if variant.size_bytes else "-",
    ]


def _verdict(name: str, variant: Variant, manifest: Manifest) -> str:
    if name == manifest.selected:
        return "selected" if variant.accepted else f"kept: {variant.reason}"
    if manifest.selection and name in manifest.selection.within_noise:
        return "as fast as the selected one"
    if variant.accepted is None:
        return "not checked"
    where = (
        " (on the CPU; plans not built)" if variant.quality and variant.quality.simulated else ""
    )
    return ("accepted" if variant.accepted else f"refused: {variant.reason}") + where


def print_finding(graph: str, finding: "Finding") -> None:
    """One line, red where the target cannot run the node."""
    console.print(
        f"{finding.severity} {finding.rule}: {graph}: {finding.node}: {finding.message}; "
        f"{finding.mend}",
        style="red" if finding.severity == "error" else "yellow",
        markup=False,
    )


def print_regression(regression: "Regression") -> None:
    """Every picture that moved; nothing where none did."""
    if not regression.moved:
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for column in ("variant or operation", "seed", "", "baseline", "now"):
        table.add_column(column, no_wrap=True)
    for moved in regression.moved:
        table.add_row(moved.what, str(moved.seed), moved.figure, moved.before, moved.now)
    console.print(table)


def say_selected(manifest: Manifest, artifact: Path, as_json: bool) -> None:
    """A table of all variants, and the one that was chosen."""
    print_variants(manifest)
    report = artifact / "quality" / "report.html"
    console.print(f"{artifact}: {manifest.selected} selected; see {report}", markup=False)
    emit(
        {
            "artifact": str(artifact),
            "selected": manifest.selected,
            "within_noise": list(manifest.selection.within_noise) if manifest.selection else [],
            "report": str(artifact / "quality" / "report.json"),
        },
        as_json,
    )
