"""Moving scenes: a function of their seed, with events that the frozen ones are named after."""

import numpy as np
import pytest

from ovsam.data.coco import Coco
from ovsam.data.scenes.moving import MovingConfig, MovingScene, Pieces
from ovsam.errors import InputError
from tests.common import ROOT

PHOTOS = ROOT / "tests" / "data" / "photos-val"


@pytest.fixture(scope="module")
def pieces():
    return Pieces(Coco(PHOTOS / "annotations.json", PHOTOS / "images"))


def masks_of(scene: MovingScene) -> np.ndarray:
    """Masks of every fourth frame, [frames, objects, H, W] bool."""
    numbers = np.arange(1, len(scene.words) + 1)[:, None, None]
    return np.stack([scene.draw(frame)[1] == numbers for frame in range(0, len(scene), 4)])


def test_a_scene_depends_only_on_its_seed_and_number(pieces):
    one, again, other = (MovingScene(pieces, 3, number) for number in (1, 1, 2))
    for frame in (0, 30):
        for drawn, same in zip(one.draw(frame), again.draw(frame), strict=True):
            assert np.array_equal(np.asarray(drawn), np.asarray(same))
    assert not np.array_equal(np.asarray(one.draw(0)[0]), np.asarray(other.draw(0)[0]))
    assert one.words == again.words and not {*one.words} & {*one.absent} and len(one.absent) == 3


def test_objects_move_and_are_visible_on_the_first_frame(pieces):
    for number in range(3):
        masks = masks_of(MovingScene(pieces, 7, number))
        assert len(masks) == 15 and 3 <= masks.shape[1] <= 5
        assert (masks[0].sum((1, 2)) > 200).all()
        for each in masks.swapaxes(0, 1):  # a mask that stays where it was would not do
            moved = [(each[0] & mask).sum() / (each[0] | mask).sum() for mask in each[3:]]
            assert np.mean(moved) < 0.7


def test_look_alikes_cross(pieces):
    config = MovingConfig(look_alikes=1.0, leaving=0.0)
    for number in range(3):
        scene = MovingScene(pieces, 11, number, config)
        assert scene.words[0] == scene.words[1]
        masks = masks_of(scene)[:, :2]
        middle = [[np.nonzero(mask)[1].mean() if mask.any() else np.nan for mask in both] for both in masks]
        left = np.array([one < two for one, two in middle if not np.isnan([one, two]).any()])
        assert left[0] and not left[-1]


def test_an_object_leaves_and_enters_again(pieces):
    config = MovingConfig(look_alikes=0.0, leaving=1.0)
    for number in range(3):
        scene = MovingScene(pieces, 13, number, config)
        shown = masks_of(scene)[:, -1].any((1, 2))
        away = np.flatnonzero(~shown)
        assert len(away) >= 2 and shown[0] and shown[away[-1] + 1 :].any()


def test_the_background_shows_no_word_of_the_scene(pieces):
    rng = np.random.default_rng(0)
    words = [pieces.data.words[next(iter(pieces.by_word))].name]
    everything = [word.name for word in pieces.data.words]
    assert min(pieces.background(rng, words, 300).size) >= 300
    assert min(pieces.background(rng, everything, 300).size) >= 300  # no photograph is left: a pattern


def test_data_without_an_object_to_cut_out_raise_an_error():
    with pytest.raises(InputError, match="no object to cut out"):
        Pieces(Coco(PHOTOS / "annotations.json", PHOTOS / "images"), min_area=10**6)
