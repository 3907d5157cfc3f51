"""`vitrine demo`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from engine.console import AsJson, console, emit

app = typer.Typer()


@app.command()
def demo(
    checkpoints: Annotated[Path, typer.Option(help="folder of checkpoints")] = Path("checkpoints"),
    output: Annotated[Path, typer.Option(help="artifacts, gallery and report")] = Path("runs/demo"),
    as_json: AsJson = False,
) -> None:
    """Export, check and serve the shipped checkpoints; compare each served picture."""
    from benchmarks.demo import run_demo

    report = run_demo(checkpoints, output)
    _print_table(report)
    console.print(f"{output}/gallery.png, {output}/report.json; {report['seconds']} s in all")
    emit(report, as_json)


def _print_table(report: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("model", no_wrap=True)
    for column in ("PSNR dB", "SSIM", "same", "rows/tick", "p50 ms", "p95 ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, served in report["served"].items():
        parity = report["parity"][name]
        table.add_row(
            name,
            f"{parity['psnr_db_min']:.1f}",
            f"{parity['ssim_mean']:.4f}",
            f"{served['byte_identical']}/{served['requests']}",
            f"{served['rows_per_tick']:.1f}",
            f"{served['p50_ms']:.0f}",
            f"{served['p95_ms']:.0f}",
        )
    console.print(table)
