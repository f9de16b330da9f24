"""Run lengths of masks."""

import numpy as np
import pytest

from ovsam.errors import InputError
from ovsam.ops import rle


def test_an_image_of_more_pixels_than_a_run_can_have_is_one_sentence():
    with pytest.raises(InputError, match="must have under 2\\^32 pixels"):
        rle.encode(np.ones((2, 2), bool), 5, 5, (1_000_000, 10_000))


def test_a_mask_that_does_not_fit_into_memory_is_an_error_and_no_crash():
    with pytest.raises(MemoryError):
        rle.decode({"size": [1_000_000, 1_000_000], "counts": "QTQm11oa`n01O1nUaaUZ3"})
