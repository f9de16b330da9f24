"""The few calls whose names differ between numpy arrays and torch tensors, for functions that take either.

Most names agree (`amax`, `where`, `minimum`, `einsum`), in the namespace that made the array. torch is imported only
where a tensor is given, so that results are read and filtered without it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or torch.Tensor


def namespace(array: Array) -> Any:
    """The module that made the array: numpy or torch."""
    if isinstance(array, np.ndarray | np.generic):
        return np
    import torch

    return torch


def floats(array: Array) -> Array:
    """In float32."""
    return array.astype(np.float32) if namespace(array) is np else array.float()


def is_bool(array: Array) -> bool:
    return str(array.dtype).removeprefix("torch.") == "bool"


def integers(array: Array) -> Array:
    """In int64, rounded towards zero."""
    return array.astype(np.int64) if namespace(array) is np else array.long()


def like(array: Array, values: Any, dtype: Any = None) -> Array:
    """`values` as an array of the same kind, on the same device."""
    if namespace(array) is np:
        return np.asarray(values, dtype=dtype)
    import torch

    dtype = None if dtype is None else getattr(torch, np.dtype(dtype).name)
    return torch.as_tensor(values, dtype=dtype, device=array.device)


def count(array: Array, start: int, stop: int) -> Array:
    """The whole numbers from start to stop, on the device of the array."""
    return (
        np.arange(start, stop) if namespace(array) is np else namespace(array).arange(start, stop, device=array.device)
    )


def full(array: Array, shape: Sequence[int], value: bool | int | float) -> Array:
    """A new array of one value, on the device of the array."""
    xp = namespace(array)
    return np.full(shape, value) if xp is np else xp.full(tuple(shape), value, device=array.device)


def sigmoid(array: Array) -> Array:
    if namespace(array) is np:
        from scipy.special import expit

        return expit(array)
    return array.sigmoid()


def logit(array: Array) -> Array:
    if namespace(array) is np:
        from scipy.special import logit as inverse

        return inverse(array)
    return array.logit()


def descending(scores: Array) -> Array:
    """Indices [n] that sort scores [n], the highest first; ties keep their order."""
    if namespace(scores) is np:
        return np.argsort(-scores, kind="stable")
    return scores.argsort(descending=True, stable=True)


def along(array: Array, index: Array, axis: int) -> Array:
    """Values at an index along one axis, as numpy's take_along_axis."""
    if namespace(array) is np:
        return np.take_along_axis(array, index, axis)
    return array.take_along_dim(index, axis)


def highest(scores: Array, number: int) -> tuple[Array, Array]:
    """The highest scores of each row [n, K], in order, and their indices, both [n, number]."""
    if namespace(scores) is not np:
        return scores.topk(number, dim=1)
    first = scores.shape[1] - number
    index = np.argpartition(scores, min(first, scores.shape[1] - 1), axis=1)[:, first:]
    order = np.argsort(-np.take_along_axis(scores, index, 1), axis=1, kind="stable")
    index = np.take_along_axis(index, order, 1)
    return np.take_along_axis(scores, index, 1), index


def highest_by(scores: Array, index: Array, number: int) -> Array:
    """The highest of the scores [n, K] with the same index [K] in 0 .. number - 1 -> [n, number]; zero for none."""
    if namespace(scores) is not np:
        return scores.new_zeros(len(scores), number).scatter_reduce(1, index.expand_as(scores), scores, "amax")
    found = np.zeros((len(scores), number), scores.dtype)
    np.maximum.at(found, (slice(None), index), scores)
    return found


def to_numpy(array: Array) -> np.ndarray:
    return array if namespace(array) is np else array.detach().cpu().numpy()
