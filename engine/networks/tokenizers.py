"""A checkpoint's tokenizers as files of the `tokenizers` library, padding and cutting included."""

from pathlib import Path

import transformers
from tokenizers import Tokenizer

from engine.errors import ArtifactError


def load_tokenizer(folder: Path, max_length: int) -> Tokenizer:
    """What transformers makes of a tokenizer's folder, padded and cut to `max_length` tokens.

    Raises ArtifactError where a file is missing or damaged.
    """
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"'{folder}' does not load as a tokenizer: {error}") from None
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(
        length=max_length, pad_id=loaded.pad_token_id, pad_token=loaded.pad_token
    )
    return tokenizer
