"""What runs a model: its networks on their backends, and its tokenizers."""

from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.backends.spec import Backend
from engine.manifest import ModelSpec
from engine.row import Feed
from engine.scheduler_config import SchedulerConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = NDArray[np.float32]
CACHED_TEXTS = 64  # encodings kept; the empty negative prompt is nearly always one of them


class Components:
    """The networks and tokenizers of one model; no state of any request."""

    def __init__(
        self,
        model: ModelSpec,
        networks: Mapping[str, Backend],
        tokenizers: "Mapping[str, Tokenizer]",
    ) -> None:
        self.model = model
        self._networks = networks
        self._tokenizers = tokenizers
        self.encode_text: Callable[[str, str], dict[str, Array]] = lru_cache(CACHED_TEXTS)(
            self._encode_text
        )

    @cached_property
    def scheduler(self) -> SchedulerConfig:
        """The checkpoint's noise schedule. Raises OptionError for a model without one, a GAN."""
        return SchedulerConfig.parse(self.model.scheduler or {})

    def run(self, network: str, feed: Feed) -> tuple[Array, ...]:
        """One call; the outputs in the order of the network's spec, float32."""
        backend = self._networks[network]
        outputs = backend.run(feed)
        return tuple(outputs[spec.name].astype(np.float32, copy=False) for spec in backend.outputs)

    def run_one(self, network: str, feed: Feed) -> tuple[Array, ...]:
        """`run` for one row without a batch axis; the outputs are copies."""
        outputs = self.run(network, {name: value[None] for name, value in feed.items()})
        return tuple(output[0].copy() for output in outputs)

    def _encode_text(self, encoder: str, text: str) -> dict[str, Array]:
        """The outputs of a text encoder by name, and `attention_mask` [S] where it takes one."""
        tokens = self._tokenizers[encoder.replace("text_encoder", "tokenizer")].encode(text)
        spec = self.model.networks[encoder]
        feed: Feed = {"input_ids": np.array(tokens.ids, np.int64)}
        if "attention_mask" in spec.input_names:
            feed["attention_mask"] = np.array(tokens.attention_mask, np.int64)
        encoded = {
            tensor.name: output
            for tensor, output in zip(spec.outputs, self.run_one(encoder, feed), strict=True)
        }
        if "attention_mask" in feed:
            encoded["attention_mask"] = feed["attention_mask"].astype(np.float32)
        return encoded

    def close(self) -> None:
        """Close every backend."""
        for backend in self._networks.values():
            backend.close()
