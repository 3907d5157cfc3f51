"""JSON objects in the files of a checkpoint or artifact."""

import json
from collections.abc import Mapping
from pathlib import Path

from engine.errors import ArtifactError


def read_json(path: Path, folder: Path) -> dict[str, object]:
    """A JSON object of a checkpoint or artifact `folder`. Raises ArtifactError."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        missing = path.relative_to(folder)
        what = f"has no {missing}" if folder.is_dir() else "does not exist"
        if folder.is_file():
            what = "is a file; it must be a folder"
        raise ArtifactError(f"'{folder}' {what}") from None
    except (ValueError, OSError) as error:
        raise ArtifactError(f"'{path}' is not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise ArtifactError(f"'{path}' must hold a JSON object, got {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write an indented JSON object."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
