"""A detection function for CVAT's automatic annotation; needs `pip install cvat-cli`.

    cvat-cli task auto-annotate 137 --function-module ovsam.inference.serving.cvat -p "words=str:dog,red ball" \\
        -p model=str:photo --conf-threshold 0.4

The model runs on the machine that calls; CVAT only gets the shapes. Labels of the task that have the name of one of the
words are filled.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ovsam.errors import InputError
from ovsam.inference.loading import load
from ovsam.inference.segmenter import Segmenter
from ovsam.ops.polygons import to_polygon
from ovsam.processing.vocabulary import Vocabulary
from ovsam.results.formats.base import visible
from ovsam.results.results import Results

if TYPE_CHECKING:
    import PIL.Image


class CvatFunction:
    """Finds words in the images of a CVAT task: masks, or polygons where CVAT asks for them, in which holes and parts
    are joined by bridges without width.

    Args:
        segmenter: the model.
        words: of `Segmenter.where`.
    """

    def __init__(self, segmenter: Segmenter, words: Vocabulary):
        from cvat_sdk import auto_annotation as cvat

        self.segmenter, self.words = segmenter, words
        labels = [cvat.label_spec(label, number, type="any") for number, label in enumerate(words.labels)]
        self.spec = cvat.DetectionFunctionSpec(labels=labels)

    def detect(self, context: Any, image: "PIL.Image.Image") -> Sequence[Any]:
        """CVAT's shapes of the instances in one image, those of at least `context.conf_threshold`."""
        from cvat_sdk import auto_annotation as cvat
        from cvat_sdk.masks import encode_mask

        found = cast(Results, self.segmenter.where(image, self.words, threshold=context.conf_threshold))
        shapes = []
        for instance in visible(found):
            if context.conv_mask_to_poly:
                shapes.append(cvat.polygon(instance.label_id, to_polygon(instance.mask).ravel().tolist()))
            else:
                shapes.append(cvat.mask(instance.label_id, encode_mask(instance.mask, list(instance.box))))
        return shapes


def create(words: str, model: str = "auto", device: str | None = None) -> CvatFunction:
    """What `cvat-cli` calls.

    Args:
        words: separated by commas; or the name of a built-in vocabulary, or a file with one word a line.
        model, device: of `ovsam.load`.

    Raises:
        InputError: no words, or a model that cannot be loaded.
    """
    listed = [word.strip() for word in words.split(",") if word.strip()]
    if not listed:
        raise InputError("There are no words; pass them as -p words=str:dog,cat.")
    try:
        vocabulary = Vocabulary(words)
    except InputError:
        vocabulary = Vocabulary(listed)
    return CvatFunction(load(model, device=device), vocabulary)
