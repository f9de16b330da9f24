"""Every kind of wrong argument is one sentence, and every habit of writing a right one is understood."""

import math

import numpy as np
import pytest
import torch

from ovsam.errors import InputError
from ovsam.processing import arguments


@pytest.mark.parametrize(
    "given", [[3, 4], (3, 4), [[3, 4]], np.array([3, 4]), torch.tensor([[3.0, 4.0]]), [np.array([3, 4])]]
)
def test_one_point_is_a_list_of_one(given):
    assert arguments.points(given) == [[3.0, 4.0]]


@pytest.mark.parametrize(
    "given",
    [
        5,
        "3,4",
        [3],
        [3, 4, 5],
        [[3, "4"]],
        [[3, math.nan]],
        [[3, math.inf]],
        [[True, False]],
        [[[3, 4]]],
        {},
        [10**400, 1],
    ],
)
def test_invalid_points(given):
    with pytest.raises(InputError, match=r"The points .*\[x, y\] in pixels"):
        arguments.points(given)


@pytest.mark.parametrize("given", [[1, 2], [0.5], [-1], "1", [[1]], [math.nan], [True], [1, 1]])
def test_invalid_labels_of_a_point(given):
    with pytest.raises(InputError, match="labels"):
        arguments.point_labels(given, 1)
    assert arguments.point_labels(1, 1) == arguments.point_labels(None, 1) == [1]


@pytest.mark.parametrize("value", ["0.5", math.nan, -0.1, 1.1, True, None, [0.5], 10**400])
def test_invalid_fractions(value):
    with pytest.raises(InputError, match="The threshold is .*; it must be between 0 and 1"):
        arguments.number("threshold", value, 0, 1)
    assert arguments.number("threshold", np.float32(0.5), 0, 1) == 0.5


def test_masks_are_bool_or_logits():
    ones = np.ones((4, 6), np.uint8)
    for given in (ones, ones * 255, ones[None].astype(bool), torch.ones(1, 4, 6, dtype=torch.bool)):
        masks = arguments.masks(given, (4, 6))
        assert masks.dtype == bool and masks.shape == (1, 4, 6) and masks.all()
    assert arguments.masks(torch.full((1, 4, 6), -3.0)).dtype == np.float32
    for wrong, message in (
        (ones * 7, "integers other than 0 and 1"),
        (np.full((4, 6), 0.5), "floats from 0 to 1"),
        (np.full((4, 6), np.nan), "NaN"),
        (np.zeros((0, 4, 6), bool), "must be"),
        (np.array(["a"]), "must be"),
        (5, "must be"),
        ([[1, 2], [3]], "must be an array"),
    ):
        with pytest.raises(InputError, match=message):
            arguments.masks(wrong)
    with pytest.raises(InputError, match="6x4 pixels and the image is 4x6"):
        arguments.masks(ones, (6, 4))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("conf", "did you mean 'threshold'"), ("treshold", "did you mean 'threshold'"), ("zz", "it takes words")],
)
def test_an_unknown_keyword_names_the_one_that_was_meant(name, hint):
    with pytest.raises(InputError, match=f"where takes no argument '{name}'; {hint}"):
        arguments.no_others("where", {name: 1}, ["words", "threshold"])


def test_prompts_of_images_without_any():
    nested = arguments.prompts("input_points", [None, [[[1, 2]]], []], 3, 2, "[image][prompt][point][x, y]")
    assert nested == [[], [[[1.0, 2.0]]], []]
    for wrong in (5, [[[1, 2, 3]]], [[[["a", 1]]]], [[None]], "text"):
        with pytest.raises(InputError, match="input_points hold"):
            arguments.prompts("input_points", wrong, 3, 2, "[image][prompt][point][x, y]")


def test_a_value_of_any_kind_can_be_shown():
    class Odd:
        def __repr__(self):
            raise RuntimeError

    assert arguments.short(Odd()) == "a Odd" and len(arguments.short("x" * 1000)) <= 80
