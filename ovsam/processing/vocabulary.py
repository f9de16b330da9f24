"""Vocabulary: a list of class names, and their text embeddings."""

import contextlib
import csv
import difflib
import hashlib
import json
import logging
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ovsam.errors import InputError
from ovsam.processing.arguments import plain, short, whole

if TYPE_CHECKING:  # torch is imported where it is used, so that class names can be checked before it is loaded
    import torch

logger = logging.getLogger(__name__)


class Vocabulary:
    """Class names, with one or more prompts (phrases) for each.

    Args:
        words: one of
            - a list of class names;
            - a mapping of prompts to labels, `{"puppy": "dog", "dog": "dog"}`: the prompts of one label are synonyms;
            - the path of a .txt file (one class name per line, lines that start with # are comments), a .json file (a
              list or a mapping as above) or a .csv file (one column of class names, or the header `prompt,label`);
            - the name of a built-in vocabulary: "coco" (80 class names), "lvis" (1,203), "imagenet21k" (21,841).
        templates: sentences of this vocabulary, such as `("a photo of a {}",)`; they replace those that `embed` is
            called with.

    Attributes:
        prompts: input of the text tower, K unique strings.
        labels: the class names, unique, in the order of their first prompt.
        prompt_label_ids: index of the label of each prompt.

    Raises:
        InputError: there are no class names, one is empty, a prompt has two labels, or a file is missing or unreadable.
    """

    def __init__(
        self,
        words: Sequence[str] | Mapping[str, str] | str | os.PathLike,
        templates: Sequence[str] | None = None,
    ):
        labels: dict[str, str] = {}
        empty = 0
        for prompt, label in _read_words(words):
            for text in (prompt, label):
                if not isinstance(text, str):
                    raise InputError(f"A vocabulary must hold class names as strings, not {short(text)}.")
                check_letters(text)
            prompt, label = prompt.strip(), label.strip()
            if not prompt or not label:
                empty += 1
                continue
            if labels.setdefault(prompt, label) != label:
                raise InputError(
                    f"The prompt {prompt!r} has two labels, {labels[prompt]!r} and {label!r}; keep one of them."
                )
        if not labels:
            raise InputError("The vocabulary is empty; it needs at least one class name.")
        if empty:
            logger.warning("%d empty class names were removed from the vocabulary.", empty)
        self.prompts = list(labels)
        self.labels = list(dict.fromkeys(labels.values()))
        label_ids = {label: index for index, label in enumerate(self.labels)}
        self.prompt_label_ids = [label_ids[label] for label in labels.values()]
        self.templates = None if templates is None else _check_templates(templates)

    def embed(
        self,
        encode: "Callable[[list[str]], torch.Tensor]",
        templates: Sequence[str] = ("{}",),
        text_hash: str = "",
        cache_dir: str | os.PathLike | None = None,
        progress: bool | Callable[[int, int], None] = True,
        chunk_size: int = 256,
    ) -> "torch.Tensor":
        """Return the text embeddings of the prompts, from the cache if they have been computed before.

        The embeddings of the sentences of a prompt are normalised, averaged and normalised again (ViLD, Gu et al.,
        2022).

        Args:
            encode: function from n sentences to their embeddings [n, D].
            templates: sentences of the checkpoint, each with one `{}` for the class name.
            text_hash: fingerprint of the text tower and its weights; required for the cache.
            cache_dir: folder of the cache; None for no cache.
            progress: whether to show a progress bar if there is more than one chunk; or a function that is called with
                the number of prompts that are done and of all, before the first chunk and after each, and may raise to
                stop.
            chunk_size: number of sentences that are encoded at a time.

        Returns:
            [K, D] in float32 on the CPU, L2-normalised.
        """
        import torch

        def as_array(sentences: list[str]) -> np.ndarray:
            with torch.no_grad():
                return encode(sentences).float().cpu().numpy()

        return torch.from_numpy(self.embed_array(as_array, templates, text_hash, cache_dir, progress, chunk_size))

    def embed_array(
        self,
        encode: Callable[[list[str]], np.ndarray],
        templates: Sequence[str] = ("{}",),
        text_hash: str = "",
        cache_dir: str | os.PathLike | None = None,
        progress: bool | Callable[[int, int], None] = True,
        chunk_size: int = 256,
    ) -> np.ndarray:
        """`embed` for a text tower that gives arrays; needs no torch."""
        templates = self.templates or _check_templates(templates)
        if not callable(encode):
            raise InputError(
                f"The argument encode is {short(encode)}; it must be a function from sentences to embeddings."
            )
        chunk_size = whole("chunk_size", chunk_size, 1)
        if cache_dir is None:
            return self._compute(encode, templates, progress, chunk_size)
        if not text_hash:
            raise ValueError("The cache needs text_hash, so that embeddings of two text towers are not confused.")
        metadata = {
            "format": "ovsam-vocabulary",
            "prompts": json.dumps([as_read(prompt) for prompt in self.prompts]),
            "templates": json.dumps(templates),
            "text_hash": text_hash,
        }
        key = hashlib.sha256(json.dumps(metadata).encode()).hexdigest()[:20]
        path = Path(cache_dir) / f"{key}.safetensors"
        embeds = _load_cached(path, metadata, len(self.prompts))
        if embeds is None:
            embeds = self._compute(encode, templates, progress, chunk_size)
            _save_cached(path, metadata, embeds)
        return embeds

    def _compute(
        self, encode, templates: Sequence[str], progress: bool | Callable[[int, int], None], chunk_size: int
    ) -> np.ndarray:
        from tqdm.auto import tqdm

        quick = len(self.prompts) * len(templates) <= 4 * chunk_size
        chunks = []
        if callable(progress):
            progress(0, len(self.prompts))
        with tqdm(total=len(self.prompts), unit=" words", disable=quick or progress is not True) as bar:
            for start in range(0, len(self.prompts), chunk_size):
                prompts = [as_read(prompt) for prompt in self.prompts[start : start + chunk_size]]
                each = [_unit(encode([t.replace("{}", p) for p in prompts])) for t in templates]
                chunks.append(_unit(np.sum(each, 0)))
                bar.update(len(prompts))
                if callable(progress):
                    progress(start + len(prompts), len(self.prompts))
        return np.concatenate(chunks)

    def as_mapping(self) -> dict[str, str]:
        """Return {prompt: label}, which post-processing takes as `text_labels`."""
        return {prompt: self.labels[i] for prompt, i in zip(self.prompts, self.prompt_label_ids, strict=True)}


