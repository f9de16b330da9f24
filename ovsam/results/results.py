"""The instances of an image: one record each, and exports, which are pure functions of the records."""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
import torch
from PIL import Image

from ovsam.errors import InputError
from ovsam.ops import rle
from ovsam.ops.files import write_whole
from ovsam.ops.nms import NMS, within
from ovsam.ops.segments import segments_of
from ovsam.processing.images import Picture, open_image
from ovsam.results.instance import Instance
from ovsam.results.overlay import draw_overlay

if TYPE_CHECKING:
    import supervision


class Results(Sequence[Instance]):
    """The instances of one image, in the order in which they were given.

    `results[0]` is an `Instance`, `results[:3]` are `Results`.

    Args:
        instances: The records.
        size: Height and width of the upright image in pixels.
        model: The model that made them.
        file_name: File of the image.
        presence: For each label of the query, the highest score of any candidate, kept or not.
        dropped: Instances that scored higher for a negative word: dicts of text_label, score, negative, negative_score.
    """

    def __init__(
        self,
        instances: Iterable[Instance],
        size: tuple[int, int],
        model: str = "",
        file_name: str | None = None,
        presence: Mapping[str, float] | None = None,
        dropped: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.instances = list(instances)
        self.size = size
        self.model = model
        self.file_name = file_name
        self.presence = dict(presence or {})
        self.dropped = list(dropped)

    @classmethod
    def from_arrays(
        cls,
        masks: Any,
        labels: Sequence[str],
        label_ids: Sequence[int],
        scores: Sequence[float],
        mask_scores: Sequence[float],
        prompts: Sequence[Any],
        source: str,
        topk: Sequence[Sequence[tuple[str, float]]] | None = None,
        model: str = "",
        file_name: str | None = None,
        objectness: Sequence[float] | None = None,
        size: tuple[int, int] | None = None,
        presence: Mapping[str, float] | None = None,
        dropped: Sequence[dict[str, Any]] = (),
    ) -> Self:
        """Make the records from masks and n values of everything else.

        masks: [n, H, W] of bool, or a CPU tensor of them; or n of COCO's run lengths, and then the `size` (height,
        width) of the picture too.
        """
        if size is None:
            masks = np.asarray(masks)
            size = masks.shape[1:]
        instances = []
        extras = topk or [[]] * len(masks), [None] * len(masks) if objectness is None else objectness
        columns = zip(labels, label_ids, scores, mask_scores, prompts, *extras, strict=True)
        for number, (mask, column) in enumerate(zip(masks, columns, strict=True), start=1):
            label, label_id, score, mask_score, prompt, best, thing = column
            segmentation = mask if isinstance(mask, dict) else rle.encode(np.asarray(mask, dtype=bool))
            instances.append(
                Instance(
                    id=number,
                    label=label,
                    label_id=int(label_id),
                    score=float(score),
                    mask_score=float(mask_score),
                    prompt=prompt,
                    source=source,
                    bbox=rle.bbox(segmentation),
                    area=rle.area(segmentation),
                    segmentation=segmentation,
                    topk=[(name, float(value)) for name, value in best],
                    objectness=None if thing is None else float(thing),
                )
            )
        return cls(instances, size, model, file_name, presence, dropped)

    @overload
    def __getitem__(self, index: int) -> Instance: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> Instance | Self:
        return self._of(self.instances[index]) if isinstance(index, slice) else self.instances[index]

    def __len__(self) -> int:
        return len(self.instances)

    def __iter__(self) -> Iterator[Instance]:
        return iter(self.instances)

    def __repr__(self) -> str:
        height, width = self.size
        return f"Results({self._count() or 'nothing'}; {width}x{height} pixels; {self.model})"

    def _count(self) -> str:
        return ", ".join(f"{count} {label}" for label, count in self.counts().items())

    def _of(self, instances: Iterable[Instance]) -> Self:
        return type(self)(instances, self.size, self.model, self.file_name, self.presence, self.dropped)

    @cached_property
    def masks(self) -> np.ndarray:
        """All masks [n, H, W] as bool, decoded at the first use; `instance.mask` decodes one."""
        return np.array([instance.mask for instance in self], dtype=bool).reshape(len(self), *self.size)

    @property
    def boxes(self) -> np.ndarray:
        """Corners x1, y1, x2, y2 [n, 4] in pixels, as float32."""
        return np.array([instance.box for instance in self], dtype=np.float32).reshape(-1, 4)

    @property
    def labels(self) -> list[str]:
        return [instance.label for instance in self]

    @property
    def scores(self) -> np.ndarray:
        """[n], float32."""
        return np.array([instance.score for instance in self], dtype=np.float32)

    @property
    def mask_scores(self) -> np.ndarray:
        """[n], float32."""
        return np.array([instance.mask_score for instance in self], dtype=np.float32)

    def filter(
        self,
        score: float = 0.0,
        labels: Collection[str] | None = None,
        mask_score: float = 0.0,
        min_area: int = 0,
        nms: str | None = None,
        nms_threshold: float = 0.6,
        per_word: bool = False,
    ) -> Self:
        """Other thresholds on the same instances: no model runs, and these results stay as they are.

        Args:
            score, mask_score: minimum of each.
            labels: keep only these.
            min_area: in pixels.
            nms: a key of `ovsam.ops.nms.NMS`; where masks overlap by an IoU over `nms_threshold`, better ones stay, and
                soft kinds lower the others' scores. `per_word`: only among instances of one label.

        Raises:
            InputError: unknown NMS method.
        """
        labels = {labels} if isinstance(labels, str) else labels
        kept = [
            instance
            for instance in self
            if instance.mask_score >= mask_score
            and instance.area >= min_area
            and (labels is None or instance.label in labels)
        ]
        if nms is not None:
            if nms not in NMS:
                raise InputError(f"There is no NMS {nms!r}; there are {', '.join(NMS)}.")
            masks = [instance.segmentation for instance in kept]
            overlap = torch.from_numpy(rle.iou(masks, masks))
            if per_word:
                names = list(dict.fromkeys(instance.label for instance in kept))
                overlap = within(overlap, torch.tensor([names.index(instance.label) for instance in kept]))
            scores = torch.tensor([instance.score for instance in kept], dtype=torch.float64)
            left = NMS[nms](overlap, scores, nms_threshold).tolist()
            kept = [replace(one, score=value) for one, value in zip(kept, left, strict=True) if value > 0]
        return self._of(instance for instance in kept if instance.score >= score)

    def proposals(self) -> tuple[np.ndarray, np.ndarray]:
        """Class-agnostic object proposals: boxes [n, 4] and scores [n], highest first, as detectors take them
        (SAM, Kirillov et al. 2023, §7.3). The score is the objectness if there is one."""
        scores = np.array([one.score if one.objectness is None else one.objectness for one in self], dtype=np.float32)
        order = np.argsort(-scores, kind="stable")
        return self.boxes[order], scores[order]

    def id_map(self) -> np.ndarray:
        """Which instance each pixel belongs to, [H, W] int32: its place counted from 1, 0 for none. Where masks
        overlap, the higher score has the pixel."""
        owners = np.zeros(self.size, dtype=np.int32)
        for place in np.argsort(-self.scores, kind="stable")[::-1]:
            owners[self[int(place)].mask] = place + 1
        return owners

    def to_semantic(self) -> np.ndarray:
        """The label_id of each pixel [H, W] int32, -1 where there is no instance; see `id_map` for overlaps."""
        label_ids = np.array([-1, *(instance.label_id for instance in self)], dtype=np.int32)
        return label_ids[self.id_map()]

    def to_panoptic(
        self, label_ids_to_fuse: Collection[int] = (), overlap_mask_area_threshold: float = 0.8
    ) -> dict[str, Any]:
        """As Mask2Former's `post_process_panoptic_segmentation`: segmentation [H, W] int32, the segment's id or 0, and
        segments_info, dicts of id, label_id, label, was_fused and score.

        An instance that keeps no more than `overlap_mask_area_threshold` of its mask goes; those of one label in
        `label_ids_to_fuse` are one segment. See `id_map` for overlaps.
        """
        owners = self.id_map()
        left = np.bincount(owners.ravel(), minlength=len(self) + 1)[1:]
        kept = [left[i] > overlap_mask_area_threshold * one.area for i, one in enumerate(self)]
        label_ids = [instance.label_id for instance in self]
        ids, segments = segments_of(label_ids, self.labels, self.scores.tolist(), kept, label_ids_to_fuse)
        return {"segmentation": np.array([0, *ids], dtype=np.int32)[owners], "segments_info": segments}

    def counts(self) -> dict[str, int]:
        """How many there are of each label, the most frequent first."""
        return dict(Counter(self.labels).most_common())

    def table(self) -> str:
        """The instances as lines of text; boxes are x1,y1,x2,y2, as the command line reads them. Of several the last
        line says how many there are of each label."""
        rows = [("label", "score", "mask score", "box", "area")]
        for instance in self:
            box = ",".join(f"{value:.0f}" for value in instance.box)
            scores = f"{instance.score:.2f}", f"{instance.mask_score:.2f}"
            rows.append((instance.label, *scores, box, f"{instance.area}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        first, *others = widths
        lines = [
            "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
            for row in rows
        ]
        return "\n".join([*lines, self._count()] if len(self) > 1 else lines)

    def overlay(self, image: Picture, zoom: int = 1) -> Image.Image:
        """Draw masks and names over the picture they were found in, enlarged by a whole factor.

        Names need room: a picture under about 256 pixels wants a `zoom`. Raises InputError for a picture of another
        size than theirs.
        """
        return draw_overlay(self.check_picture(image), self, zoom)

    def check_picture(self, image: Picture) -> Image.Image:
        """Open the picture that these were found in; raises InputError for one of another size."""
        picture = open_image(image)
        if (picture.height, picture.width) != tuple(self.size):
            height, width = self.size
            raise InputError(
                f"The picture is {picture.width}x{picture.height} pixels and these results are for {width}x{height}; "
                "draw them over the picture they were found in."
            )
        return picture

    def to_coco(self, image_id: int = 1, labels: Sequence[str] = ()) -> dict[str, Any]:
        """This one picture as a COCO data set; see `to_coco`."""
        return to_coco([self], image_id, labels)

    def to_supervision(self) -> "supervision.Detections":
        """The instances as `supervision.Detections`, masks dense; needs `pip install supervision`."""
        import supervision

        return supervision.Detections(
            xyxy=self.boxes,
            mask=self.masks,
            confidence=self.scores,
            class_id=np.array([instance.label_id for instance in self], dtype=int),
            data={"class_name": np.array(self.labels, dtype=str), "mask_score": self.mask_scores},
        )


def to_coco(results: Iterable[Results], first_image_id: int = 1, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Return pictures as one COCO data set: boxes are x, y, width, height, masks compressed RLE, iscrowd always 0.

    Each annotation also carries `label`, `score`, `mask_score`, `prompt`, `source`, `topk` and `objectness`.
    Categories are numbered from 1: first `labels` in their order (give the vocabulary to have the same numbers in every
    file), then other labels as they come.
    """
    results = list(results)
    category_ids = {label: number for number, label in enumerate(dict.fromkeys(labels), start=1)}
    images, annotations = [], []
    for image_id, result in enumerate(results, start=first_image_id):
        height, width = result.size
        images.append({"id": image_id, "file_name": result.file_name or "", "height": height, "width": width})
        for instance in result:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_ids.setdefault(instance.label, len(category_ids) + 1),
                    "bbox": list(instance.bbox),
                    "area": instance.area,
                    "segmentation": instance.segmentation,
                    "iscrowd": 0,
                    "label": instance.label,
                    "score": instance.score,
                    "mask_score": instance.mask_score,
                    "prompt": instance.prompt,
                    "source": instance.source,
                    "topk": instance.topk,
                    "objectness": instance.objectness,
                }
            )
    return {
        "info": {"model": ", ".join(sorted({result.model for result in results}))},
        "images": images,
        "categories": [{"id": number, "name": label} for label, number in category_ids.items()],
        "annotations": annotations,
    }


def write_coco(results: Iterable[Results], path: str | os.PathLike[str], labels: Sequence[str] = ()) -> None:
    """Write pictures to one COCO json file, as `to_coco` makes it; raises InputError if its folder does not exist."""
    text = json.dumps(to_coco(results, labels=labels), ensure_ascii=False)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
