"""The instances of an image: one record each, and exports as pure functions of the records."""

import io
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, overload
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from ovsam.errors import InputError
from ovsam.ops import rle
from ovsam.ops.files import write_whole
from ovsam.ops.nms import NMS, within
from ovsam.ops.segments import segments_of
from ovsam.processing import arguments
from ovsam.processing.images import Picture
from ovsam.results.formats import libraries, read_labels
from ovsam.results.formats.base import LabelledImage
from ovsam.results.formats.coco import read_coco, to_coco, write_coco
from ovsam.results.formats.cvat import read_cvat, to_cvat
from ovsam.results.formats.geojson import read_geojson, to_geojson
from ovsam.results.formats.label_studio import read_label_studio, to_label_studio
from ovsam.results.formats.labelme import read_labelme, to_labelme
from ovsam.results.formats.masks import cutouts, id_map, open_for
from ovsam.results.formats.yolo import read_yolo, to_yolo
from ovsam.results.instance import Instance
from ovsam.results.overlay import draw_overlay

if TYPE_CHECKING:
    import fiftyone
    import pandas
    import supervision


ROOM = 256  # px; a side on which names can be read
MOST_ZOOM = 100


class Results(Sequence[Instance]):
    """The instances of one image, in the given order.

    `results[0]` is an `Instance`, `results[:3]` are `Results`.

    Args:
        instances: records of the instances.
        size: height and width of the upright image in pixels.
        model: name of the model.
        file_name: file of the image.
        presence: for each label of the query, the highest score of any candidate, kept or not.
        dropped: instances with a higher score for a negative query: dicts of text_label, score, negative,
            negative_score.
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
        if not isinstance(instances, Iterable) or getattr(instances, "ndim", 1) == 0:
            raise InputError(f"The instances are {arguments.short(instances)}; they must be a list of ovsam.Instance.")
        self.instances = list(instances)
        if not arguments.is_sequence(size) or len(size) != 2:
            raise InputError(f"The size is {arguments.short(size)}; it must be (height, width) in pixels.")
        self.size = size
        self.model = model
        self.file_name = file_name
        if not isinstance(presence, Mapping | None) or not arguments.is_sequence(dropped):
            raise InputError("The presence of labels must be {label: score}, and the dropped ones a list.")
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
        """Build the records from masks and n values of everything else.

        masks: [n, H, W] bool, array or CPU tensor; or n COCO run lengths together with the `size` (height, width) of
        the image.
        """
        if size is None:
            masks = arguments.plain_masks(masks)
            size = masks.shape[1:]
        given = {"labels": labels, "label_ids": label_ids, "scores": scores, "mask_scores": mask_scores}
        for name, values in given.items():
            arguments.column(name, values, len(masks), str if name == "labels" else None)
        if objectness is not None:
            arguments.column("objectness", objectness, len(masks))
        for name, found in (("prompts", prompts), ("topk", [[]] * len(masks) if topk is None else topk)):
            if arguments.length(found) != len(masks):
                raise InputError(f"The {name} are {arguments.short(found)}; they must be {len(masks)}, one a mask.")
        for best in topk if topk is not None else ():
            if not arguments.is_sequence(best) or not all(
                isinstance(one, tuple | list) and len(one) == 2 and arguments.is_number(one[1]) for one in best
            ):
                raise InputError(f"The topk hold {arguments.short(best)}; each must be a list of (label, score).")
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

    picture: Picture | None = None  # the image, where the user had it in memory; see `image_of`

    @overload
    def __getitem__(self, index: int) -> Instance: ...

    @overload
    def __getitem__(self, index: slice | str) -> Self: ...

    def __getitem__(self, index: int | slice | str) -> Instance | Self:
        if isinstance(index, str):
            return self._of(instance for instance in self if instance.label == index)
        return self._of(self.instances[index]) if isinstance(index, slice) else self.instances[index]

    def __contains__(self, item: object) -> bool:
        """Whether an instance, or one of a label, is among these."""
        return item in self.labels if isinstance(item, str) else item in self.instances

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
        some = type(self)(instances, self.size, self.model, self.file_name, self.presence, self.dropped)
        some.picture = self.picture
        return some

    @cached_property
    def masks(self) -> np.ndarray:
        """All masks [n, H, W] as bool, decoded on first use; `instance.mask` decodes one."""
        return np.array([instance.mask for instance in self], dtype=bool).reshape(len(self), *self.size)

    @property
    def boxes(self) -> np.ndarray:
        """Boxes [n, 4] as x1, y1, x2, y2 in pixels, float32."""
        return np.array([instance.box for instance in self], dtype=np.float32).reshape(-1, 4)

    @property
    def labels(self) -> list[str]:
        return [instance.label for instance in self]

    @property
    def scores(self) -> np.ndarray:
        """Scores [n], float32."""
        return np.array([instance.score for instance in self], dtype=np.float32)

    @property
    def mask_scores(self) -> np.ndarray:
        """Mask scores [n], float32."""
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
        """Return the instances that pass other thresholds; no model runs, and these results are not changed.

        Args:
            score, mask_score: lowest value of each.
            labels: labels to keep.
            min_area: lowest area in pixels.
            nms: a key of `ovsam.ops.nms.NMS`: of masks that overlap by an IoU over `nms_threshold` the highest score is
                kept; soft methods lower the scores of the others.
            per_word: whether suppression is limited to instances of one label.

        Raises:
            InputError: the NMS method is unknown.
        """
        score, mask_score = (arguments.number(*one, 0, 1) for one in (("score", score), ("mask_score", mask_score)))
        nms_threshold = arguments.number("nms_threshold", nms_threshold, 0, 1)
        arguments.number("min_area", min_area, 0, math.inf)
        labels = [labels] if isinstance(labels, str) else arguments.plain(labels)
        if labels is not None and not (
            isinstance(labels, Collection) and not isinstance(labels, bytes) and all(isinstance(x, str) for x in labels)
        ):
            raise InputError(f"The labels are {arguments.short(labels)}; they must be a list of labels.")
        kept = [
            instance
            for instance in self
            if instance.mask_score >= mask_score
            and instance.area >= min_area
            and (labels is None or instance.label in labels)
        ]
        if nms is not None:
            arguments.choice("NMS", nms, NMS)
            masks = [instance.segmentation for instance in kept]
            overlap = rle.iou(masks, masks)
            if per_word:
                names = list(dict.fromkeys(instance.label for instance in kept))
                overlap = within(overlap, np.array([names.index(instance.label) for instance in kept]))
            scores = np.array([instance.score for instance in kept], dtype=np.float64)
            left = NMS[nms](overlap, scores, nms_threshold).tolist()
            kept = [replace(one, score=value) for one, value in zip(kept, left, strict=True) if value > 0]
        return self._of(instance for instance in kept if instance.score >= score)

    def proposals(self) -> tuple[np.ndarray, np.ndarray]:
        """Class-agnostic object proposals: boxes [n, 4] and scores [n], highest first, for detectors (SAM, Kirillov et
        al. 2023, §7.3). The score is the objectness if there is one."""
        scores = np.array([one.score if one.objectness is None else one.objectness for one in self], dtype=np.float32)
        order = np.argsort(-scores, kind="stable")
        return self.boxes[order], scores[order]

    def id_map(self) -> np.ndarray:
        """Return the instance of each pixel, [H, W] int32: its index counted from 1, 0 for none. If masks overlap, the
        pixel belongs to the higher score."""
        return id_map(self)

    def to_semantic(self) -> np.ndarray:
        """Return the label_id of each pixel [H, W] int32, -1 without an instance; see `id_map` for overlaps."""
        label_ids = np.array([-1, *(instance.label_id for instance in self)], dtype=np.int32)
        return label_ids[self.id_map()]

    def to_panoptic(
        self, label_ids_to_fuse: Collection[int] = (), overlap_mask_area_threshold: float = 0.8
    ) -> dict[str, Any]:
        """As `post_process_panoptic_segmentation` of Mask2Former: segmentation [H, W] int32, the segment id or 0, and
        segments_info, dicts of id, label_id, label, was_fused and score.

        Instances that keep at most `overlap_mask_area_threshold` of their mask are removed; those of one label in
        `label_ids_to_fuse` form one segment. See `id_map` for overlaps.
        """
        arguments.number("overlap_mask_area_threshold", overlap_mask_area_threshold, 0, 1)
        label_ids_to_fuse = arguments.whole_numbers("label_ids_to_fuse", label_ids_to_fuse)
        owners = self.id_map()
        left = np.bincount(owners.ravel(), minlength=len(self) + 1)[1:]
        kept = [left[i] > overlap_mask_area_threshold * one.area for i, one in enumerate(self)]
        label_ids = [instance.label_id for instance in self]
        ids, segments = segments_of(label_ids, self.labels, self.scores.tolist(), kept, label_ids_to_fuse)
        return {"segmentation": np.array([0, *ids], dtype=np.int32)[owners], "segments_info": segments}

    def counts(self) -> dict[str, int]:
        """Number of instances of each label, the most frequent first."""
        return dict(Counter(self.labels).most_common())

    def table(self) -> str:
        """The instances as lines of text; boxes are x1,y1,x2,y2, as in the arguments of the command line. For several
        instances a last line counts them by label."""
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
        """Draw masks and class names over the image of these results, enlarged by a whole factor.

        Tags need room: use `zoom` for images under about 256 pixels. Raises InputError if the image has another size
        than these results.
        """
        return draw_overlay(self.check_picture(image), self, arguments.whole("zoom", zoom, 1, MOST_ZOOM))

    def image_of(self) -> Image.Image:
        """The image of these instances: `picture` or the file `file_name`; raises InputError where neither is here."""
        if self.picture is not None:
            return self.check_picture(self.picture)
        if not self.file_name:
            raise InputError("These results do not hold their image; pass it, as in `results.plot(image)`.")
        return self.check_picture(self.file_name)

    def plot(self, image: Picture | None = None, zoom: int | None = None) -> Image.Image:
        """The image with masks and names drawn over it; small images are enlarged, so that names can be read.

        Args:
            image: the image, where the results do not hold it.
            zoom: enlargement, a whole factor.
        """
        picture = self.image_of() if image is None else self.check_picture(image)
        if zoom is None:
            zoom = max(1, round(ROOM / math.sqrt(picture.width * picture.height)))
        return self.overlay(picture, zoom)

    def show(self, image: Picture | None = None) -> None:
        """Show `plot` in the viewer of the system."""
        self.plot(image).show()

    def save(self, path: str | os.PathLike[str], image: Picture | None = None) -> None:
        """Write `plot` to an image file, or, where the path ends in .json, the instances as a COCO data set.

        Raises:
            InputError: another ending, or a path that cannot be written.
        """
        path = arguments.path("path", path)
        ending = os.path.splitext(path)[1].lower()
        if ending == ".json":
            write_coco([self], path)
            return
        kind = Image.registered_extensions().get(ending)
        if kind not in Image.SAVE:
            raise InputError(f"{path} is neither an image file such as found.png nor a .json file.")
        drawn = self.plot(image)
        write_whole(path, lambda temporary: drawn.save(temporary, format=kind))

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows; nothing but the text where the image is not at hand."""
        try:
            drawn = self.plot()
        except InputError:
            return None
        buffer = io.BytesIO()
        drawn.save(buffer, format="PNG")
        return buffer.getvalue()

    def check_picture(self, image: Picture) -> Image.Image:
        """Open the image of these results; raises InputError if it has another size."""
        return open_for(self, image)

    def to_coco(self, image_id: int = 1, labels: Sequence[str] = ()) -> dict[str, Any]:
        """Return this image as a COCO data set; see `ovsam.results.formats.coco.to_coco`."""
        return to_coco([self], arguments.whole("image_id", image_id, 0), labels)

    def to_yolo(self, labels: Sequence[str] = (), tolerance: float = 0.0) -> str:
        """Return the lines of YOLO-seg; see `ovsam.results.formats.yolo.to_yolo`."""
        return to_yolo(self, labels, tolerance)

    def to_labelme(self, shape: str = "polygon", tolerance: float = 0.0) -> dict[str, Any]:
        """Return the LabelMe record; see `ovsam.results.formats.labelme.to_labelme`."""
        return to_labelme(self, shape, tolerance)

    def to_cvat(self) -> str:
        """Return the `<image>` element of CVAT for images 1.1 as text; see `ovsam.results.formats.cvat`."""
        return ElementTree.tostring(to_cvat(self), encoding="unicode")

    def to_label_studio(self, shape: str = "brush", image_url: str = "") -> dict[str, Any]:
        """Return a Label Studio task with a prediction; see `ovsam.results.formats.label_studio.to_label_studio`."""
        return to_label_studio(self, shape, image_url)

    def to_geojson(
        self, transform: Sequence[float] | None = None, crs: str | None = None, tolerance: float = 0.0
    ) -> dict[str, Any]:
        """Return a GeoJSON FeatureCollection; see `ovsam.results.formats.geojson.to_geojson`."""
        return to_geojson(self, transform, crs, tolerance)

    def to_masks(self) -> list[Image.Image]:
        """The mask of each instance as an image of 0 and 255, as large as the image."""
        return [Image.fromarray(np.uint8(instance.mask) * 255) for instance in self]

    def to_cutouts(self, image: Picture | None = None) -> list[Image.Image]:
        """Each instance cut out along its mask; see `ovsam.results.formats.masks.cutouts`."""
        return cutouts(self, self.image_of() if image is None else image)

    def to_dataframe(self) -> "pandas.DataFrame":
        """A row for each instance: label, score, mask_score, objectness, x1, y1, x2, y2, area; needs pandas."""
        try:
            import pandas
        except ImportError as error:
            raise InputError("A data frame needs pandas, which `pip install pandas` brings.") from error
        names = ["label", "score", "mask_score", "objectness", "x1", "y1", "x2", "y2", "area"]
        rows = [(one.label, one.score, one.mask_score, one.objectness, *one.box, one.area) for one in self]
        return pandas.DataFrame(rows, columns=names)

    def to_supervision(self) -> "supervision.Detections":
        """Return `supervision.Detections` with dense masks; needs `pip install supervision`."""
        return libraries.to_supervision(self)

    def to_fiftyone(self) -> "fiftyone.Detections":
        """Return `fiftyone.Detections` with masks cropped to their boxes; needs `pip install fiftyone`."""
        return libraries.to_fiftyone(self)

    @classmethod
    def read(
        cls,
        source: str | os.PathLike[str],
        format: str | None = None,
        images: str | os.PathLike[str] | None = None,
    ) -> list[Self]:
        """Read the images of a label file or folder, in any format of `ovsam.results.formats`; see `read_labels`."""
        return [cls._from(image) for image in read_labels(source, format, images)]

    @classmethod
    def from_coco(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> list[Self]:
        """Read the images of a COCO JSON file, or of its content; see `ovsam.results.formats.coco.read_coco`."""
        return [cls._from(image) for image in read_coco(source)]

    @classmethod
    def from_yolo(
        cls, folder: str | os.PathLike[str], images: str | os.PathLike[str] | None = None, labels: Sequence[str] = ()
    ) -> list[Self]:
        """Read the images of a YOLO-seg data set; see `ovsam.results.formats.yolo.read_yolo`."""
        return [cls._from(image) for image in read_yolo(folder, images, labels)]

    @classmethod
    def from_labelme(cls, source: str | os.PathLike[str]) -> list[Self]:
        """Read the images of LabelMe's JSON files; see `ovsam.results.formats.labelme.read_labelme`."""
        return [cls._from(image) for image in read_labelme(source)]

    @classmethod
    def from_cvat(cls, path: str | os.PathLike[str]) -> list[Self]:
        """Read the images of an XML file of CVAT for images 1.1; see `ovsam.results.formats.cvat.read_cvat`."""
        return [cls._from(image) for image in read_cvat(path)]

    @classmethod
    def from_label_studio(cls, path: str | os.PathLike[str]) -> list[Self]:
        """Read the images of a JSON file of Label Studio; see
        `ovsam.results.formats.label_studio.read_label_studio`."""
        return [cls._from(image) for image in read_label_studio(path)]

    @classmethod
    def from_geojson(cls, source: str | os.PathLike[str]) -> list[Self]:
        """Read the images of GeoJSON files of ovsam; see `ovsam.results.formats.geojson.read_geojson`."""
        return [cls._from(image) for image in read_geojson(source)]

    @classmethod
    def from_supervision(
        cls, detections: "supervision.Detections", labels: Sequence[str] = (), file_name: str | None = None
    ) -> Self:
        """Read the instances of `supervision.Detections` with masks; see `ovsam.results.formats.libraries`."""
        return cls._from(libraries.from_supervision(detections, labels, file_name))

    @classmethod
    def from_fiftyone(
        cls, detections: "fiftyone.Detections", size: tuple[int, int], file_name: str | None = None
    ) -> Self:
        """Read the instances of `fiftyone.Detections` in an image of this size (height, width)."""
        return cls._from(libraries.from_fiftyone(detections, size, file_name))

    @classmethod
    def _from(cls, image: LabelledImage) -> Self:
        return cls(image.instances, image.size, image.model, image.file_name)
