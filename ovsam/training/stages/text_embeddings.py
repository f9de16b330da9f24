"""Words as the locked text tower sees them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ovsam.checkpoints.embedded import find_checkpoint
from ovsam.data.scenes.words import Word, all_words
from ovsam.modeling.clip.dual_encoder import DualEncoderConfig, DualEncoderSide


def text_config() -> dict:
    """The shape of all-MiniLM-L6-v2."""
    return {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "vocab_size": 30522,
    }


def text_tower(folder: Path | None = None) -> tuple[DualEncoderSide, PreTrainedTokenizerBase]:
    """The frozen text tower inside the checkpoint `folder` (default: the embedded one), and its tokenizer."""
    folder = folder or find_checkpoint("ovsam-tiny")
    side = DualEncoderSide(DualEncoderConfig(text_config=text_config()), part="text").eval().requires_grad_(False)
    state = load_file(folder / "text_model.safetensors")
    state = {name.removeprefix("clip.text_model."): tensor.float() for name, tensor in state.items()}
    side.text_model.load_state_dict(state)
    return side, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def embed_texts(texts: list[str], folder: Path | None = None) -> Tensor:
    """[K, D], L2-normalised, by the text tower inside the checkpoint `folder` (default: the embedded one)."""
    side, tokenizer = text_tower(folder)
    chunks = []
    for start in tqdm(range(0, len(texts), 256), desc="words -> text tower"):
        tokens = tokenizer(texts[start : start + 256], padding=True, return_tensors="pt")
        chunks.append(side.encode_text(tokens["input_ids"], tokens["attention_mask"]))
    return torch.cat(chunks)


@dataclass
class WordTable:
    """`names` [W, D] of all words, `keywords` [Kw, D], `has_keyword` [W, Kw] bool, `is_base` [W] bool."""

    names: Tensor
    keywords: Tensor
    has_keyword: Tensor
    is_base: Tensor


def word_table(
    words: Sequence[Word] | None = None,
    encode: Callable[[list[str]], Tensor] = embed_texts,
    max_words_per_keyword: int = 40,
) -> WordTable:
    """Names and keywords of a data set's words (default: EmojiScenes'), embedded by `encode`: texts -> [K, D].

    A keyword that says little (it fits too many words) is left out, and so is one that only novel words have: nothing
    of those may reach training.
    """
    words = all_words() if words is None else words
    names = {word.name for word in words}
    counts: dict[str, int] = {}
    for word in words:
        if word.split == "base":
            for keyword in word.keywords:
                counts[keyword] = counts.get(keyword, 0) + 1
    keywords = sorted(k for k, count in counts.items() if count <= max_words_per_keyword and k not in names)
    position = {keyword: i for i, keyword in enumerate(keywords)}
    has_keyword = torch.zeros(len(words), len(keywords), dtype=torch.bool)
    for row, word in enumerate(words):
        for keyword in word.keywords:
            if keyword in position:
                has_keyword[row, position[keyword]] = True
    embeddings = encode([word.name for word in words] + keywords)
    is_base = torch.tensor([word.split == "base" for word in words])
    return WordTable(embeddings[: len(words)], embeddings[len(words) :], has_keyword, is_base)
