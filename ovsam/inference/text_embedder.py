"""Text embeddings of vocabularies, computed once: the last ones are kept in memory, long ones on disk."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ovsam.checkpoints.embedded import CACHE
from ovsam.ops.arrays import Array
from ovsam.processing.vocabulary import Vocabulary

KEPT_PHRASES = 100_000  # in memory, of the vocabularies used last
LONG = 256  # phrases; longer vocabularies are kept on disk
PHRASES_AT_ONCE = 16  # between two calls of a progress function


class TextTower(Protocol):
    """What a text tower is for a TextEmbedder; `ovsam.inference.questions.Questions` describes it."""

    settings: Any

    def encode_words(self, phrases: list[str]) -> np.ndarray: ...
    def text_weights(self) -> tuple: ...
    def to_own(self, embeds: np.ndarray) -> Array: ...


class TextEmbedder:
    """A text tower, and the embeddings that it computed last. Safe for threads."""

    def __init__(self, tower: TextTower):
        self.tower = tower
        self.kept: OrderedDict[tuple, Array] = OrderedDict()
        self._fingerprint = ""
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget embeddings of a model that was moved or changed."""
        self.kept.clear()
        self._fingerprint = ""

    def embed(
        self, vocabulary: Vocabulary, progress: Callable[[int, int], None] | None = None
    ) -> tuple[Vocabulary, Array]:
        """The vocabulary and its text embeddings [K, D], as the model takes them; `progress` as in
        `Vocabulary.embed`."""
        templates = tuple(vocabulary.templates or self.tower.settings.templates)
        key = (tuple(vocabulary.prompts), templates, *self.tower.text_weights())
        with self._lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return vocabulary, self.kept[key]
        long = len(vocabulary.prompts) > LONG
        embeds = vocabulary.embed_array(
            self.tower.encode_words,
            templates=tuple(self.tower.settings.templates),
            text_hash=self.fingerprint() if long else "",
            cache_dir=CACHE if long else None,
            progress=progress or True,
            chunk_size=PHRASES_AT_ONCE if progress else LONG,
        )
        embeds = self.tower.to_own(embeds)
        with self._lock:
            self.kept[key] = embeds
            while len(self.kept) > 1 and sum(map(len, self.kept.values())) > KEPT_PHRASES:
                self.kept.popitem(last=False)
        return vocabulary, embeds

    def fingerprint(self) -> str:
        """Hash of the text tower: that of its embeddings of a few fixed words."""
        if not self._fingerprint:
            probe = self.tower.encode_words(["dog", "a red ball", "zzyzx"])
            self._fingerprint = hashlib.sha256((probe * 1e4).round().tobytes()).hexdigest()[:16]
        return self._fingerprint
