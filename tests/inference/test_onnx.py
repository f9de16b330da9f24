"""An exported model answers the three questions as the model does, with the same Results, and without torch; its graphs
give the numbers of the model's own parts, for any number of words and prompts.

The export takes most of the time, so that all tests of it are in this file.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import SIZE, WORDS, D, picture, tiny_model, tiny_processor

import ovsam
from ovsam import InputError
from ovsam.checkpoints import onnx_export, onnx_int8
from ovsam.checkpoints.onnx_export import Graph, export_onnx, graphs_of
from ovsam.inference.onnx import OnnxSegmenter
from ovsam.modeling.outputs import SamFeatures
from ovsam_cli import main

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

WIDE = picture(1, width=200, height=90)
ALL = {"threshold": 0.0}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny random model of the composition of ovsam-tiny, and the folder of its export to ONNX, which takes long."""
    more = {"mask_head_weight": 1.0, "proposal_threshold": 0.3, "mask_nms_threshold": 1.0, "max_locations": 50}
    model = tiny_model(composition="clip", vocabulary=["cat", "dog", "moon"], **more)
    model.clip2sam.config.trained_words = ["cat"]
    segmenter = ovsam.Segmenter(model, tiny_processor(), "tiny")
    folder = tmp_path_factory.mktemp("onnx") / "tiny"
    export_onnx(segmenter.model, segmenter.processor, folder, "tiny")
    return segmenter, folder


@pytest.fixture(scope="module")
def segmenter(exported):
    return exported[0]


@pytest.fixture(scope="module")
def folder(exported):
    return exported[1]


@pytest.fixture(scope="module")
def graphs(exported):
    with torch.no_grad():
        return graphs_of(exported[0].model, tiny_processor())


@pytest.fixture(scope="module")
def onnx(folder, segmenter):
    """The exported model on the pixels of the processor: those of Pillow differ by one level here and there."""
    onnx = OnnxSegmenter(folder)
    onnx._pixels = lambda image: segmenter.processor(images=image)["pixel_values"].numpy()
    return onnx


def alike(one, other, at_least=1, within=1e-4):
    """The same instances, in the same order; scores within 1e-4, masks but for single pixels at their edges."""
    assert isinstance(other, ovsam.Results) and other.size == one.size and other.model == one.model
    assert len(one) == len(other) >= at_least
    np.testing.assert_allclose(one.scores, other.scores, atol=within)
    np.testing.assert_allclose(one.mask_scores, other.mask_scores, atol=within)
    for mine, theirs in zip(one, other, strict=True):
        assert (mine.label, mine.source, mine.prompt) == (theirs.label, theirs.source, theirs.prompt)
        assert (mine.objectness is None) == (theirs.objectness is None)
        assert (mine.mask != theirs.mask).mean() < 2e-3
    assert one.presence.keys() == other.presence.keys()


@pytest.mark.parametrize("words", [["cat"], ["dog", "red ball", "cup"], {"cat": "pet", "dog": "pet", "cup": "cup"}])
def test_where(segmenter, onnx, words):
    alike(segmenter.where(WIDE, words, **ALL), onnx.where(WIDE, words, **ALL), 3)


def test_where_with_negative_words(segmenter, onnx):
    asked = {"words": ["dog", "tree"], "negative": ["cup"], "threshold": 0.0}
    one, other = segmenter.where(WIDE, **asked), onnx.where(WIDE, **asked)
    alike(one, other, 0)
    assert one.dropped and [each["negative"] for each in one.dropped] == [each["negative"] for each in other.dropped]


@pytest.mark.parametrize("options", [{}, {"vocabulary": ["tree", "star"], "top_k": 1}, {"exclusive": True}])
def test_everything(segmenter, onnx, options):
    one, other = (
        segmenter.everything(WIDE, objectness=0.4, **options),
        onnx.everything(WIDE, objectness=0.4, **options),
    )
    alike(one, other, 3)
    assert [len(each.topk) for each in one] == [len(each.topk) for each in other]


