"""Run lengths of masks."""

import numpy as np
import pytest

from ovsam.errors import InputError
from ovsam.ops import rle


def test_an_image_of_more_pixels_than_a_run_can_have_is_one_sentence():
    with pytest.raises(InputError, match="must have under 2\\^32 pixels"):
        rle.encode(np.ones((2, 2), bool), 5, 5, (1_000_000, 10_000))
