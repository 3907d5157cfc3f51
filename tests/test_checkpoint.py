"""Checkpoints: what is found in one, and one clear error for each that cannot be exported."""

import shutil
from pathlib import Path

import pytest
from damage import Damage, contents, delete_from, set_in
from safetensors.torch import load_file, save_file

from engine.checkpoint import read_checkpoint
from engine.errors import ArtifactError, OptionError
from engine.pipeline import open_pipeline
from export.build import export

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def pickle_instead(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "unet/diffusion_pytorch_model.bin")


def reshape_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["conv_in.weight"] = weights["conv_in.weight"][:, :, :2].contiguous()
    save_file(weights, folder / WEIGHTS)


def drop_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["conv_in.bias"]
    save_file(weights, folder / WEIGHTS)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
    "no config": (lambda f: (f / "unet/config.json").unlink(), "has no unet/config.json"),
    "no scheduler": (
        lambda f: (f / "scheduler/scheduler_config.json").unlink(),
        "has no scheduler/scheduler_config.json",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"has no weights \(\*.safetensors\) in unet$"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), "must hold a JSON"),
    "index is cut": (lambda f: (f / "model_index.json").write_text('{"un'), "not readable JSON"),
    "pickle": (pickle_instead, "diffusion_pytorch_model.bin' is a pickle, which can run code"),
    "truncated": (truncate, "unet' does not load"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "unet' does not load"),
    "other shape": (
        reshape_a_tensor,
        r"conv_in.weight expected shape .*1, 3, 3\]\), but got .*1, 2, 3\]\)\.?$",
    ),
    "tensor missing": (drop_a_tensor, "1 missing weights, the first is conv_in.bias$"),
    "other class": (
        set_in("model_index.json", unet=["diffusers", "UNet3DModel"]),
        "unet of class UNet3DModel, which is not known; known for unet: UNet2DModel$",
    ),
    "other pipeline": (
        set_in("model_index.json", _class_name="UnCLIPPipeline"),
        "is a UnCLIPPipeline, which is not known; known are GanPipeline, DDPMPipeline, DDIMPip",
    ),
    "half an entry": (
        set_in("model_index.json", unet=["diffusers"]),
        "model_index.json names no unet$",
    ),
    "two networks": (
        set_in("model_index.json", generator=["engine", "Generator"]),
        "generator of class Generator, which a DDIMPipeline has no use for here; known are unet$",
    ),
    "too few labels": (
        set_in("labels.json", labels=["bag"]),
        "num_class_embeds 4, but labels.json names 1 labels; it must have as many, or one more",
    ),
    "labels without classes": (
        set_in("unet/config.json", num_class_embeds=None),
        "checkpoint': unet/config.json has num_class_embeds None, but labels.json names 3 labels",
    ),
    "classes by time": (
        set_in("unet/config.json", class_embed_type="timestep"),
        "unet/config.json: class_embed_type must be None, got 'timestep'$",
    ),
    "labels are numbers": (set_in("labels.json", labels=[1, 2, 3]), "a list of class names"),
    "no channels": (
        delete_from("unet/config.json", "in_channels"),
        "checkpoint': unet/config.json: in_channels must be a number, got None$",
    ),
    "four channels": (
        set_in("unet/config.json", in_channels=4),
        "unet/config.json': channels must be one of 1, 3, got 4",
    ),
    "channels are text": (
        set_in("unet/config.json", in_channels="x"),
        "unet/config.json: in_channels must be a number, got 'x'$",
    ),
    "no size": (
        set_in("unet/config.json", sample_size=None),
        "unet/config.json must name sample_size, got None$",
    ),
    "no groups": (set_in("unet/config.json", norm_num_groups=0), "unet' does not load"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_clear_error_and_the_old_artifact_stays(
    damage: str, checkpoint: Path, artifact: Path
) -> None:
    apply, message = DAMAGES[damage]
    apply(checkpoint)
    before = contents(artifact.parent)
    with pytest.raises(ArtifactError, match=message) as raised:
        export(checkpoint, artifact)
    assert len(str(raised.value).splitlines()) == 1
    assert contents(artifact.parent) == before
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]


@pytest.mark.parametrize("damage", ["truncated", "other class"])
def test_a_damaged_checkpoint_leaves_no_new_folder(
    damage: str, checkpoint: Path, tmp_path: Path
) -> None:
    DAMAGES[damage][0](checkpoint)
    with pytest.raises(ArtifactError):
        export(checkpoint, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_scheduler_option_that_is_not_honoured_is_refused(checkpoint: Path) -> None:
    set_in("scheduler/scheduler_config.json", trained_betas=[0.1])(checkpoint)
    with pytest.raises(OptionError, match=r"trained_betas must be null, got \[0.1\]"):
        read_checkpoint(checkpoint)


def test_classes_that_nobody_named_are_numbers(
    checkpoint: Path, diffusion_checkpoint: Path
) -> None:
    (checkpoint / "labels.json").unlink()
    found, named = read_checkpoint(checkpoint), read_checkpoint(diffusion_checkpoint)
    assert found.model.labels == ("0", "1", "2", "3")
    assert (found.model.guidance, named.model.guidance) == ("none", "classifier_free")
    assert found.model.networks == named.model.networks
    assert set(named.files) - set(found.files) == {"labels.json"}


def test_a_model_without_class_embeddings_takes_no_label(checkpoint: Path) -> None:
    (checkpoint / "labels.json").unlink()
    set_in("unet/config.json", num_class_embeds=None)(checkpoint)
    model = read_checkpoint(checkpoint).model
    assert (model.labels, model.subject, model.guidance) == ((), "none", "none")
    assert model.networks["unet"].input_names == ("sample", "timestep")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("labels.json", {"labels": ["bag"]}, "num_class_embeds 3, but labels.json names 1"),
        ("labels.json", {"labels": list("abcd")}, "num_class_embeds 3, but labels.json names 4"),
        ("generator/config.json", {"out_channels": 2}, "channels must be one of 1, 3, got 2"),
        (
            "generator/config.json",
            {"block_out_channels": 5},
            "gan': generator/config.json: block_out_channels must be a list, got 5$",
        ),
        ("generator/config.json", {"block_out_channels": [8]}, "generator' does not load"),
    ],
)
def test_a_gan_checkpoint_that_does_not_fit_itself_is_one_clear_error(
    gan_checkpoint: Path, tmp_path: Path, file: str, values: dict[str, object], message: str
) -> None:
    folder = Path(shutil.copytree(gan_checkpoint, tmp_path / "gan"))
    set_in(file, **values)(folder)
    with pytest.raises(ArtifactError, match=message):
        open_pipeline(folder)


def test_a_gan_has_names_for_its_classes(gan_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gan_checkpoint, tmp_path / "gan"))
    (folder / "labels.json").unlink()
    with pytest.raises(ArtifactError, match=r"gan': .* its class names in labels.json; there is n"):
        read_checkpoint(folder)