@pytest.mark.parametrize(
    "prompts",
    [
        {"points": [[60, 40]]},
        {"points": [[60, 40], [150, 60]], "labels": [1, 0]},
        {"boxes": [[10, 20, 60, 80], [70, 5, 190, 50], [1, 1, 9, 9]]},
        {"points": [[60, 40]], "boxes": [[10, 20, 90, 80]]},
        {"boxes": [[i, i, 60 + i, 40 + i] for i in range(11)]},  # more than are decoded at a time
    ],
    ids=["point", "points", "boxes", "point and box", "many"],
)
def test_what(segmenter, onnx, prompts):
    alike(segmenter.what(WIDE, **prompts), onnx.what(WIDE, **prompts))


@pytest.mark.parametrize("more", [{}, {"points": [[60, 40]]}], ids=["alone", "with a point"])
def test_a_mask_is_a_prompt(segmenter, onnx, more):
    mask = np.zeros((1, 90, 200), dtype=bool)
    mask[:, 20:70, 30:120] = True
    alike(segmenter.what(WIDE, masks=mask, **more), onnx.what(WIDE, masks=mask, **more))


def test_a_checkpoint_that_refines_no_boxes(segmenter, onnx, monkeypatch):
    """The decoder still gives the tokens that the adapter reads."""
    monkeypatch.setattr(segmenter.model.config, "refine_boxes", False)
    monkeypatch.setattr(onnx.settings, "refine_boxes", False)
    prompts = {"boxes": [[10, 10, 60, 60]], "vocabulary": ["cat", "dog"]}
    alike(onnx.what(WIDE, **prompts), segmenter.what(WIDE, **prompts))
    alike(onnx.where(WIDE, ["cat"], **ALL), segmenter.where(WIDE, ["cat"], **ALL))


def test_tokens_may_be_left_out(onnx):
    """Where the adapter does not read them and the decoder does not run, they are still an input of the graph."""
    features, words = onnx.encode(WIDE).features, onnx.encode_words(["cat", "dog"])
    masks, regions = np.ones((3, 32, 32), np.float32), np.tile(np.float32([5, 5, 90, 90]), (3, 1))
    found = onnx._name(features, masks, regions, None, words, np.full(2, 0.5, np.float32))
    assert found["logits"].shape == (1, 3, 2)


def test_pixels(folder, segmenter):
    """Pillow resizes images as the processor does, but for one level of 255."""
    own = OnnxSegmenter(folder)
    near = np.abs(own._pixels(WIDE) - segmenter.processor(images=WIDE)["pixel_values"].numpy()) * 0.229
    assert near.max() < 1.1 / 255 and (near > 1e-6).mean() < 0.01
    alike(segmenter.everything(WIDE, objectness=0.4), own.everything(WIDE, objectness=0.4), 3, within=5e-3)


def test_other_options_are_those_of_the_segmenter(segmenter, onnx):
    box = [10, 20, 60, 80]
    alike(segmenter.where(WIDE, exemplars=[box], **ALL), onnx.where(WIDE, exemplars=[box], **ALL))
    asked = {"words": ["cat"], "refine": False, "threshold": 0.0}
    alike(segmenter.where(WIDE, **asked), onnx.where(WIDE, **asked))
    encoded = onnx.encode([WIDE, picture()])
    assert [len(one) for one in onnx.where(encoded, ["cat"], **ALL)] == [
        len(onnx.where(one, ["cat"], **ALL)) for one in (WIDE, picture())
    ]
    with pytest.raises(InputError, match="no proposer 'grid'"):
        onnx.where(WIDE, ["cat"], proposer="grid")
    with pytest.raises(InputError, match="outside the image"):
        onnx.what(WIDE, points=[[500, 1]])
    with pytest.raises(InputError, match="too long"):
        onnx.where(WIDE, ["cat " * 40])


