"""Artifacts: the folder between export and serving - read, verified, and written atomically."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint import file_sha256
from engine.errors import ArtifactError, OptionError, QualityError, RuntimeUnavailableError
from engine.json_files import read_json, write_json
from engine.manifest import FORMAT, Manifest, Variant

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """A verified artifact folder."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """The folder's name; also the name of its model in Triton."""
        return self.path.resolve().name

    def variant(self, name: str | None = None) -> Variant:
        """The named variant, by default the selected one.

        Raises OptionError, and QualityError where the selected one fell short of a check.
        """
        variants = self.manifest.variants
        if name is not None and name not in variants:
            raise OptionError(f"variant must be one of {', '.join(variants)}, got {name!r}")
        label = name or self.manifest.selected
        chosen = variants[label]
        if not chosen.networks:
            raise RuntimeUnavailableError(
                f"{label} of artifact '{self.path}' has no plans yet; on the machine with the GPU "
                f"that shall run it: vitrine plan {self.path}"
            )
        if name is None and chosen.accepted is False:
            raise QualityError(
                f"artifact '{self.path}' was refused: {chosen.reason} "
                f"({label}); check it against another floor, or name another "
                "variant"
            )
        return chosen


def is_artifact(folder: Path) -> bool:
    """Whether there is a manifest; says nothing about its being whole."""
    return (folder / MANIFEST).is_file()


def read_artifact(folder: Path) -> Artifact:
    """Read the manifest and verify the SHA-256 of every file.

    Raises ArtifactError that names the file and the command that mends it.
    """
    if not is_artifact(folder) and (folder / "model_index.json").is_file():
        raise ArtifactError(
            f"'{folder}' is a checkpoint, not an artifact; export it first: "
            f"vitrine export {folder} --output artifacts/{folder.name}"
        )
    values = read_json(folder / MANIFEST, folder)
    if values.get("format") != FORMAT:
        raise ArtifactError(
            f"artifact '{folder}' has format {values.get('format')!r}, this version reads "
            f"{FORMAT}; export it again"
        )
    try:
        manifest = Manifest.parse(values, f"artifact '{folder}': {MANIFEST}")
    except OptionError as error:
        raise ArtifactError(f"{error}; export it again") from None
    if manifest.selected not in manifest.variants:
        raise ArtifactError(
            f"artifact '{folder}': {MANIFEST} selects {manifest.selected}, which is not one of its "
            f"variants ({', '.join(manifest.variants)}); export it again"
        )
    verify_files(folder, manifest)
    return Artifact(folder, manifest)


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest. Raises ArtifactError."""
    mend = f"export it again: vitrine export {manifest.source.path} --output {folder}"
    if len(manifest.variants) > 1:
        mend += f", which makes one of its {len(manifest.variants)} variants, or all with --auto"
    for name, expected in manifest.files.items():
        try:
            found = file_sha256(folder / name)
        except OSError:
            raise ArtifactError(f"artifact '{folder}' lacks {name}; {mend}") from None
        if found != expected:
            raise ArtifactError(
                f"artifact '{folder}': {name} does not match its manifest "
                f"(sha256 {found[:8]}..., expected {expected[:8]}...); {mend}"
            )
    for label, variant in manifest.variants.items():
        for network in (*variant.networks.values(), *variant.graphs.values()):
            if network not in manifest.files:
                raise ArtifactError(
                    f"artifact '{folder}': {label} names {network}, not in files; {mend}"
                )
        if (variant.networks or variant.graphs).keys() != manifest.model.networks.keys():
            wanted = ", ".join(manifest.model.networks)
            raise ArtifactError(f"artifact '{folder}': {label} must name {wanted}; {mend}")


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder but the manifest, by relative path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in paths
        if path.name != MANIFEST
    }


@contextmanager
def new_artifact(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an error.

    An older artifact there is replaced; anything else is refused. Raises ArtifactError.
    """
    recover(folder)
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not empty and not is_artifact(folder):
        raise ArtifactError(f"'{folder}' exists and is not an artifact; choose another --output")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-{os.getpid()}-"))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def recover(folder: Path) -> None:
    """Remove what killed processes left beside `folder`, or put back what they had moved away."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}-*"):
        pid, _, rest = left.name.removeprefix(f".{folder.name}-").partition("-")
        moved = pid.endswith(".old")
        pid = pid.removesuffix(".old")
        if not pid.isdigit() or _is_running(int(pid)) or not (rest or moved):
            continue
        if moved and not folder.exists():
            os.replace(left, folder)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def replace_folder(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`; what was there is removed, or put back if that fails."""
    old = folder.with_name(f".{folder.name}-{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(partial, folder)
    except BaseException:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write or replace `manifest.json` atomically."""
    partial = folder / f".{MANIFEST}.partial"
    write_json(partial, manifest.model_dump(mode="json"))
    os.replace(partial, folder / MANIFEST)
