"""The TensorRT plans of an artifact, built on the machine whose GPU shall run them."""

from collections.abc import Callable
from pathlib import Path

from engine.artifact import Artifact, hash_files, new_artifact, read_artifact, write_manifest
from engine.console import Progress
from engine.errors import OptionError
from engine.manifest import Variant
from export.files import link_files, size_bytes
from export.plan import build_plan, installed, refit_plan
from export.variant import PlanBuild


def build_plans(
    artifact_path: Path,
    variant: str | None = None,
    refit: bool = False,
    progress: Progress = lambda _: None,
) -> Artifact:
    """Build the plans of every TensorRT variant of an artifact, or of the one that is named.

    `refit` builds nothing: it puts the graphs' weights into the plans that are there. Raises
    RuntimeUnavailableError without TensorRT or a GPU, ArtifactError with TensorRT's reason,
    OptionError where there is no such variant; the artifact then stays as it was.
    """
    artifact = read_artifact(artifact_path)
    wanted = {
        name: entry
        for name, entry in artifact.manifest.variants.items()
        if entry.runtime == "tensorrt" and variant in (None, name)
    }
    if not wanted:
        raise OptionError(
            f"artifact '{artifact_path}' has no TensorRT variant {variant or ''}(it has "
            f"{', '.join(artifact.manifest.variants)}); export one from its checkpoint: "
            f"vitrine export {artifact.manifest.source.path} --output {artifact_path} "
            "--runtime tensorrt"
        )
    installed()
    with new_artifact(artifact_path) as folder:
        link_files(artifact, folder)
        make = _refit if refit else _build
        built = {
            name: make(artifact, name, entry, folder, progress) for name, entry in wanted.items()
        }
        update = {
            "variants": {**artifact.manifest.variants, **built},
            "files": hash_files(folder),
        }
        write_manifest(folder, artifact.manifest.model_copy(update=update))
    return read_artifact(artifact_path)


def _build(
    artifact: Artifact, name: str, entry: Variant, folder: Path, progress: Progress
) -> Variant:
    """The plans of one variant, in the order of its graphs."""
    build = PlanBuild.parse(entry.build or {}, f"{name}.build")
    plans = {network: f"{name}/{network}.plan" for network in entry.graphs}
    targets = []
    for network, graph in entry.graphs.items():
        plan = folder / plans[network]
        plan.unlink(missing_ok=True)  # it may be a link to the plan that is there now
        plan.parent.mkdir(parents=True, exist_ok=True)
        targets.append(
            build_plan(
                artifact.path / graph,
                plan,
                build.profiles(artifact.manifest.model, network, entry.size),
                build.options,
                _reporter(progress, f"{name}: {network}"),
            )
        )
    update = {
        "networks": plans, "target": targets[0], "runtime_version": targets[0].tensorrt_version,
        "size_bytes": size_bytes(folder, plans),
        "quality": None, "speed": None, "accepted": None, "reason": "",
    }  # fmt: skip
    return entry.model_copy(update=update)


def _refit(
    artifact: Artifact, name: str, entry: Variant, folder: Path, progress: Progress
) -> Variant:
    """The plans of one variant with their graphs' weights. Raises OptionError without plans."""
    if entry.target is None:
        raise OptionError(f"{name} has no plans to refit; build them: vitrine plan {artifact.path}")
    for network, plan in entry.networks.items():
        progress(f"{name}: {network}")
        (folder / plan).unlink()  # a link to the plan that is there now
        refit_plan(artifact.path / plan, artifact.path / entry.graphs[network], folder / plan)
    return entry.model_copy(
        update={"target": entry.target.model_copy(update={"has_weights": True})}
    )


def _reporter(progress: Progress, what: str) -> Callable[[str, int, int], None]:
    return lambda phase, done, steps: progress(f"{what}: {phase} {done}/{steps}")