def test_without_torch(folder, segmenter):
    """`import ovsam` and an exported model import neither torch nor transformers."""
    code = f"""
import sys, json, numpy as np, ovsam
model = ovsam.load({str(folder)!r})
image = np.random.default_rng(0).integers(0, 255, (90, 200, 3), dtype=np.uint8)
found = [model.where(image, ["cat"], negative=["dog"], threshold=0.0), model.everything(image, objectness=0.4)]
found += [model.what(image, points=[[60, 40]]), model.what(image, boxes=[[10, 20, 60, 80]], vocabulary=["moon"])]
for results in found:
    results.filter(score=0.1, nms="fast"), results.plot(), results.to_coco()
imported = [name for name in ("torch", "transformers") if name in sys.modules]
print(json.dumps([[len(results) for results in found], imported]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts, imported = json.loads(done.stdout)
    assert imported == [] and min(counts[1:]) >= 1


def test_damaged_folders(folder, tmp_path):
    with pytest.raises(InputError, match="float32"):
        ovsam.load(folder, dtype="bfloat16")
    with pytest.raises(InputError, match="cannot be used by onnxruntime"):
        ovsam.load(folder, device="warp")
    settings = json.loads((folder / "ovsam_onnx.json").read_text())
    (tmp_path / "ovsam_onnx.json").write_text(json.dumps(settings | {"format": 99}))
    with pytest.raises(InputError, match="not of format 1"):
        ovsam.load(tmp_path)
    (tmp_path / "ovsam_onnx.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"lacks tokenizer\.json"):
        ovsam.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match=r"lacks image\.onnx"):
        ovsam.load(tmp_path).what(WIDE, points=[[60, 40]])


@torch.no_grad()
def compare(graph: Graph, path, *given: torch.Tensor):
    """The outputs of the file are those of the module, within 1e-4 of their largest value."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    taken = {one.name for one in session.get_inputs()}
    feed = {name: one.numpy() for name, one in zip(graph.inputs, given, strict=True) if name in taken}
    wanted = graph(*given)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    assert [one.name for one in session.get_outputs()] == list(graph.outputs)
    for name, want, found in zip(graph.outputs, wanted, session.run(None, feed), strict=True):
        want = want.numpy()
        assert want.shape == found.shape and want.size, name
        assert want.size == 1 or np.ptp(want) > 0, f"{name} is the same everywhere, so that equality shows nothing"
        assert np.abs(want.astype(np.float64) - found).max() <= 1e-4 * max(1, np.abs(want).max()), name


