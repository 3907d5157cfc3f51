"""Checkpoints that are damaged or foreign, a full disk, a kill: one error, and nothing is lost."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import save, save_clip_tokenizer

import export.build
import export.onnx
import vitrine
from engine.artifact import new_artifact, read_artifact
from engine.checkpoint import read_checkpoint
from engine.errors import ArtifactError, VitrineError
from engine.networks.load import load_network
from engine.pipeline import checkpoint_tokenizers

Damage = Callable[[Path], object]

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
WEIGHTS = (UNET, VAE, TEXT)
CONFIGS = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion checkpoint; read only."""
    return save("stable-diffusion", tmp_path_factory.mktemp("pipelines"))


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


@pytest.fixture
def artifact(gan_artifact: Path, tmp_path: Path) -> Path:
    """An artifact that stands where the next one is written, alone in its folder."""
    return Path(shutil.copytree(gan_artifact, tmp_path / "artifacts" / "shop"))


@pytest.fixture
def other_gan(gan_checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint of `artifact` with one weight changed: it must be exported anew."""
    folder = Path(shutil.copytree(gan_checkpoint, tmp_path / "other"))
    (file,) = folder.glob("generator/*.safetensors")
    weights = load_file(file)
    next(iter(weights.values())).flatten()[0] += 0.5
    save_file(weights, file, {"format": "pt"})
    return folder


@pytest.fixture
def no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks before the damaged one need not be traced to reach it."""
    monkeypatch.setattr(export.onnx, "export_network", lambda _, path, sizes=None: None)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def edit(file: str, change: Callable[[dict], object]) -> Damage:
    def apply(folder: Path) -> None:
        values = json.loads((folder / file).read_text("utf-8"))
        change(values)
        (folder / file).write_text(json.dumps(values), "utf-8")

    return apply


def set_in(file: str, **values: object) -> Damage:
    return edit(file, lambda found: found.update(values))


def delete_from(file: str, key: str) -> Damage:
    return edit(file, lambda found: found.pop(key))


def reweigh(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def apply(folder: Path) -> None:
        weights = load_file(folder / file)
        change(weights)
        save_file(weights, folder / file, {"format": "pt"})

    return apply


def rewrite(file: str, content: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / file).write_bytes(content((folder / file).read_bytes()))


def remove(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def rename(file: str, to: str) -> Damage:
    return lambda folder: (folder / file).rename(folder / to)


def in_old_layout_without(file: str) -> Damage:
    """The tokenizer as vocab.json and merges.txt, less one of them."""

    def apply(folder: Path) -> None:
        shutil.rmtree(folder / "tokenizer")
        save_clip_tokenizer(folder / "tokenizer")
        (folder / "tokenizer" / file).unlink()

    return apply


def in_shards_without_one(folder: Path) -> None:
    in_shards(folder)
    next(iter(sorted(folder.glob("unet/*-00002-of-*.safetensors")))).unlink()


def in_shards(folder: Path, variant: str | None = None) -> None:
    """All networks of a checkpoint, saved anew by diffusers in shards of 50 kB."""
    import diffusers

    dtype = torch.float16 if variant else torch.float32
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    for name in ("unet", "vae", "text_encoder"):
        for file in folder.glob(f"{name}/*.safetensors"):
            file.unlink()
    pipeline.save_pretrained(folder, max_shard_size="50KB", variant=variant)


def first_weight(file: str) -> str:
    return {
        UNET: "conv_norm_out.weight",
        VAE: "decoder.conv_norm_out.weight",
        TEXT: "encoder.layers.0.layer_norm1.weight",
    }[file]


def shorten(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: weights.update({name: weights[name][:2].contiguous()})


# What is done to a checkpoint, and the words that the message must have
DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {}
for _file in CONFIGS:
    DAMAGES |= {
        f"{_file} missing": (remove(_file), (f"has no {_file}",)),
        f"{_file} empty": (rewrite(_file, lambda _: b""), (_file, "is not readable JSON")),
        f"{_file} cut": (rewrite(_file, lambda old: old[:40]), (_file, "is not readable JSON")),
        f"{_file} not UTF-8": (
            rewrite(_file, lambda old: old.replace(b'"', b'"\xff', 1)),
            (_file, "is not readable JSON", "0xff"),
        ),
        f"{_file} a list": (
            rewrite(_file, lambda _: b"[]"),
            (_file, "must hold a JSON object, got list"),
        ),
    }
for _file in WEIGHTS:
    _folder, _name = _file.split("/")[0], first_weight(_file)
    DAMAGES |= {
        f"{_file} missing": (remove(_file), (f"has no weights (*.safetensors) in {_folder}",)),
        f"{_file} a pickle": (
            rename(_file, _file.replace(".safetensors", ".bin")),
            (".bin' is a pickle, which can run code and is refused", "safe_serialization=True"),
        ),
        f"{_file} empty": (rewrite(_file, lambda _: b""), (f"{_folder}", "does not load")),
        f"{_file} cut in its header": (
            rewrite(_file, lambda old: old[:100]),
            (_folder, "does not load"),
        ),
        f"{_file} cut at its end": (
            rewrite(_file, lambda old: old[:-1]),
            (_folder, "does not load"),
        ),
        f"{_file} noise": (
            rewrite(_file, lambda old: b"\xff" * len(old)),
            (_folder, "does not load"),
        ),
        f"{_file} with a weight of another shape": (
            reweigh(_file, shorten(_name)),
            (_folder, "does not load", _name, "[2]"),
        ),
        f"{_file} without a weight": (
            reweigh(_file, lambda weights, name=_name: weights.pop(name)),
            (_folder, f"does not load: 1 missing weights, the first is {_name}"),
        ),
        f"{_file} with one too many": (
            reweigh(_file, lambda weights: weights.update({"colour.bias": torch.ones(3)})),
            (_folder, "does not load: 1 unexpected weights, the first is colour.bias"),
        ),
    }
for _name in ("unet", "vae", "text_encoder", "tokenizer"):
    DAMAGES |= {
        f"{_name} gone": (
            lambda folder, name=_name: shutil.rmtree(folder / name),
            (f"has no {_name}/",),
        ),
        f"{_name} not in the index": (
            delete_from("model_index.json", _name),
            (f"model_index.json names no {_name}",),
        ),
        f"{_name} null in the index": (
            set_in("model_index.json", **{_name: [None, None]}),
            (f"model_index.json names no {_name}",),
        ),
        f"{_name} of a class that is not known": (
            set_in("model_index.json", **{_name: ["diffusers", "Sculptor"]}),
            (f"has {_name} of class Sculptor, which is not known; known for {_name}: ",),
        ),
    }
DAMAGES |= {
    "no tokenizer.json": (
        remove("tokenizer/tokenizer.json"),
        ("tokenizer' has no vocabulary", "tokenizer.json, or vocab.json and merges.txt"),
    ),
    "no vocab.json": (in_old_layout_without("vocab.json"), ("tokenizer' has no vocabulary",)),
    "no merges.txt": (in_old_layout_without("merges.txt"), ("tokenizer' has no vocabulary",)),
    "tokenizer.json cut": (
        rewrite("tokenizer/tokenizer.json", lambda old: old[:-10]),
        ("tokenizer' does not load as a tokenizer",),
    ),
    "a shard missing": (
        in_shards_without_one,
        (
            "has no diffusion_pytorch_model-00002-of-",
            "which diffusion_pytorch_model.safetensors.index.json names",
        ),
    ),
    "pipeline not known": (
        set_in("model_index.json", _class_name="KandinskyPipeline"),
        ("is a KandinskyPipeline, which is not known; known are", "StableDiffusionPipeline"),
    ),
    "pipeline a list": (
        set_in("model_index.json", _class_name=["StableDiffusionPipeline"]),
        ("is a ['StableDiffusionPipeline'], which is not known",),
    ),
    "a component that is not used": (
        set_in("model_index.json", controlnet=["diffusers", "ControlNetModel"]),
        (
            "has controlnet of class ControlNetModel, which a StableDiffusionPipeline has no use",
            "known are unet, vae, text_encoder, tokenizer",
        ),
    ),
    "no scheduler": (
        delete_from("model_index.json", "scheduler"),
        ("scheduler", "_class_name must be one of DDIMScheduler", "got None"),
    ),
    "scheduler not known": (
        set_in("model_index.json", scheduler=["diffusers", "KarrasVeScheduler"]),
        ("_class_name must be one of DDIMScheduler", "got 'KarrasVeScheduler'"),
    ),
    "another latent space": (
        set_in("vae/config.json", latent_channels=8),
        ("the unet takes 4 channels, but the VAE has 8 for latents",),
    ),
    "more positions than weights": (
        set_in("text_encoder/config.json", max_position_embeddings=16),
        ("text_encoder' does not load", "position_embedding.weight of shape [77, 32]", "[16, 32]"),
    ),
}
_KEYS: tuple[tuple[str, dict[str, object], str], ...] = (
    ("unet", {"encoder_hid_dim_type": "text_proj"}, "must be None, got 'text_proj'"),
    ("unet", {"class_embed_type": "timestep"}, "must be None, got 'timestep'"),
    ("unet", {"num_class_embeds": 3}, "must be None, got 3"),
    ("unet", {"addition_embed_type": "text"}, "must be None, got 'text'"),
    ("unet", {"in_channels": 5}, "must be 4 or 9, got 5"),
    ("unet", {"sample_size": None}, "got None"),
    ("unet", {"block_out_channels": 8}, "must be a list, got 8"),
    ("unet", {"out_channels": "four"}, "must be a number, got 'four'"),
    ("unet", {"quantization_config": {"quant_method": "x"}}, "must be None, got {'quant_method'"),
    ("vae", {"latents_mean": [0.0] * 4}, "must be None, got [0.0"),
    ("vae", {"latents_std": [1.0] * 4}, "must be None, got [1.0"),
    ("vae", {"in_channels": 4}, "must be 3, got 4"),
    ("vae", {"scaling_factor": 0}, "must not be 0"),
    ("vae", {"shift_factor": "a bit"}, "must be a number, got 'a bit'"),
    ("text_encoder", {"use_attention_mask": True}, "must be None or False, got True"),
    ("text_encoder", {"hidden_size": None}, "must be a number, got None"),
)
for _name, _values, _words in _KEYS:
    (_key,) = _values
    DAMAGES[f"{_name} {_key} {next(iter(_values.values()))}"] = (
        set_in(f"{_name}/config.json", **_values),
        (f"{_name}/config.json", _key, _words),
    )
_OPTIONS: tuple[tuple[str, object, str], ...] = (
    ("trained_betas", [0.1], "must be null, got [0.1]"),
    ("prediction_type", "noise", "must be one of epsilon, v_prediction, sample"),
    ("beta_schedule", "round", "must be one of linear, scaled_linear, squaredcos_cap_v2"),
    ("thresholding", True, "must be False or None, got True"),
    ("num_train_timesteps", 0, "must be at least 1, got 0"),
    ("colour", 1, "is not a key that Vitrine knows; remove it"),
)
for _key, _value, _words in _OPTIONS:
    DAMAGES[f"scheduler {_key}"] = (
        set_in("scheduler/scheduler_config.json", **{_key: _value}),
        ("scheduler_config.json", _key, _words),
    )


@pytest.mark.usefixtures("no_tracing")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_checkpoint_is_one_clear_error_and_the_old_artifact_stays(
    damage: str, checkpoint: Path, artifact: Path
) -> None:
    apply, words = DAMAGES[damage]
    apply(checkpoint)
    before = contents(artifact.parent)
    with pytest.raises(VitrineError) as raised:
        export.build.export(checkpoint, artifact)
    message = str(raised.value)
    assert [word for word in words if word not in message] == [], message
    assert len(message.splitlines()) == 1
    assert raised.value.exit_code == 2
    assert contents(artifact.parent) == before
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]
    read_artifact(artifact)


@pytest.mark.usefixtures("no_tracing")
@pytest.mark.parametrize("damage", [f"{UNET} cut at its end", "pipeline not known"])
def test_a_bad_checkpoint_leaves_no_new_folder(
    damage: str, checkpoint: Path, tmp_path: Path
) -> None:
    DAMAGES[damage][0](checkpoint)
    with pytest.raises(ArtifactError):
        export.build.export(checkpoint, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


# Checkpoints in other layouts, which are good


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    model = read_checkpoint(folder).model
    return {
        f"{name}.{key}": value
        for name, spec in model.networks.items()
        for key, value in load_network(folder, name, spec).state_dict().items()
    }


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_checkpoint_in_shards_gives_the_same_networks(
    whole: Path, checkpoint: Path, variant: str | None
) -> None:
    in_shards(checkpoint, variant)
    shards = [file for file in read_checkpoint(checkpoint).files if "-of-0000" in file]
    assert {file.split("/")[0] for file in shards} == {"unet", "vae", "text_encoder"}
    expected, found = weights_of(whole), weights_of(checkpoint)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        stored = weight.half().float() if variant and weight.is_floating_point() else weight
        assert torch.equal(found[name], stored), name


def test_a_checkpoint_with_fp16_files_only_gives_the_same_networks(
    whole: Path, checkpoint: Path
) -> None:
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(whole, torch_dtype=torch.float16)
    for file in WEIGHTS:
        (checkpoint / file).unlink()
    pipeline.save_pretrained(checkpoint, variant="fp16")
    files = read_checkpoint(checkpoint).files
    assert [file for file in files if file.endswith(".safetensors")] == [
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    found = weights_of(checkpoint)
    for name, weight in weights_of(whole).items():
        stored = weight.half().float() if weight.is_floating_point() else weight
        assert torch.equal(found[name], stored), name


def test_a_tokenizer_in_the_old_layout_gives_the_same_tokens(whole: Path, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "tokenizer")
    save_clip_tokenizer(checkpoint / "tokenizer")
    expected, found = (
        checkpoint_tokenizers(folder, read_checkpoint(folder).model)["tokenizer"]
        for folder in (whole, checkpoint)
    )
    for text in ("a red shoe", "", "Größe 43, ÄÖ"):
        assert found.encode(text).ids == expected.encode(text).ids


def test_the_schedulers_class_is_the_indexs_as_for_diffusers(checkpoint: Path) -> None:
    set_in("model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])(checkpoint)
    model = read_checkpoint(checkpoint).model
    assert model.defaults is not None
    assert model.defaults.sampler == "euler"


# Exporting again


def stats(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in (folder, *folder.rglob("*"))
    }


def test_an_unchanged_checkpoint_is_no_work_and_the_command_says_so(
    gan_checkpoint: Path, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stats(artifact.parent)
    made = export.build.export(gan_checkpoint, artifact)
    assert made.unchanged
    command = ["export", str(gan_checkpoint), "--output", str(artifact), "--json"]
    vitrine.app(command, standalone_mode=False)
    assert stats(artifact.parent) == before
    said = capsys.readouterr()
    assert "onnxruntime-fp32 is up to date, nothing to do" in said.err
    assert json.loads(said.out)["unchanged"] is True


def test_a_checkpoint_that_moved_is_still_unchanged(
    gan_checkpoint: Path, artifact: Path, tmp_path: Path
) -> None:
    elsewhere = Path(shutil.copytree(gan_checkpoint, tmp_path / "elsewhere"))
    assert export.build.export(elsewhere, artifact).unchanged


def test_one_changed_weight_is_exported_anew(other_gan: Path, artifact: Path) -> None:
    old = read_artifact(artifact).manifest
    made = export.build.export(other_gan, artifact)
    new = read_artifact(artifact).manifest
    assert not made.unchanged
    assert new.source.sha256 != old.source.sha256
    assert new.files != old.files
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_artifact_is_made_anew(damage: str, gan_checkpoint: Path, artifact: Path) -> None:
    before = contents(artifact)
    (graph,) = artifact.rglob("*.onnx")
    graph.write_bytes(graph.read_bytes()[:-1]) if damage == "cut" else graph.unlink()
    assert not export.build.export(gan_checkpoint, artifact).unchanged
    assert contents(artifact).keys() == before.keys()
    assert read_artifact(artifact).manifest.model == read_checkpoint(gan_checkpoint).model


# A full disk and a kill


def test_a_full_disk_is_one_clear_error_and_the_old_artifact_stays(
    other_gan: Path, artifact: Path
) -> None:
    (graph,) = artifact.rglob("*.onnx")
    limit = graph.stat().st_size // 2
    before = contents(artifact.parent)
    done = subprocess.run(
        [sys.executable, "-m", "vitrine", "export", str(other_gan), "--output", str(artifact)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error" in line]) == 1
    assert contents(artifact.parent) == before
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]
    read_artifact(artifact)


KILLED_WITH_ITS_GRAPHS_WRITTEN = """
import os, signal, sys
from pathlib import Path
from export.build import export

def progress(text):
    if text.startswith("linting"):
        os.kill(os.getpid(), signal.SIGKILL)

export(Path(sys.argv[1]), Path(sys.argv[2]), progress=progress)
"""
KILLED_BETWEEN_THE_RENAMES = """
import os, signal, sys
from pathlib import Path
from engine.artifact import new_artifact

def replace(source, target, rename=os.replace):
    rename(source, target)
    os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace
with new_artifact(Path(sys.argv[1])) as folder:
    (folder / "manifest.json").write_text("{}")
"""


def run_killed(code: str, *arguments: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_kill_in_the_middle_leaves_the_old_artifact_and_the_next_export_cleans_up(
    other_gan: Path, artifact: Path
) -> None:
    before = contents(artifact)
    run_killed(KILLED_WITH_ITS_GRAPHS_WRITTEN, other_gan, artifact)
    (left,) = (path for path in artifact.parent.iterdir() if path != artifact)
    assert list(left.rglob("*.onnx"))
    assert contents(artifact) == before
    read_artifact(artifact)
    assert not export.build.export(other_gan, artifact).unchanged
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]


def test_a_kill_between_the_renames_loses_nothing(gan_checkpoint: Path, artifact: Path) -> None:
    before = contents(artifact)
    run_killed(KILLED_BETWEEN_THE_RENAMES, artifact)
    assert not artifact.exists()
    assert export.build.export(gan_checkpoint, artifact).unchanged
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]
    assert contents(artifact) == before


def test_the_folder_of_a_running_export_is_left_alone(gan_checkpoint: Path, artifact: Path) -> None:
    with new_artifact(artifact) as running:
        (running / "half.onnx").write_bytes(b"half")
        assert export.build.export(gan_checkpoint, artifact).unchanged
        assert (running / "half.onnx").exists()
        shutil.copytree(artifact, running, dirs_exist_ok=True)
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]
