"""GeoJSON (RFC 7946): a FeatureCollection for each image, in map coordinates if the image has them."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ovsam.errors import InputError
from ovsam.ops.files import write_text
from ovsam.ops.polygons import fill, parts
from ovsam.results.formats.base import Labelled, LabelledImage, Numbers, Stems, files_below, load_json, visible

PIXELS = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


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
        content = load_json(path)
        facts = content.get("image") if isinstance(content, dict) else None
        if not isinstance(facts, dict) or not {"height", "width"} <= facts.keys():
            raise InputError(f"{path} does not hold the size of its image; only GeoJSON files of ovsam can be read.")
        a, b, c, d, e, f = facts.get("transform") or PIXELS
        inverse = np.linalg.inv([[a, b, c], [d, e, f], [0, 0, 1]])
        image = LabelledImage((int(facts["height"]), int(facts["width"])), facts.get("file_name"))
        for feature in content["features"]:
            geometry, known = feature["geometry"], dict(feature["properties"])
            polygons = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
            rings = [np.array(one, float) @ inverse[:2, :2].T + inverse[:2, 2] for part in polygons for one in part]
            # Rings are connected by bridges without width, so that holes stay open in one filled polygon.
            whole = np.concatenate([part for one in rings for part in (one, rings[0][:1])])
            try:
                segmentation = fill([whole.round(6)], *image.size)
            except InputError as error:
                raise InputError(f"The feature {feature.get('id')} of {path} {error}.") from error
            scores = {key: known[key] for key in ("score", "mask_score") if key in known}
            label = str(known.get("label", "object"))
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
