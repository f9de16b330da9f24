"""The text tower of the embedded checkpoint, on its own."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ovsam.checkpoints.embedded import find_checkpoint
from ovsam.modeling.clip.dual_encoder import DualEncoderConfig, DualEncoderSide


def text_config() -> dict:
    """Return the configuration of all-MiniLM-L6-v2."""
    return {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "vocab_size": 30522,
    }


def text_tower(folder: Path | None = None) -> tuple[DualEncoderSide, PreTrainedTokenizerBase]:
    """Return the frozen text tower inside the checkpoint `folder` (default: the embedded one), and its tokenizer."""
    folder = folder or find_checkpoint("ovsam-tiny")
    side = DualEncoderSide(DualEncoderConfig(text_config=text_config()), part="text").eval().requires_grad_(False)
    state = load_file(folder / "text_model.safetensors")
    state = {name.removeprefix("clip.text_model."): tensor.float() for name, tensor in state.items()}
    side.text_model.load_state_dict(state)
    return side, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def embed_texts(texts: list[str], folder: Path | None = None) -> Tensor:
    """Return embeddings [K, D], L2-normalised, by the text tower inside the checkpoint `folder` (default: the embedded
    one)."""
    side, tokenizer = text_tower(folder)
    chunks = []
    for start in tqdm(range(0, len(texts), 256), desc="words -> text tower"):
        tokens = tokenizer(texts[start : start + 256], padding=True, return_tensors="pt")
        chunks.append(side.encode_text(tokens["input_ids"], tokens["attention_mask"]))
    return torch.cat(chunks)
