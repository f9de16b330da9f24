"""A folder of `ovsam export` answers the three questions with onnxruntime and numpy; torch is not imported."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from ovsam.checkpoints.exported import read_settings
from ovsam.errors import InputError
from ovsam.inference.questions import Asked, EncodedImage, Questions
from ovsam.ops.arrays import descending
from ovsam.ops.boxes import masks_to_boxes
from ovsam.ops.masks import mask_logits, mask_overlap
from ovsam.ops.nms import fast_box_nms, suppress
from ovsam.ops.scores import calibrated, instance_scores, word_shares
from ovsam.processing import arguments
from ovsam.processing.postprocessing import Canvas, describe, select
from ovsam.processing.vocabulary import check_text_length

CHUNK = 8  # prompts that are decoded at a time; more do not fit the cache of a CPU (see modeling/sam/decode.py)


class OnnxSegmenter(Questions):
    """An exported model. It answers like `Segmenter`, with the same Results; it has no `edges`, and no proposers but
    its own ConceptHead.

    Args:
        folder: written by `ovsam export`.
        device: "cpu", or "cuda" with onnxruntime-gpu.
        threads: of onnxruntime; by default one for each core.

    Raises:
        InputError: the folder is not whole, its format is another one, or onnxruntime or tokenizers are not installed.
    """

    def __init__(self, folder: str | os.PathLike, device: str = "cpu", threads: int | None = None):
        self.folder = Path(folder)
        settings = read_settings(self.folder)
        super().__init__(settings["name"] or self.folder.name)
        self.settings = SimpleNamespace(**settings)
        self._start = _starter(device, threads)
        self._sessions: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._tokenizer = _read_tokenizer(self.folder / "tokenizer.json")

    def __repr__(self) -> str:
        words = self.settings.vocabulary
        return f"OnnxSegmenter({self.name!r}: {f'{len(words):,} words' if words else 'no vocabulary'})"

    def run(self, graph: str, **given: np.ndarray) -> dict[str, np.ndarray]:
        """Run one graph of the folder (docs/onnx.md) on its named inputs; others are ignored."""
        session = self._session(graph)
        feed = {one.name: given[one.name] for one in session.get_inputs()}
        return dict(zip([one.name for one in session.get_outputs()], session.run(None, feed), strict=True))

    def _session(self, graph: str) -> Any:
        with self._lock:
            if graph not in self._sessions:
                self._sessions[graph] = self._start(self.folder / f"{graph}.onnx")
            return self._sessions[graph]

    def _has(self, graph: str) -> bool:
        return (self.folder / f"{graph}.onnx").is_file()

    # ---- images and words

    def _encode(self, images: list[Image.Image]) -> list[EncodedImage]:
        return [EncodedImage(image, self.run("image", pixel_values=self._pixels(image))) for image in images]

    def _pixels(self, image: Image.Image) -> np.ndarray:
        """Upright RGB image -> [1, 3, H, W], resized to the square of the model and normalised."""
        side, settings = self.settings.image_size, self.settings
        resized = image.resize((side, side), Image.Resampling(settings.resample))
        pixels = np.asarray(resized, dtype=np.float32) / 255
        pixels = (pixels - np.float32(settings.image_mean)) / np.float32(settings.image_std)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype=np.float32)

    def encode_words(self, phrases: list[str]) -> np.ndarray:
        settings = self.settings
        tokens = self._tokenizer.encode_batch(phrases)
        lengths = [len(one.ids) for one in tokens]
        check_text_length(phrases, lengths, settings.max_text_length)
        width = settings.max_text_length if settings.text_padding == "max_length" else max(lengths)
        ids = np.full((len(tokens), width), settings.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, one in enumerate(tokens):
            ids[row, : len(one.ids)], mask[row, : len(one.ids)] = one.ids, 1
        return self.run("text", input_ids=ids, attention_mask=mask)["text_embeds"]

    def text_weights(self) -> tuple:
        return ()

    def to_own(self, embeds: np.ndarray) -> np.ndarray:
        return embeds

    def _check_proposer(self, proposer: Any) -> None:
        if proposer not in (None, "concepts"):
            raise InputError(f"An exported model has no proposer {arguments.short(proposer)}; it has its ConceptHead.")
        if not self._has("locations"):
            raise InputError(
                "This model has no ConceptHead, so it cannot search for text queries or everything: pass points, boxes "
                "or masks to `what`."
            )

    # ---- questions without prompts

    def _answer(self, encoded: EncodedImage, asked: Asked, threshold: float) -> SimpleNamespace:
        features, settings, everything = encoded.features, self.settings, asked.source == "auto"
        if asked.refine is False and not self._has("boxes"):
            raise InputError("refine=False needs masks of the ConceptHead, which this model does not have.")
        words, shares, count = self._words(asked)
        found = self.run("locations", **features, words=words)
        index, likely, logits = (found[name][0] for name in ("location", "likely", "logits"))  # [T], [T], [T, K]

        score = likely
        if count and not everything:
            score = instance_scores(logits[:, :count].max(-1), likely, settings.objectness_weight)
            score = calibrated(score, settings.score_calibration)
        order = descending(score)
        order = order[score[order] > min(threshold, settings.proposal_threshold)]
        kept = fast_box_nms(features["boxes"][0, index[order]], settings.nms_threshold)
        order = order[kept][: settings.max_detections]
        rough = None
        if self._has("boxes") and len(order):
            rough = self.run("boxes", **features, regions=features["boxes"][:, index[order]])["masks"][0]
            distinct = suppress(mask_overlap(rough > 0), settings.mask_nms_threshold)  # each object is refined once
            order, rough = order[distinct], rough[distinct]
        boxes, objectness, logits = features["boxes"][0, index[order]], likely[order], logits[order]

        masks, iou, tokens, embeds = rough, None, None, features["embeds"][0, index[order]]
        refine = settings.refine_boxes or rough is None if asked.refine is None else asked.refine
        if masks is None:  # none are found, or the decoder makes them
            masks = np.zeros((len(order), settings.mask_size, settings.mask_size), np.float32)
        if refine and len(order):
            masks, iou, tokens = self._decode(features, _corners(boxes), [2, 3], rough)
        if settings.has_adapter and len(order) and (tokens is not None or not settings.reads_tokens):
            named = self._name(features, masks, self._boxes_of(masks), tokens, words, shares)
            embeds, seen = named["class_embeds"][0], named["logits"][0]
            logits = seen if everything else (logits + seen) / 2
        weight = 0.0 if everything else settings.objectness_weight
        calibration = settings.name_calibration if everything else settings.score_calibration
        scores = calibrated(instance_scores(logits, objectness[:, None], weight), calibration)
        return self._output(masks, iou, embeds, scores, count, asked, objectness)

    # ---- prompts

    def _prompt(self, encoded, points=None, labels=None, boxes=None, masks=None, words=None, embeds=None):
        settings, features = self.settings, encoded.features
        scale = settings.image_size / np.array([encoded.image.width, encoded.image.height], dtype=np.float32)
        given = None if masks is None else self._mask_prompts(masks)
        corners = None if not boxes else _corners(np.array(boxes, dtype=np.float32)) * scale  # [P, 2, 2]
        if given is not None and not points and corners is None:  # SAM needs a box or clicks beside a mask prompt
            corners = _corners(self._boxes_of(given))
        at, kinds = np.zeros((1 if corners is None else len(corners), 0, 2), np.float32), []
        if points:  # they are on one object
            at, kinds = np.array([points], dtype=np.float32) * scale, list(labels or [1] * len(points))
        if corners is not None:
            at, kinds = np.concatenate([at, corners], 1), [*kinds, 2, 3]
        prior = given
        if settings.corrects and (given is None or (points and corners is None)):
            prior = self._prior(features, at, kinds, corners, given)
        refine = settings.refine_boxes or prior is None or given is not None or bool(points)
        found, iou, tokens = prior, None, None
        if refine or settings.reads_tokens:
            decoded, quality, tokens = self._decode(features, at, kinds, prior)
            found, iou = (decoded, quality) if refine else (found, iou)
        regions = self._boxes_of(found) if corners is None else corners.reshape(-1, 4)
        asked = Asked("prompt", words, embeds)
        rows, shares, count = self._words(asked)
        class_embeds = scores = None
        if self._has("names"):
            named = self._name(features, found, regions, tokens, rows, shares)
            class_embeds = named["class_embeds"][0]
            scores = calibrated(instance_scores(named["logits"][0], None, 0.0), settings.name_calibration)
        return self._output(found, iou, class_embeds, scores, count, asked)

    def _prior(self, features, points, labels, corners, given) -> np.ndarray:
        """The masks [P, H, W] of the ConceptHead for boxes, or else for clicks; with a mask prompt the mean of both."""
        if corners is not None:
            return self.run("boxes", **features, regions=corners.reshape(1, -1, 4))["masks"][0]
        prompt = self._prompts(points, labels, given)
        return self.run("clicks", **features, **{name: one[None] for name, one in prompt.items()})["masks"][0]

    def _mask_prompts(self, masks: np.ndarray) -> np.ndarray:
        """Masks [n, H, W], bool or logits, over the image -> logits [n, h, w] on the grid of mask prompts."""
        side = self.settings.mask_size
        logits = [Image.fromarray(np.asarray(one, np.float32)) for one in mask_logits(masks)]
        return np.stack([np.asarray(one.resize((side, side), Image.Resampling.BILINEAR)) for one in logits])

    # ---- steps of both

    def _words(self, asked: Asked) -> tuple[np.ndarray, np.ndarray, int]:
        """The embeddings of the words and, last, of the negative ones [K, D], the share of the CLIP side in the logit
        of each [K], and the number of words that are not negative."""
        rows, labels = [], []
        if asked.embeds is not None:
            rows, labels = [asked.embeds], list(asked.vocabulary.as_mapping().values())
        count = len(labels)
        if asked.negatives is not None:
            rows, labels = [*rows, asked.negatives[1]], labels + [""] * len(asked.negatives[1])
        if not rows:  # graphs take at least one word
            rows, labels = [np.zeros((1, self.settings.embed_dim), np.float32)], [""]
        shares = np.array(word_shares(labels, set(self.settings.trained_words)), dtype=np.float32)
        return np.concatenate(rows), shares, count

    def _decode(
        self, features: dict[str, np.ndarray], points: np.ndarray, labels: list[int], masks: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """points [P, N, 2] in pixels of the model input, labels [N] of each, masks [P, H, W] or None -> masks [P, H,
        W], predicted IoU [P] and tokens [P, C]."""
        prompts, parts = self._prompts(points, labels, masks), []
        for start in range(0, len(points), CHUNK):
            some = {name: one[None, start : start + CHUNK] for name, one in prompts.items()}
            found = self.run("masks", **features, **some)
            parts.append([found[name][0] for name in ("masks", "iou", "tokens")])
        decoded, iou, tokens = (np.concatenate(part) for part in zip(*parts, strict=True))
        return decoded, iou, tokens

    def _prompts(self, points: np.ndarray, labels: list[int], masks: np.ndarray | None) -> dict[str, np.ndarray]:
        """Prompts as the graphs take them, without the first axis."""
        number, side = len(points), self.settings.mask_size
        return {
            "points": points,
            "labels": np.tile(np.int64(labels), (number, 1)),
            "input_masks": np.zeros((number, side, side), np.float32) if masks is None else masks,
            "mask_given": np.full(number, masks is not None),
        }

    def _name(self, features, masks, regions, tokens, words, shares) -> dict[str, np.ndarray]:
        if tokens is None:  # an input of the graph, though the adapter does not read them
            shapes = {one.name: one.shape for one in self._session("names").get_inputs()}
            tokens = np.zeros((len(masks), *shapes.get("tokens", ())[2:]), np.float32)
        own = {"masks": masks, "regions": regions, "tokens": tokens}
        return self.run("names", **features, **{k: one[None] for k, one in own.items()}, words=words, shares=shares)

    def _boxes_of(self, masks: np.ndarray) -> np.ndarray:
        """Masks [P, h, w], logits -> boxes [P, 4] in pixels of the model input."""
        return masks_to_boxes(masks > 0) * np.float32(self.settings.image_size / masks.shape[-1])

    def _output(self, masks, iou, embeds, scores, count, asked: Asked, objectness=None) -> SimpleNamespace:
        """The fields of OVSamOutput that are read afterwards, for one image. scores: [I, K + K'], negative words
        last."""
        words = asked.vocabulary if count else None
        negative = asked.negatives is not None
        return SimpleNamespace(
            pred_masks=masks[None, :, None],
            iou_scores=None if iou is None else iou[None, :, None],
            class_embeds=None if embeds is None else embeds[None],
            scores=scores[None, :, :count] if count and scores is not None else None,
            negative_scores=scores[None, :, count:] if negative else None,
            objectness=None if objectness is None else objectness[None],
            valid=np.ones((1, len(masks)), dtype=bool),
            text_labels=None if words is None else words.as_mapping(),
            negative_labels=asked.negatives[0].prompts if negative else None,
            everything=asked.source == "auto",
            mask_nms_threshold=self.settings.mask_nms_threshold,
        )

    def _instances(self, outputs, size: tuple[int, int], threshold: float | None, post: dict) -> dict[str, Any]:
        post = dict(post)
        drawing = {name: post.pop(name) for name in ("mask_threshold", "exclusive") if name in post}
        chosen = select(outputs, 0, outputs.text_labels, threshold or 0.0, **post)
        return describe(chosen, Canvas(*size), run_lengths=True, **drawing)


def _corners(boxes: np.ndarray) -> np.ndarray:
    """Boxes [P, 4] -> their corners as points [P, 2, 2], whose labels are 2 and 3."""
    return boxes.reshape(-1, 2, 2)


def _read_tokenizer(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise InputError("An exported model needs tokenizers, which `pip install tokenizers` brings.") from error
    if not path.is_file():
        raise InputError(f"{path.parent} lacks {path.name}; export the model again.")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _starter(device: Any, threads: int | None):
    """A function that opens a graph."""
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError("An exported model needs onnxruntime, which `pip install 'ovsam[onnx]'` brings.") from error
    kind = str(device).partition(":")[0]
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind)
    if provider not in onnxruntime.get_available_providers():
        raise InputError(
            f"The device {arguments.short(device)} cannot be used by onnxruntime here; `cpu` always works."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3

    def start(path: Path) -> Any:
        if not path.is_file():
            raise InputError(f"{path.parent} lacks {path.name}; export the model again.")
        return onnxruntime.InferenceSession(path, options, providers=[provider])

    return start
