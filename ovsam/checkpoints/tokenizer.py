"""CLIP's tokenizer from the vocabulary file of open_clip."""

from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTokenizer


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's, out of the file that open_clip carries."""
    stock = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    ids = {names.get(token, token): index for token, index in stock.encoder.items()}
    return CLIPTokenizer(vocab=ids, merges=list(stock.bpe_ranks), pad_token="!")  # which has the number 0
