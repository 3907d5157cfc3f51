"""`vitrine export` and `vitrine check`."""

from pathlib import Path
from typing import Annotated

import typer

from engine.console import AsJson, console, emit

app = typer.Typer()


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a folder in the diffusers layout")],
    output: Annotated[Path, typer.Option(help="the artifact to write")],
    as_json: AsJson = False,
) -> None:
    """Turn a checkpoint into an artifact that runs without torch."""
    from export.build import export as build

    with console.status(f"exporting {checkpoint}"):
        artifact = build(checkpoint, output)
    console.print(
        f"{output}: {', '.join(artifact.manifest.variants)}; next: vitrine check {output}"
    )
    emit({"artifact": str(output), "variants": list(artifact.manifest.variants)}, as_json)


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
    variant: Annotated[str | None, typer.Option(help="default: the selected one")] = None,
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
        f"see {artifact / quality.worst_picture}"
    )
    emit({"artifact": str(artifact), **quality.model_dump()}, as_json)