def check_text_length(phrases: Sequence[str], lengths: Sequence[int], max_length: int) -> None:
    """Raise InputError for phrases that are too long for the text tower.

    Args:
        phrases: phrases of the user.
        lengths: length of each phrase in tokens, including special tokens, before truncation.
        max_length: length limit of the tower in tokens.

    Raises:
        InputError: a phrase is too long; the message names the first one.
    """
    for phrase, length in zip(phrases, lengths, strict=True):
        if length > max_length:
            shown = phrase if len(phrase) <= 60 else phrase[:57] + "..."
            raise InputError(
                f"The phrase {shown!r} is too long: {length} tokens; this model takes at most {max_length}."
            )


def check_letters(text: str) -> None:
    """Refuse what no tokenizer reads: halves of surrogate pairs and zero bytes."""
    if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in text):
        raise InputError(f"The word {text!a} holds a character that is not text; remove it.")


def as_read(phrase: str) -> str:
    """A phrase as a text tower reads it: "DOG  FACE." is "dog face", whatever a user typed, who gets that back."""
    return " ".join(phrase.split()).strip(".,;:!? ").lower() or phrase


def split_words(text: str) -> list[str]:
    """The words of one text, as people write them: "car, dog", a word a line, "car . dog" or, as for Grounding DINO,
    "car. dog." with a full stop at the end. Quotes keep what is between them: '"salt, pepper", dog'."""
    stops = r"[,\n]|\s\.\s|\s\.$|\.\s+|\.$" if text.rstrip().endswith(".") else r"[,\n]|\s\.\s"
    quoted: list[str] = []

    def keep(match: re.Match) -> str:
        quoted.append(match[1])
        return f"\0{len(quoted) - 1}\0"

    bare = re.sub(r'"([^"]*)"', keep, text.replace("\0", " "))
    words = [re.sub("\0(\\d+)\0", lambda match: quoted[int(match[1])], word).strip() for word in re.split(stops, bare)]
    return [word for word in words if word]


def to_vocabulary(words: "Vocabulary | Sequence[str] | Mapping[str, str] | str | os.PathLike") -> Vocabulary:
    """A vocabulary of text queries. A string is split by `split_words`, unless it is the name of a built-in
    vocabulary or ends like a vocabulary file."""
    if isinstance(words, Vocabulary):
        return words
    if isinstance(words, str) and words not in BUILT_IN and Path(words[-9:]).suffix.lower() not in _PARSERS:
        words = split_words(words)
    return Vocabulary(words)


def _check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    if isinstance(templates, str):
        templates = (templates,)
    templates = plain(templates)
    if not isinstance(templates, Iterable):
        raise InputError(f"The templates are {short(templates)}; they must be a list of sentences around {{}}.")
    templates = tuple(templates)
    for template in templates:
        if not isinstance(template, str):
            raise InputError(f"The templates hold {short(template)}; each must be a sentence around {{}}.")
        if template.count("{}") != 1:
            raise InputError(f"The template {template!r} must have exactly one {{}}, which stands for the class name.")
    if not templates:
        raise InputError('A vocabulary needs at least one template; "{}" is the class name alone.')
    return tuple(templates)


