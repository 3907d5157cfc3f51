"""Prompts become the tokens of transformers, by the tokenizers library alone."""

from pathlib import Path

import pytest
import transformers
from tiny_pipelines import save_clip_tokenizer, save_t5_tokenizer
from tokenizers import Tokenizer

from engine.networks.tokenizers import load_tokenizer

PROMPTS = (
    "",
    " ",
    "a red shoe",
    "  A Red   SHOE,\twith\nlaces!  ",
    "Ünïcode: naïve café, 赤い靴, обувь, 👟👟🏽",
    "don't 1234567 $%&'()*+,-./:;<=>?@[]^_`{|}~",
    "<|startoftext|> inside <|endoftext|> and </s> <pad>",
    "a very long prompt about a shoe, " * 40,
)


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
@pytest.mark.parametrize("length", [77, 16])
@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_tokens_are_those_of_transformers(
    kind: str, length: int, prompt: str, tmp_path: Path
) -> None:
    folder = tmp_path / kind
    (save_clip_tokenizer if kind == "clip" else save_t5_tokenizer)(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(
        prompt, padding="max_length", max_length=length, truncation=True
    )
    load_tokenizer(folder, length).save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(prompt)
    assert ours.ids == theirs["input_ids"]
    assert ours.attention_mask == theirs["attention_mask"]
    assert len(ours.ids) == length
