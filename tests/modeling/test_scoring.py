"""Class embeddings and text embeddings -> logits and scores."""

import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ovsam.modeling.scoring import CHUNK, BlendedNaming, Naming, mean_logits
from ovsam.ops.scores import calibrated, instance_scores


def naming(batch=2, instances=5, width=16) -> Naming:
    torch.manual_seed(0)
    embeds = normalize(torch.randn(batch, instances, width), dim=-1)
    return Naming(embeds, torch.rand(batch, instances, 1) * 20, torch.rand(batch, instances, 1) - 0.5)


@pytest.mark.parametrize("count", [1, 7, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("some", [False, True])
def test_the_best_logit_is_the_largest_of_all(count, some):
    names, words = naming(), normalize(torch.randn(count, 16), dim=-1)
    asked = torch.rand(2, count) > 0.3 if some else None
    if some:
        asked[:, 0] = True
    assert_close(names.best_logit(words, asked), names.logits(words, asked).amax(-1))


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple) else (result,):
            self.numel = max(self.numel, one.numel() if isinstance(one, torch.Tensor) else 0)
        return result


def test_memory_of_the_best_does_not_grow_with_the_words():
    names, words = naming(1, 300, 8), torch.randn(21841, 8)
    with LargestTensor() as largest:
        names.best_logit(words)
    assert largest.numel <= 300 * CHUNK < 300 * 21841


def test_another_word_changes_no_logit():
    names, words = naming(), normalize(torch.randn(9, 16), dim=-1)
    assert_close(names.logits(words[:4]), names.logits(words)[..., :4], rtol=0, atol=1e-4)


def test_two_namings_are_averaged():
    one, other, words = naming(), naming(), normalize(torch.randn(3, 16), dim=-1)
    other.shift = other.shift + 1
    expected = (one.logits(words) + other.logits(words)) / 2
    assert_close(mean_logits([one, other], words), expected)


def test_objectness_has_its_share_in_a_score():
    logits, objectness = torch.tensor([0.0, 2.0]), torch.tensor([0.25, 1.0])
    word = logits.sigmoid()
    assert_close(instance_scores(logits, objectness), (word * objectness).sqrt())
    assert_close(instance_scores(logits, objectness, 0.0), word)
    assert_close(instance_scores(logits, objectness, 1.0), objectness)
    assert_close(instance_scores(logits, None), word)


def test_calibration_keeps_order_and_ends_and_is_the_identity_by_default():
    scores = torch.linspace(0, 1, 21)
    assert calibrated(scores, (1.0, 0.0)) is scores
    moved = calibrated(scores, [4.0, 2.0])
    assert moved[0] == 0 and moved[-1] == 1 and (moved.diff() > 0).all()
    assert_close(moved[10], torch.tensor(2.0).sigmoid())  # a logit of zero becomes the shift
    assert_close(calibrated(torch.tensor(3.0).sigmoid(), (0.5, -1.0)), torch.tensor(0.5).sigmoid())


def test_the_adapter_names_trained_words_and_clip_the_others():
    torch.manual_seed(0)
    own, of_clip, words = (normalize(torch.randn(*shape), dim=-1) for shape in ((1, 2, 8), (1, 2, 8), (3, 8)))
    adapter, clip = Naming(own, 10.0, -0.5), Naming(of_clip, 20.0, -0.25)
    blended = BlendedNaming(adapter, clip, frozenset(["red ball"]))
    found = blended.logits(words, labels=["Red_ball", "cat", "dog"])
    first, second = adapter.logits(words), clip.logits(words)
    assert_close(found[..., 0], 0.9 * first[..., 0] + 0.1 * second[..., 0])
    assert_close(found[..., 1:], 0.1 * first[..., 1:] + 0.9 * second[..., 1:])
    alone = blended.logits(words[1:2], labels=["cat"])
    assert_close(alone[..., 0], found[..., 1])  # the other words change nothing
    assert_close(blended.logits(words)[..., 0], 0.1 * first[..., 0] + 0.9 * second[..., 0])  # without class names
    asked = torch.tensor([[True, False, True]])
    assert blended.logits(words, asked)[0, 0, 1] == torch.finfo(torch.float32).min
    assert blended.logits(None) is None and blended.embeds is own
