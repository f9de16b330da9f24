"""Text embeddings of vocabularies, computed once: the last ones are kept in memory, long ones on disk."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from ovsam.checkpoints.embedded import CACHE
from ovsam.modeling.modeling_ovsam import OVSamModel
from ovsam.processing.processing_ovsam import OVSamProcessor
from ovsam.processing.vocabulary import Vocabulary

KEPT_PHRASES = 100_000  # in memory, of the vocabularies used last
LONG = 256  # phrases; longer vocabularies are kept on disk
PHRASES_AT_ONCE = 64  # between two calls of a progress function


class TextEmbedder:
    """The text tower of a model with its tokenizer, and the embeddings that were computed last. Safe for threads."""

    def __init__(self, model: OVSamModel, processor: OVSamProcessor):
        self.model, self.processor = model, processor
        self.kept: OrderedDict[tuple, Tensor] = OrderedDict()
        self._fingerprint = ""
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget embeddings of a model that was moved or changed."""
        self.kept.clear()
        self._fingerprint = ""

    @torch.no_grad()
    def embed(
        self, vocabulary: Vocabulary, progress: Callable[[int, int], None] | None = None
    ) -> tuple[Vocabulary, Tensor]:
        """The vocabulary and its text embeddings [K, D], on the device of the model; `progress` as in
        `Vocabulary.embed`."""
        # Weights that were changed in place have another version.
        weights = sum(0 if one.is_inference() else one._version for one in self.model.clip.parameters())
        templates = tuple(vocabulary.templates or self.model.config.templates)
        tower = id(self.model.clip), weights, self.model.device, self.model.dtype
        key = (tuple(vocabulary.prompts), templates, *tower)
        with self._lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return vocabulary, self.kept[key]
        long = len(vocabulary.prompts) > LONG
        embeds = vocabulary.embed(
            self.encode,
            templates=tuple(self.model.config.templates),
            text_hash=self.fingerprint() if long else "",
            cache_dir=CACHE if long else None,
            progress=progress or True,
            chunk_size=PHRASES_AT_ONCE if progress else LONG,
        )
        embeds = embeds.to(self.model.device)
        with self._lock:
            self.kept[key] = embeds
            while len(self.kept) > 1 and sum(map(len, self.kept.values())) > KEPT_PHRASES:
                self.kept.popitem(last=False)
        return vocabulary, embeds

    def encode(self, phrases: list[str]) -> Tensor:
        """Phrases -> [K, D], L2-normalised."""
        tokens = {name: ids.to(self.model.device) for name, ids in self.processor.tokenize(phrases).items()}
        return self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"])

    def fingerprint(self) -> str:
        """Hash of the text tower: that of its embeddings of a few fixed words."""
        if not self._fingerprint:
            probe = self.encode(["dog", "a red ball", "zzyzx"]).float().cpu()
            self._fingerprint = hashlib.sha256((probe * 1e4).round().numpy().tobytes()).hexdigest()[:16]
        return self._fingerprint
