"""Artifacts: where one may be written, and why one is not read."""

from pathlib import Path

import pytest
from damage import Damage, contents, delete_from, edit, flip_a_bit, set_in, truncate_file

from engine.artifact import new_artifact, read_artifact
from engine.errors import ArtifactError, OptionError
from engine.pipeline import open_pipeline
from export.build import export

VARIANT = "onnxruntime-fp32"
UNET = "graphs/fp32/unet.onnx"


# Where an artifact may be written


def test_an_output_that_is_no_artifact_is_refused_and_kept(
    diffusion_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "dog.png").write_bytes(b"a dog")
    for output in (folder, folder / "dog.png"):
        with pytest.raises(ArtifactError, match=r"exists and is not an artifact; choose another"):
            export(diffusion_checkpoint, output)
    assert contents(tmp_path) == {"photos/dog.png": b"a dog"}


def test_an_empty_folder_may_become_an_artifact(tmp_path: Path) -> None:
    with new_artifact(tmp_path / "empty") as folder:
        (folder / "file").write_text("whole")
    (tmp_path / "other").mkdir()
    with new_artifact(tmp_path / "other") as folder:
        (folder / "file").write_text("whole")
    assert contents(tmp_path) == {"empty/file": b"whole", "other/file": b"whole"}


def stop_half_way(artifact: Path, error: type[BaseException]) -> None:
    with new_artifact(artifact) as folder:
        (folder / "half.onnx").write_bytes(b"half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_stop_in_the_middle_leaves_the_old_artifact(
    artifact: Path, error: type[BaseException]
) -> None:
    before = contents(artifact.parent)
    with pytest.raises(error):
        stop_half_way(artifact, error)
    assert contents(artifact.parent) == before
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]
    read_artifact(artifact)


# Artifacts that cannot be read


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: truncate_file(f / UNET), f"{UNET} does not match"),
        (lambda f: flip_a_bit(f / UNET), f"{UNET} does not match its manifest .sha256"),
        (lambda f: (f / UNET).unlink(), f"lacks {UNET}"),
    ],
    ids=["truncated", "bit flipped", "missing"],
)
def test_a_damaged_artifact_names_the_file_and_the_command_that_mends_it(
    artifact: Path, diffusion_checkpoint: Path, damage: Damage, message: str
) -> None:
    damage(artifact)
    with pytest.raises(ArtifactError, match=message) as raised:
        open_pipeline(artifact)
    mend = f"export it again: vitrine export {diffusion_checkpoint} --output {artifact}"
    assert str(raised.value).endswith(mend)


def other_path(path: str) -> Damage:
    def apply(values: dict) -> None:
        values["variants"][VARIANT]["networks"]["unet"] = path
        values["files"] = {path: "0" * 64}

    return lambda folder: edit(folder / "manifest.json", apply)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").write_text('{"name": "shop"}'), "has format None, this"),
        (set_in("manifest.json", format=1), "has format 1, this version reads 2; export it again"),
        (set_in("manifest.json", colour="red"), "manifest.json: unknown key 'colour'.*export it"),
        (delete_from("manifest.json", "model"), "manifest.json: model is required; export it"),
        (
            set_in("manifest.json", selected="int8"),
            "selects int8, which is not one.*; export it",
        ),
        (set_in("manifest.json", files={}), f"names {UNET}, not in files; export it again"),
        (other_path("../unet.onnx"), "may not leave the artifact, got '../unet.onnx'; export it"),
        (other_path("/etc/passwd"), "may not leave the artifact, got '/etc/passwd'; export it"),
        (other_path("a/../../b"), "may not leave the artifact"),
        (other_path("..\\b"), "may not leave the artifact"),
        (other_path(""), "may not leave the artifact"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    artifact: Path, damage: Damage, message: str
) -> None:
    damage(artifact)
    with pytest.raises(ArtifactError, match=message) as raised:
        read_artifact(artifact)
    assert str(artifact) in str(raised.value)


def test_a_manifest_that_is_cut_off_is_not_readable_json(artifact: Path) -> None:
    path = artifact / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"manifest.json' is not readable JSON"):
        read_artifact(artifact)


def test_a_folder_that_is_neither_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"neither an artifact \(manifest.json\) nor a check"):
        open_pipeline(tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        read_artifact(tmp_path / "nothing")


def test_a_checkpoint_has_no_variants(diffusion_checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="a checkpoint has no variants, got 'fp8'"):
        open_pipeline(diffusion_checkpoint, "fp8")