def _read_words(words) -> list[tuple[str, str]]:
    """Return (prompt, label) pairs from any input of `Vocabulary`, not yet checked."""
    if isinstance(words, Vocabulary):
        return list(words.as_mapping().items())
    if isinstance(words, Mapping):
        return list(words.items())
    if isinstance(words, str) and words in BUILT_IN:
        words = BUILT_IN[words]()
    elif isinstance(words, str | os.PathLike):
        return _read_file(words)
    words = plain(words)
    if not isinstance(words, Iterable) or isinstance(words, bytes):
        raise InputError(
            "A vocabulary is a list of class names, a mapping of prompts to labels, a file or one of "
            f"{', '.join(BUILT_IN)}; got {short(words)}."
        )
    return [(word, word) for word in words]


def _read_file(name: str | os.PathLike) -> list[tuple[str, str]]:
    path = Path(name)
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None or not os.path.isfile(path):
        close = difflib.get_close_matches(str(name), BUILT_IN, n=1)
        meant = f"did you mean {close[0]!r}? Give" if close else "give"
        raise InputError(
            f"There is no vocabulary {short(str(name))}: {meant} the name of a built-in one ({', '.join(BUILT_IN)}), "
            "the path of a .txt, .json or .csv file, or a list of class names."
        )
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise InputError(f"The vocabulary file {str(path)!r} cannot be read: it is nested too deeply.") from error
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"The vocabulary file {str(path)!r} cannot be read: {error}") from error


def _parse_txt(text: str) -> list[tuple[str, str]]:
    return [(line, line) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _parse_json(text: str) -> list[tuple[str, str]]:
    words = json.loads(text)
    if not isinstance(words, list | dict):
        raise ValueError("it must hold a list of class names or a mapping of prompts to labels.")
    return _read_words(words)


def _parse_csv(text: str) -> list[tuple[str, str]]:
    rows = [row for row in csv.reader(text.splitlines()) if row]
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if header in (["prompt"], ["prompt", "label"]):
        rows = rows[1:]
    elif len(header) > 1:
        raise ValueError("with more than one column its first line must be 'prompt,label'.")
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"the row {','.join(row)!r} has {len(row)} columns instead of {len(header)}.")
    return [(row[0], row[-1]) for row in rows]


def _bundled(name: str) -> list[str]:
    path = Path(__file__).parent / "vocabularies" / f"{name}.txt"
    return [word for word, _ in _parse_txt(path.read_text(encoding="utf-8"))]


def _imagenet21k() -> list[str]:
    """The 21,841 classes of ImageNet-21k (fall 2011) by WordNet lemmas, from the list in timm.

    Classes may share lemmas. The name of a class is its first lemma; if other classes begin with the same one, the
    first lemma that no other class has ("loft" -> "pigeon loft"); else the first lemma and a number: "hen", "hen (2)".
    """
    from timm.data import ImageNetInfo

    classes = [lemmas.split(", ") for lemmas in ImageNetInfo("imagenet22k").label_descriptions()]
    first_uses = Counter(lemmas[0] for lemmas in classes)
    uses = Counter(lemma for lemmas in classes for lemma in set(lemmas))
    numbers: Counter[str] = Counter()
    names = []
    for lemmas in classes:
        name = lemmas[0]
        if first_uses[name] > 1:
            own = next((lemma for lemma in lemmas if uses[lemma] == 1), None)
            numbers[name] += own is None
            name = own or (name if numbers[name] == 1 else f"{name} ({numbers[name]})")
        names.append(name)
    return names


_PARSERS = {".txt": _parse_txt, ".json": _parse_json, ".csv": _parse_csv}
BUILT_IN = {"coco": lambda: _bundled("coco"), "lvis": lambda: _bundled("lvis"), "imagenet21k": _imagenet21k}


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows [n, D] of length 1, in float32."""
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _load_cached(path: Path, metadata: dict[str, str], count: int) -> np.ndarray | None:
    """Return the embeddings in a cache file, or None if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            embeds, found = file.get_tensor("text_embeds"), file.metadata()
    except (OSError, SafetensorError, TypeError):  # numpy has no bfloat16
        return None
    sound = embeds.dtype == np.float32 and embeds.ndim == 2 and len(embeds) == count and np.isfinite(embeds).all()
    return embeds if sound and found == metadata | {"sha256": _digest(embeds)} else None


def _save_cached(path: Path, metadata: dict[str, str], embeds: np.ndarray) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"text_embeds": embeds}, temporary, metadata | {"sha256": _digest(embeds)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        logger.warning("The text embeddings could not be cached in %s: %s", path.parent, error)


def _digest(embeds: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(embeds).data).hexdigest()
