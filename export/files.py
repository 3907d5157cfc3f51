"""Files of an artifact: taken over into another folder, and how large they are."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from engine.artifact import Artifact


def link_files(artifact: Artifact, folder: Path) -> None:
    """The files of an artifact in another folder, without a copy where the disk can do that."""
    for name in artifact.manifest.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(artifact.path / name, folder / name)
        except OSError:
            shutil.copyfile(artifact.path / name, folder / name)


def size_bytes(folder: Path, networks: Mapping[str, str]) -> int:
    """Of the files of some networks, with the weights that lie beside them, each once."""
    files = {
        beside
        for file in networks.values()
        for beside in (folder / file).parent.glob(f"{Path(file).stem}.*")
    }
    return sum(file.stat().st_size for file in files)
