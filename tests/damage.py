"""What tests do to the files of a checkpoint or an artifact, and how they look at them."""

import json
from collections.abc import Callable
from pathlib import Path

from engine.manifest import Manifest

Damage = Callable[[Path], object]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def edit(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text("utf-8"))
    change(values)
    path.write_text(json.dumps(values), "utf-8")


def set_in(file: str, **values: object) -> Damage:
    return lambda folder: edit(folder / file, lambda found: found.update(values))


def delete_from(file: str, key: str) -> Damage:
    return lambda folder: edit(folder / file, lambda found: found.pop(key))


def truncate_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def read_manifest(artifact: Path) -> Manifest:
    return Manifest.parse(json.loads((artifact / "manifest.json").read_text("utf-8")))
