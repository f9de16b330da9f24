"""GeoJSON (RFC 7946): a FeatureCollection for each image, in map coordinates if the image has them."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import numpy as np

from ovsam.errors import InputError
from ovsam.ops.files import write_text
from ovsam.ops.polygons import fill, parts
from ovsam.ops.schema import Coordinate, Point, Share, Side, checked, place, read_json
from ovsam.processing import arguments
from ovsam.results.formats.base import Labelled, LabelledImage, Numbers, Stems, files_below, visible

PIXELS = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
Ring = Annotated[list[Point], msgspec.Meta(min_length=3)]


class ImageFacts(TypedDict):
    height: Side
    width: Side
    file_name: NotRequired[str | None]
    transform: NotRequired[Annotated[list[Coordinate], msgspec.Meta(min_length=6, max_length=6)] | None]


class Geometry(TypedDict):
    type: Literal["Polygon", "MultiPolygon"]
    coordinates: Any  # of a depth that depends on the type


class Properties(TypedDict, total=False):
    label: str
    score: Share | None
    mask_score: Share | None


class Feature(TypedDict):
    geometry: Geometry
    properties: Properties


class GeojsonFile(TypedDict):
    image: ImageFacts
    features: list[Feature]


def to_geojson(
    result: Labelled, transform: Sequence[float] | None = None, crs: str | None = None, tolerance: float = 0.0
) -> dict[str, Any]:
    """Return the instances of one image as features: a Polygon, or a MultiPolygon for several parts.

    Args:
        transform: a, b, c, d, e, f of the affine map from pixels: x = a column + b row + c, y = d column + e row + f;
            the first six numbers of rasterio's `transform`. Without it coordinates are pixels from the upper left.
        crs: coordinate system of these, such as "EPSG:32633"; RFC 7946 has WGS 84 only, and others are stored in the
            member `crs` of its predecessor, which GIS programs read.
        tolerance: as in `ovsam.ops.polygons.to_polygon`.
    """
    tolerance = arguments.number("tolerance", tolerance, 0, math.inf)
    if not (crs is None or isinstance(crs, str)):
        raise InputError(f"The crs is {arguments.short(crs)}; it must be a string such as 'EPSG:32633'.")
    if transform is not None:
        (transform,) = arguments.rows("transform", [transform], 6, "a, b, c, d, e, f of the map from pixels")
    a, b, c, d, e, f = transform or PIXELS
    turned = a * e - b * d < 0  # the map's y axis points up: clockwise becomes counterclockwise

    def ring(polygon: np.ndarray) -> list[list[float]]:
        x, y = polygon.astype(float).T
        points = np.stack([a * x + b * y + c, d * x + e * y + f], 1)
        points = points[::-1] if turned else points  # outer rings counterclockwise, holes clockwise
        return [*points.tolist(), points[0].tolist()]

    features = []
    for instance in visible(result):
        polygons = [[ring(polygon) for polygon in part] for part in parts(instance.mask, tolerance)]
        kind, coordinates = ("Polygon", polygons[0]) if len(polygons) == 1 else ("MultiPolygon", polygons)
        facts = {"label": instance.label, "score": instance.score, "mask_score": instance.mask_score}
        facts |= {"label_id": instance.label_id, "area": instance.area}
        features.append(
            {
                "type": "Feature",
                "id": instance.id,
                "geometry": {"type": kind, "coordinates": coordinates},
                "properties": facts,
            }
        )
    height, width = result.size
    image = {"file_name": result.file_name, "height": height, "width": width, "transform": [a, b, c, d, e, f]}
    collection: dict[str, Any] = {"type": "FeatureCollection", "image": image}
    if crs is not None:
        name = f"urn:ogc:def:crs:{crs.replace(':', '::')}" if crs.startswith("EPSG:") else crs
        collection["crs"] = {"type": "name", "properties": {"name": name}}
    return collection | {"features": features}


def write_geojson(
    results: Iterable[Labelled], folder: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> None:
    """Write <image>.geojson for every image.

    images: the folder that file names are relative to; georeferenced images there give their features map coordinates,
    if rasterio is installed.
    """
    stems = Stems()
    for result in results:
        path = Path(folder) / f"{stems.of(result)}.geojson"
        placed = georeference(Path(images) / result.file_name) if images is not None and result.file_name else {}
        write_text(path, json.dumps(to_geojson(result, **placed), ensure_ascii=False))


def read_geojson(source: str | os.PathLike[str]) -> list[LabelledImage]:
    """Return the images of the files of `write_geojson` in a folder, or of one file, in pixels.

    Raises:
        InputError: a file is missing, has another format, or a polygon does not fit its image.
    """
    found, numbers = [], Numbers()
    for path in files_below(source, (".geojson", ".json")):
        content = read_json(path)
        if not isinstance(content, dict) or "image" not in content:
            raise InputError(f"{path} does not hold the size of its image; only GeoJSON files of ovsam can be read.")
        content = checked(content, GeojsonFile, str(path))
        facts = content["image"]
        a, b, c, d, e, f = facts.get("transform") or PIXELS
        try:
            inverse = np.linalg.inv([[a, b, c], [d, e, f], [0, 0, 1]])
        except np.linalg.LinAlgError as error:
            raise InputError(f"{place('image.transform', path)} cannot be inverted; it must map an area.") from error
        image = LabelledImage((facts["height"], facts["width"]), facts.get("file_name"))
        for number, feature in enumerate(content["features"]):
            geometry, known = feature["geometry"], feature["properties"]
            where = place(f"features[{number}].geometry.coordinates", path)
            if geometry["type"] == "MultiPolygon":
                polygons = checked(geometry["coordinates"], list[list[Ring]], where)
            else:
                polygons = [checked(geometry["coordinates"], list[Ring], where)]
            rings = [np.array(one, float) @ inverse[:2, :2].T + inverse[:2, 2] for part in polygons for one in part]
            if not rings:
                raise InputError(f"{where} is empty; it must have a ring.")
            # Rings are connected by bridges without width, so that holes stay open in one filled polygon.
            whole = np.concatenate([part for one in rings for part in (one, rings[0][:1])])
            try:
                segmentation = fill([whole.round(6)], *image.size)
            except InputError as error:
                raise InputError(f"{where} {error}.") from error
            scores = {key: known[key] for key in ("score", "mask_score") if known.get(key) is not None}
            label = known.get("label", "object")
            image.add(label, numbers.of(label), segmentation, **scores)
        found.append(image)
    return found


def georeference(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`transform` and `crs` of a georeferenced image file for `to_geojson`; empty for other files, or without
    rasterio."""
    try:
        import rasterio
    except ImportError:
        return {}
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # most images have no georeference
            with rasterio.open(path) as image:
                if image.crs is None or image.transform.is_identity:
                    return {}
                return {"transform": list(image.transform)[:6], "crs": image.crs.to_string()}
    except rasterio.errors.RasterioError:
        return {}