def prompts_like(number: int, points: int, masks: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Other prompts than those of the export: points, labels and mask prompts of `masks` cells."""
    torch.manual_seed(3)
    at = torch.rand(1, number, points, 2) * SIZE
    labels = torch.ones(1, number, points, dtype=torch.long)
    if points >= 2:  # half of the prompts are boxes
        at[:, ::2, :2] = torch.tensor([[10.0, 20.0], [90.0, 100.0]])
        labels[:, ::2, :2] = torch.tensor([2, 3])
        labels[:, ::2, 2:] = -10
    return at, labels, torch.randn(1, number, *masks)


@pytest.mark.parametrize("kind", ["image", "text", "locations"])
def test_graphs_of_images_and_words(graphs, folder, kind):
    graph, given = graphs[kind]
    if kind == "image":
        given = (tiny_processor()(images=picture(4))["pixel_values"],)
    elif kind == "text":
        tokens = tiny_processor().tokenize(["cat", "a red ball", "moon", "dog dog dog dog", "cup"])
        given = (tokens["input_ids"], tokens["attention_mask"])
    else:
        given = (*given[:-1], torch.nn.functional.normalize(torch.randn(7, D), dim=-1))
    compare(graph, folder / f"{kind}.onnx", *given)


@pytest.mark.parametrize(("number", "points"), [(1, 1), (2, 3), (9, 2)])
def test_graphs_of_prompts(graphs, folder, number, points):
    at, labels, given = prompts_like(number, points, (32, 32))
    regions = torch.cat([at[:, :, 0] * 0.5, at[:, :, 0] * 0.5 + 40], -1)
    boxes, clicks, masks, names = (graphs[kind][0] for kind in ("boxes", "clicks", "masks", "names"))
    read = {name: one for kind in graphs for name, one in zip(graphs[kind][0].inputs, graphs[kind][1], strict=True)}

    def features(graph):
        return [read[name] for name in graph.read]

    compare(boxes, folder / "boxes.onnx", *features(boxes), regions)
    has = torch.arange(number)[None] % 2 == 0
    compare(clicks, folder / "clicks.onnx", *features(clicks), at, labels.clamp(max=1), given, has)
    prompts = (at, labels, given if number == 2 else torch.randn(1, number, 64, 48))
    compare(masks, folder / "masks.onnx", *features(masks), *prompts)
    with torch.no_grad():
        found, _, tokens = masks(*features(masks), *prompts)
    words, shares = torch.nn.functional.normalize(torch.randn(4, D), dim=-1), torch.rand(4)
    compare(names, folder / "names.onnx", *features(names), found, regions, tokens, words, shares)


def test_a_box_is_two_points():
    """The prompt encoder encodes the corners of a box, labelled 2 and 3, as it encodes the box."""
    model = tiny_model()
    features = model.encode(tiny_processor()(images=picture())["pixel_values"]).sam
    box = torch.tensor([[[20.0, 30.0, 90.0, 70.0]]])
    with torch.no_grad():
        boxed = model.sam.decode(features, input_boxes=box)
        pointed = model.sam.decode(features, box.view(1, 1, 2, 2), torch.tensor([[[2, 3]]]))
    torch.testing.assert_close(boxed.masks, pointed.masks)


def test_masks_count_where_they_are_given():
    """Where the decoder corrects no masks, some prompts have a mask and others none, in one call."""
    model = tiny_model()  # its mask_head_weight is 0
    graph, given = graphs_of(model, tiny_processor())["masks"]
    read = given[: len(graph.read)]
    features = SamFeatures(embedding=read[0], high_res=read[1:3])
    points, labels, masks = prompts_like(2, 3, (32, 32))
    with torch.no_grad():
        found = graph(*read, points, labels, masks, torch.tensor([[True, False]]))[0]
        both = model.sam.select_masks(model.sam.decode(features, points, labels, input_masks=masks), False).masks
        none = model.sam.select_masks(model.sam.decode(features, points, labels), False).masks
    torch.testing.assert_close(found[:, 0], both[:, 0, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, 1], none[:, 1, 0], rtol=1e-4, atol=1e-4)
    assert (both - none).abs().max() > 1e-2


def test_refusals(tmp_path):
    model, processor = tiny_model(sam="sam"), tiny_processor()
    with pytest.raises(InputError, match="The SAM side 'sam' cannot be exported"):
        export_onnx(model, processor, tmp_path / "new")
    processor.clip_images = {"image_processor_type": "CLIPImageProcessor"}
    with pytest.raises(InputError, match="prepares an image twice"):
        export_onnx(model, processor, tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="exists already"):
        export_onnx(model, processor, tmp_path)


def test_the_command_names_its_files(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_export, "write_graph", lambda graph, examples, path: path.write_bytes(b"graph"))
    command = ["export", str(tiny_folder), "-o", str(tmp_path / "new")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert all(f"{kind}.onnx" in out for kind in ("image", "text", "locations", "masks", "names"))
    assert (tmp_path / "new" / "ovsam_onnx.json").is_file() and (tmp_path / "new" / "tokenizer.json").is_file()
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err


def test_int8_text_is_close(folder, tmp_path, monkeypatch):
    """Weights of 8 bits give nearly the embeddings of the float ones, from a smaller file."""
    monkeypatch.setattr(onnx_int8, "TABLE", 1)
    small = tmp_path / "text.onnx"
    small.write_bytes((folder / "text.onnx").read_bytes())
    onnx_int8.quantise(small)
    assert small.stat().st_size < 0.8 * (folder / "text.onnx").stat().st_size
    tokens = tiny_processor().tokenize(list(WORDS))
    feed = {name: value.numpy() for name, value in tokens.items()}
    one, other = (onnxruntime.InferenceSession(file).run(None, feed)[0] for file in (folder / "text.onnx", small))
    assert 0.999 < (one * other).sum(-1).min() < 1 - 1e-9
