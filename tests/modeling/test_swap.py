"""Every SAM with every CLIP in every composition, out of folders as their authors publish them: it builds, answers the
three questions, survives a file, and takes only adapters that fit."""

import functools
import itertools
import re

import pytest
import torch
from common import CHANNELS, GRID, WORDS, C, D, picture, randomise

import ovsam
from ovsam.checkpoints.compose import compose
from ovsam.modeling.check_parts import check_fit

pytestmark = pytest.mark.slow

SAMS = ("sam2", "edgetam", "sam")
CLIPS = ("convnext", "resnet", "clip", "siglip", "owlv2")
HEAD = {"width": 16, "mask_width": 12}


def adapter(folder, config):
    """A random adapter, saved; its scores of objects and words spread over (0, 1)."""
    torch.manual_seed(3)
    kind = {"ovsam_sam2clip": ovsam.Sam2ClipAdapter, "ovsam_sam2clip_vit": ovsam.Sam2ClipVitAdapter}
    kind |= {"ovsam_clip2sam": ovsam.Clip2SamAdapter, "ovsam_concepts": ovsam.ConceptHead}
    model = randomise(kind[config.model_type](config))
    if config.model_type == "ovsam_concepts":
        model.objectness.bias.data.zero_()
        model.scale_shift.bias.data.copy_(torch.tensor([8.0, 0.0]))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, sam_folder, clip_folder):
    """Name -> folder: three SAMs, five CLIPs, and adapters for every CLIP's maps and for SAM's own."""
    once = pytest.MonkeyPatch()  # weights of parts do not change, so each is read once instead of nine times
    for name in ("load_sam", "load_clip"):
        once.setattr(ovsam.checkpoints.compose, name, functools.cache(getattr(ovsam.checkpoints.compose, name)))
    folder = tmp_path_factory.mktemp("parts")
    found = {kind: sam_folder(kind) for kind in SAMS} | {kind: clip_folder(kind) for kind in CLIPS}
    for kind in (*CLIPS, "pyramid"):
        channels = CHANNELS.get(kind, [C] * 4)
        stand_in = ovsam.Sam2ClipConfig(in_channels=channels, width=C, num_layers=1, num_heads=4)
        vit = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "global_blocks": [0], "grid": GRID, "width": C}
        configs = {
            "sam2clip": stand_in,
            "sam2clip_vit": ovsam.Sam2ClipVitConfig(in_channels=channels, **vit),
            "clip2sam": ovsam.Clip2SamConfig(in_channels=channels, embed_dim=D, width=16, token_dim=C),
            "concepts": ovsam.ConceptHeadConfig(in_channels=channels, embed_dim=D, **HEAD),
        }
        for name, config in configs.items():
            found[f"{name}-{kind}"] = adapter(folder / f"{name}-{kind}", config)
    yield found
    once.undo()


def chosen(parts, composition, sam, clip):
    """Nothing trained in `dual`; the adapters that each of the others needs or can have."""
    which = {"sam": parts[sam], "clip": parts[clip], "composition": composition}
    if composition == "clip":
        # SAM 1's decoder reads one map, SAM 2's three.
        which["sam2clip"] = parts[f"{'sam2clip_vit' if sam == 'sam' else 'sam2clip'}-{clip}"]
    elif composition == "sam":
        which |= {name: parts[f"{name}-pyramid"] for name in ("clip2sam", "concepts")}
    return which


def aligned(segmenter):
    """Weights out of mapped files lie anywhere; sums over them differ in the last bit from those of others."""
    for tensor in (*segmenter.model.parameters(), *segmenter.model.buffers()):
        tensor.data = tensor.data.clone()
    return segmenter


def arrays(results):
    return [(one.label, one.score, one.mask_score, one.segmentation) for one in results]


COMPOSITIONS = ("dual", "clip", "sam")
TRIPLES = list(itertools.product(SAMS, CLIPS, COMPOSITIONS))
# Each SAM with each composition, each CLIP in at least one of them: the rest is for the whole suite.
QUICK = [(SAMS[i % 3], CLIPS[i % 5], COMPOSITIONS[(i + i // 3) % 3]) for i in range(9)]


@pytest.mark.parametrize(
    "sam, clip, composition",
    [pytest.param(*triple, marks=[] if triple in QUICK else pytest.mark.slow) for triple in TRIPLES],
)
def test_every_pair(parts, sam, clip, composition, tmp_path):
    model, processor = compose(**chosen(parts, composition, sam, clip), vocabulary=list(WORDS), score_threshold=0.0)
    segmenter = aligned(ovsam.Segmenter(model, processor))
    image = segmenter.encode(picture(4, width=96, height=60))

    def ask(segmenter):
        return {
            "click": segmenter.what(image, points=[[40, 30]]),
            "box": segmenter.what(image, boxes=[[10, 5, 70, 50], [0, 0, 20, 20]]),
            "where": segmenter.where(image, ["cat", "red ball"], threshold=0.0),
            "everything": segmenter.everything(image, objectness=0.0),
        }

    answers = ask(segmenter)
    assert len(answers["click"]) == 1 and len(answers["box"]) == 2
    assert len(answers["where"]) and len(answers["everything"])
    assert {one.label for one in answers["where"]} <= {"cat", "red ball"}
    assert {one.label for results in answers.values() for one in results} <= set(WORDS)

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = aligned(ovsam.load(tmp_path, "cpu"))
    image = again.encode(image.image)
    for question, results in ask(again).items():
        assert arrays(results) == arrays(answers[question]), question

    # Somebody else's adapter fits where its numbers do; else they are named (test_compose.py: when a model is built).
    other = CLIPS[CLIPS.index(clip) - 1]
    expected = [C] * 4 if composition == "sam" else CHANNELS[clip]
    with torch.device("meta"):
        model.clip2sam = ovsam.Clip2SamAdapter(ovsam.Clip2SamConfig(in_channels=CHANNELS[other], embed_dim=D, width=8))
    if expected == CHANNELS[other]:
        check_fit(model)
        return
    numbers = ", ".join(map(str, CHANNELS[other])), ", ".join(map(str, expected))
    with pytest.raises(ovsam.InputError, match=".*".join(map(re.escape, numbers))):
        check_fit(model)
