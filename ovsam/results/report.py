"""A page of labels to review: thumbnails with masks, filtered by label and score, counts and score histograms."""

import base64
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovsam.errors import InputError
from ovsam.ops.files import write_whole
from ovsam.ops.polygons import simplified_outlines
from ovsam.results.formats.base import Labelled, Numbers, visible
from ovsam.results.instance import Instance

SIDE = 320  # px of a thumbnail's longer side
TEMPLATE = Path(__file__).with_name("report.html")


def write_report(
    results: Iterable[Labelled], path: str | os.PathLike[str], open_image: Callable[[str], Image.Image]
) -> None:
    """Write one self-contained html page, in the memory that one image takes.

    open_image: the file name of an image -> the upright image; where it raises InputError, masks stand alone.
    """
    numbers = Numbers()

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(TEMPLATE.read_text(encoding="utf-8"))
            file.write("<script>\n")
            for result in results:
                before = len(numbers)
                card = _card(result, numbers, open_image)
                for name, number in list(numbers.items())[before:]:
                    file.write(f"label({number}, {_script(name)});\n")
                file.write(f"add({_script(card)});\n")
            file.write("list();\nshow();\n</script>\n</html>\n")

    write_whole(path, write)


def _card(result: Labelled, numbers: Numbers, open_image: Callable[[str], Image.Image]) -> list[Any]:
    height, width = result.size
    scale = min(1.0, SIDE / max(height, width))
    small = max(1, round(width * scale)), max(1, round(height * scale))
    objects = [[numbers.of(one.label), round(one.score, 4), _path(one, small)] for one in visible(result)]
    try:
        picture = _thumbnail(open_image(result.file_name or ""), small)
    except InputError:
        picture = ""
    return [result.file_name, *small, picture, objects]


def _thumbnail(image: Image.Image, size: tuple[int, int]) -> str:
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2).save(buffer, format="JPEG", quality=70)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _path(instance: Instance, size: tuple[int, int]) -> str:
    """The outline of a mask in the thumbnail, as an SVG path; its box where nothing of it is left."""
    mask = Image.fromarray(np.uint8(instance.mask) * 255)
    rings = simplified_outlines(np.asarray(mask.resize(size, Image.Resampling.BOX)) >= 128, tolerance=0.75)
    if not rings:
        x, y, width, height = np.array(instance.bbox) * size[0] / mask.width
        return f"M{x:.1f} {y:.1f}h{max(width, 1):.1f}v{max(height, 1):.1f}h{-max(width, 1):.1f}z"
    return "".join("M" + "L".join(f"{x} {y}" for x, y in ring.tolist()) + "z" for ring in rings)


def _script(value: Any) -> str:
    """json that cannot end a <script>."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
