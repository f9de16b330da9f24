"""What was found in a picture: one record an instance, and its exports, which are pure functions of the records."""

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from ovsam.errors import InputError
from ovsam.images import Picture, open_image
from ovsam.overlay import draw_overlay

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True, slots=True)
class Instance:
    """One thing in a picture.

    `id` counts from 1 within its picture; `label_id` is the label's place in the vocabulary. `score` is how surely the
    label is right and `mask_score` the predicted IoU of the mask, both in [0, 1]. `prompt` is what asked for it: a
    word, or the clicks or the box in pixels; `source` is "text", "point", "box", "mask" or "auto". `bbox` is x, y,
    width, height, and `area` a count, in pixels. `segmentation` is the mask [H, W] as COCO's compressed RLE, its counts
    a string. `topk` holds the best labels with their scores, best first.
    """

    id: int
    label: str
    label_id: int
    score: float
    mask_score: float
    prompt: Any
    source: str
    bbox: tuple[float, float, float, float]
    area: int
    segmentation: dict[str, Any]
    topk: list[tuple[str, float]]

    @property
    def mask(self) -> np.ndarray:
        """The mask [H, W] as bool, decoded anew at each call."""
        return rle.decode(self.segmentation).astype(bool)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """`bbox` as corners: x1, y1, x2, y2."""
        x, y, width, height = self.bbox
        return x, y, x + width, y + height


class Results(Sequence[Instance]):
    """The instances of one picture, in the order in which they were given.

    `results[0]` is an `Instance`, `results[:3]` are `Results`.

    Args:
        instances: The records.
        size: Height and width of the picture, upright, in pixels.
        model: The model that made them.
        file_name: Where the picture came from.
    """

    def __init__(
        self, instances: Iterable[Instance], size: tuple[int, int], model: str = "", file_name: str | None = None
    ) -> None:
        self.instances = list(instances)
        self.size = size
        self.model = model
        self.file_name = file_name

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
    ) -> Self:
        """Make the records from masks [n, H, W] of bool (or a CPU tensor of them) and n values of everything else."""
        masks = np.asarray(masks)
        instances = []
        columns = zip(labels, label_ids, scores, mask_scores, prompts, topk or [[]] * len(masks), strict=True)
        for number, (mask, column) in enumerate(zip(masks, columns, strict=True), start=1):
            label, label_id, score, mask_score, prompt, best = column
            # One mask at a time: COCO reads column by column, and a copy of all of them in that order could be huge.
            segmentation = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
            instances.append(
                Instance(
                    id=number,
                    label=label,
                    label_id=int(label_id),
                    score=float(score),
                    mask_score=float(mask_score),
                    prompt=prompt,
                    source=source,
                    bbox=tuple(rle.toBbox(segmentation).tolist()),
                    area=int(rle.area(segmentation)),
                    segmentation={"size": list(mask.shape), "counts": segmentation["counts"].decode("ascii")},
                    topk=[(name, float(value)) for name, value in best],
                )
            )
        return cls(instances, masks.shape[1:], model, file_name)

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
        found = ", ".join(f"{count} {label}" for label, count in self.counts().items()) or "nothing"
        return f"Results({found}; {width}x{height} pixels; {self.model})"

    def _of(self, instances: Iterable[Instance]) -> Self:
        return type(self)(instances, self.size, self.model, self.file_name)

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
        self, score: float = 0.0, labels: Collection[str] | None = None, mask_score: float = 0.0, min_area: int = 0
    ) -> Self:
        """Keep instances of at least these scores and this area in pixels, and of these labels; no model runs."""
        labels = {labels} if isinstance(labels, str) else labels
        return self._of(
            instance
            for instance in self
            if instance.score >= score
            and instance.mask_score >= mask_score
            and instance.area >= min_area
            and (labels is None or instance.label in labels)
        )

    def counts(self) -> dict[str, int]:
        """How many there are of each label, the most frequent first."""
        return dict(Counter(self.labels).most_common())

    def table(self) -> str:
        """The instances as lines of text; boxes are x1,y1,x2,y2, as the command line reads them."""
        rows = [("label", "score", "mask score", "box", "area")]
        for instance in self:
            box = ",".join(f"{value:.0f}" for value in instance.box)
            scores = f"{instance.score:.2f}", f"{instance.mask_score:.2f}"
            rows.append((instance.label, *scores, box, f"{instance.area}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        first, *others = widths
        return "\n".join(
            "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
            for row in rows
        )

    def overlay(self, image: Picture, zoom: int = 1) -> Image.Image:
        """Draw masks and names over the picture they were found in, enlarged by a whole factor.

        Names need room: a picture under about 256 pixels wants a `zoom`. Raises InputError for a picture of another
        size than theirs.
        """
        picture = open_image(image)
        if (picture.height, picture.width) != tuple(self.size):
            height, width = self.size
            raise InputError(
                f"The picture is {picture.width}x{picture.height} pixels and these results are for {width}x{height}; "
                "draw them over the picture they were found in."
            )
        return draw_overlay(picture, self, zoom)

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

    Each annotation also carries `label`, `score`, `mask_score`, `prompt`, `source` and `topk`. Categories are numbered
    from 1: first `labels` in their order (give the vocabulary to have the same numbers in every file), then other
    labels as they come.
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


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file of the same ending, then rename it: the path never holds half a file.

    Raises InputError if the folder does not exist.
    """
    path = Path(path)
    check_folder(path)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(path: Path) -> None:
    """Raise InputError unless the folder of this file exists."""
    if not path.parent.is_dir():
        raise InputError(f"The folder {path.parent} does not exist; create it, or write {path.name} elsewhere.")
