"""The state that a stopped training goes on from: one safetensors file, replaced atomically."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.errors import ArtifactError, OptionError
from engine.training.config import TrainConfig

_MAY_CHANGE = {"steps", "save_every", "sample_every"}  # without becoming another training


def save_state(
    path: Path,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    config: TrainConfig,
    step: int,
) -> None:
    """Write weights, optimizer moments, step and config; randomness needs no state of its own,
    since every step's is a function of (seed, step)."""
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            tensors[f"module/{name}/{key}"] = value.contiguous()
    for name, optimizer in optimizers.items():
        for index, moments in optimizer.state_dict()["state"].items():
            for key, value in moments.items():
                tensors[f"optimizer/{name}/{index}/{key}"] = value.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"step": str(step), "config": config.model_dump_json()})
    os.replace(partial, path)


def load_state(
    path: Path,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    config: TrainConfig,
) -> int:
    """Load what `save_state` wrote and return its step; 0 where there is none.

    Raises ArtifactError for a damaged file or another number of classes, OptionError where the
    config has changed.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        saved, step = json.loads(metadata["config"]), int(metadata["step"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ArtifactError(
            f"training state '{path}' is damaged: {error}; delete it to start again"
        ) from None
    _refuse_other_config(saved, config, path)
    for name, module in modules.items():
        try:
            module.load_state_dict(_under(tensors, f"module/{name}/"))
        except RuntimeError as error:
            raise ArtifactError(
                f"training state '{path}' does not fit: {str(error).splitlines()[-1].strip()}; "
                "restore the data folder's classes or choose another --output"
            ) from None
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _under(tensors, f"optimizer/{name}/").items():
            index, field = key.split("/")
            state.setdefault(int(index), {})[field] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    return step


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _refuse_other_config(saved: dict[str, object], config: TrainConfig, path: Path) -> None:
    wanted = json.loads(config.model_dump_json())
    saved["data"], wanted["data"] = _without_path(saved["data"]), _without_path(wanted["data"])
    changed = sorted(
        key
        for key in saved.keys() | wanted.keys()
        if saved.get(key) != wanted.get(key) and key not in _MAY_CHANGE
    )
    if changed:
        raise OptionError(
            f"'{path.parent.parent}' holds a training with another config "
            f"({', '.join(changed)} differ); choose another --output or restore the config"
        )


def _without_path(data: object) -> object:
    return {k: v for k, v in data.items() if k != "path"} if isinstance(data, dict) else data
