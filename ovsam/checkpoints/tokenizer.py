"""CLIP's tokenizer from the vocabulary file of open_clip."""

from transformers import CLIPTokenizer


def clip_tokenizer() -> CLIPTokenizer:
    """Return the tokenizer of CLIP, from the vocabulary file of open_clip."""
    from open_clip.tokenizer import SimpleTokenizer

    stock = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    ids = {names.get(token, token): index for token, index in stock.encoder.items()}
    return CLIPTokenizer(vocab=ids, merges=list(stock.bpe_ranks), pad_token="!")  # token 0
