"""Panoptic segments from instances."""

from collections.abc import Collection, Sequence
from typing import Any


def segments_of(
    label_ids: Sequence[int],
    labels: Sequence[str | None],
    scores: Sequence[float],
    kept: Sequence[bool],
    label_ids_to_fuse: Collection[int] | None = None,
) -> tuple[list[int], list[dict[str, Any]]]:
    """Number n instances as panoptic segments.

    Returns:
        the segment id of each instance, from 1 on, 0 for removed instances; and the segments.
    """
    ids, segments = [], []
    fused: dict[int, dict[str, Any]] = {}
    for label_id, label, score, keep in zip(label_ids, labels, scores, kept, strict=True):
        if not keep:
            ids.append(0)
            continue
        fuse = label_id in (label_ids_to_fuse or ())
        segment = fused.get(label_id) if fuse else None
        if segment is None:
            segment = {"id": len(segments) + 1, "label_id": label_id, "label": label, "was_fused": fuse, "score": score}
            segments.append(segment)
            if fuse:
                fused[label_id] = segment
        segment["score"] = max(segment["score"], score)
        ids.append(segment["id"])
    return ids, segments
