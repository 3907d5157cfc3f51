"""Files of an artifact taken over into another folder."""

import os
import shutil
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
