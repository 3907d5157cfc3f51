"""Text encoders as the families describe them: CLIP and T5."""

from engine.errors import ArtifactError
from engine.families.parts import Parts, tensor
from engine.manifest import NetworkSpec, TensorSpec

CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
SHORTEST = 2  # tokens: the first and the last
T5_TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast")


def clip(parts: Parts, encoder: str, hidden: str, pooled: bool = False) -> NetworkSpec:
    """A CLIP text encoder with the hidden state of that name, and its pooled embedding.

    A text has as many tokens as its tokenizer says, at most as many as there are positions.
    """
    parts.require(encoder, use_attention_mask=(None, False))
    tokens = parts.whole(encoder, "max_position_embeddings")
    tokenizer = encoder.replace("text_encoder", "tokenizer")
    limit = parts.number(tokenizer, "model_max_length", tokens)
    length = int(min(tokens, limit))
    if length < SHORTEST:
        raise ArtifactError(
            f"{tokenizer}/tokenizer_config.json: model_max_length must be at least {SHORTEST}, "
            f"got {limit:g}"
        )
    outputs: list[TensorSpec] = []
    width = parts.whole(encoder, "hidden_size")
    if hidden:
        outputs.append(tensor(hidden, length, width))
    if pooled:
        outputs.append(tensor("pooled", _pooled_width(parts, encoder, width)))
    ids = tensor("input_ids", length, dtype="int64")
    return NetworkSpec(inputs=(ids,), outputs=tuple(outputs))


def _pooled_width(parts: Parts, encoder: str, hidden_size: int) -> int:
    entry = parts.index.get(encoder)
    projected = isinstance(entry, list) and entry[-1] == "CLIPTextModelWithProjection"
    return parts.whole(encoder, "projection_dim") if projected else hidden_size


def t5(parts: Parts, encoder: str, length: int, masked: bool = False) -> NetworkSpec:
    """A T5 encoder for texts of `length` tokens, told which are padding where `masked`."""
    names = ("input_ids", "attention_mask") if masked else ("input_ids",)
    hidden = tensor("last_hidden_state", length, parts.whole(encoder, "d_model"))
    return NetworkSpec(
        inputs=tuple(tensor(name, length, dtype="int64") for name in names), outputs=(hidden,)
    )


def tokenizer_files(parts: Parts) -> dict[str, str]:
    """Where an artifact has the tokenizers of a checkpoint. Raises ArtifactError for a lone one."""
    names = [name for name in parts.configs if name.startswith("tokenizer")]
    for name in names:
        if name.replace("tokenizer", "text_encoder") not in parts.configs:
            raise ArtifactError(f"model_index.json has {name} without its text encoder")
    return {name: f"tokenizers/{name}.json" for name in names}
