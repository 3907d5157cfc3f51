"""What the families read of a checkpoint: its JSON files, and the specs that follow from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from pydantic import JsonValue

from engine.errors import ArtifactError
from engine.manifest import Dtype, TensorSpec

Config = Mapping[str, object]


@dataclass(frozen=True)
class Parts:
    """The JSON files of a checkpoint, by component (`unet`, `vae`, `tokenizer` ...)."""

    index: Config  # model_index.json
    configs: Mapping[str, Config]  # config.json, or tokenizer_config.json of a tokenizer
    scheduler: dict[str, object]
    labels: tuple[str, ...]

    def stored_scheduler(self) -> dict[str, JsonValue]:
        """The scheduler's config for a manifest: JSON has no infinity, which is a default there."""
        return {
            key: cast("JsonValue", value)
            for key, value in self.scheduler.items()
            if not (isinstance(value, float) and math.isinf(value))
        }

    def whole(self, component: str, key: str) -> int:
        """A whole number of a config. Raises ArtifactError."""
        value = self.configs[component].get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ArtifactError(f"{component}/config.json: {key} must be a number, got {value!r}")
        return value

    def number(self, component: str, key: str, default: float) -> float:
        """A number of a config, `default` where it is missing or null. Raises ArtifactError."""
        value = self.configs[component].get(key)
        if value is None:
            return default
        if not isinstance(value, int | float):
            raise ArtifactError(f"{component}/config.json: {key} must be a number, got {value!r}")
        return float(value)

    def length(self, component: str, key: str) -> int:
        """The length of a list in a config. Raises ArtifactError."""
        value = self.configs[component].get(key)
        if not isinstance(value, list) or not value:
            raise ArtifactError(f"{component}/config.json: {key} must be a list, got {value!r}")
        return len(value)

    def size(self, component: str) -> tuple[int, int]:
        """Height and width in `sample_size`. Raises ArtifactError."""
        match self.configs[component].get("sample_size"):
            case int(size):
                return size, size
            case [int(height), int(width)]:
                return height, width
            case other:
                raise ArtifactError(f"{component}/config.json must name sample_size, got {other!r}")

    def require(self, component: str, **allowed: tuple[object, ...]) -> None:
        """Refuse values that our networks would not honour. Raises ArtifactError."""
        for key, values in allowed.items():
            value = self.configs[component].get(key)
            if value not in values:
                choices = " or ".join(map(repr, values))
                raise ArtifactError(
                    f"{component}/config.json: {key} must be {choices}, got {value!r}"
                )


def tensor(name: str, *shape: int | str, dtype: Dtype = "float32") -> TensorSpec:
    """The spec of a batched tensor: `shape` is what follows the batch axis."""
    return TensorSpec(name=name, dtype=dtype, shape=("batch", *shape))


def scaled(factor: int, axis: str) -> str:
    """`8*height`; the bare name where the factor is 1."""
    return axis if factor == 1 else f"{factor}*{axis}"
