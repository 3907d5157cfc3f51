"""The report of an artifact: its figures as JSON, and as one page that needs nothing else."""

import base64
import json
import os
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from engine.artifact import read_artifact, write_manifest
from engine.checkpoint import file_sha256
from engine.errors import ArtifactError
from engine.manifest import Manifest
from export.figures import Conditions, Report, report_of
from export.scatter import scatter
from export.summary import significant, summary

REPORT = PAGE, FIGURES = "quality/report.html", "quality/report.json"


def write_report(folder: Path, manifest: Manifest, name: str | None = None) -> tuple[str, str]:
    """Write both files into an artifact and return their paths in it, the page's first.

    `name`: the artifact's, where its folder has another one for now. Raises ArtifactError where a
    picture that the manifest names is missing.
    """
    report = report_of(manifest, name or folder.resolve().name)
    page = render(report, _pictures(folder, report), manifest)
    (folder / "quality").mkdir(exist_ok=True)
    _replace(folder / PAGE, page)
    values = report.model_dump(mode="json")
    _replace(folder / FIGURES, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False))
    return PAGE, FIGURES


def renew_report(artifact_path: Path) -> None:
    """Write the report of an artifact anew after one of its verdicts has changed."""
    manifest = read_artifact(artifact_path).manifest
    names = write_report(artifact_path, manifest)
    files = {**manifest.files, **{name: file_sha256(artifact_path / name) for name in names}}
    write_manifest(artifact_path, manifest.model_copy(update={"files": files}))


def render(report: Report, pictures: dict[str, str], manifest: Manifest) -> str:
    """The page; `pictures` are data URIs by variant."""
    built = [each for each in report.candidates if each.runtime]
    return _template().render(
        report=report,
        model=manifest.model,
        sentences=summary(report),
        plot=scatter(report),
        pictures=pictures,
        conditions=_conditions(report),
        runtimes=sorted({(c.runtime, c.runtime_version) for c in built if c.runtime_version}),
    )


def _conditions(report: Report) -> list[tuple[Conditions, list[str]]]:
    """How candidates were timed, and which: one entry where all were timed alike."""
    timed = [each for each in report.candidates if each.conditions]
    different = list(dict.fromkeys(each.conditions for each in timed if each.conditions))
    return [
        (each, [candidate.variant for candidate in timed if candidate.conditions == each])
        for each in different
    ]


def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["significant"] = significant
    text = files("export").joinpath("report.html.jinja").read_text("utf-8")
    return environment.from_string(text)


def _pictures(folder: Path, report: Report) -> dict[str, str]:
    """The evidence of every candidate that has some, as data URIs."""
    return {
        each.variant: _data_uri(folder, each.worst_picture, each.variant)
        for each in report.candidates
        if each.worst_picture
    }


def _data_uri(folder: Path, path: str, variant: str) -> str:
    try:
        png = (folder / path).read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"artifact '{folder}': {path}, the worst pictures of {variant}, cannot be read "
            f"({error.strerror}); make them again: vitrine check {folder} --variant {variant}"
        ) from None
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _replace(path: Path, text: str) -> None:
    """Write a file anew: another artifact may share the one that is there."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text + "\n", "utf-8")
    os.replace(partial, path)
