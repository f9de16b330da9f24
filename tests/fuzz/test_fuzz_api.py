"""Arguments of the public API, on a tiny random model with an image that is encoded once."""

import inspect

import numpy as np
import pytest
import torch
from common import picture, tiny_model, tiny_processor
from fuzz.harness import counted, examples, look_at
from fuzz.mutations import NAN, values
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import ovsam
from ovsam.results.results import Results

BOX = [30, 30, 100, 80]
pytestmark = pytest.mark.slow  # a minute

WHERE = ["words", "negative", "threshold", "exemplars", "refine", "nms", "per_word", "rescore", "exclusive", "top_k"]
WHERE += ["mask_threshold", "conf", "zz"]
WHAT = ["points", "labels", "boxes", "masks", "vocabulary", "top_k", "mask_threshold", "conf"]
EVERYTHING = ["vocabulary", "threshold", "objectness", "refine", "nms", "top_k", "mask_threshold", "zz"]
GOOD = [["cat"], "cat, dog", 0.5, [BOX], BOX, [50, 50], [[50, 50], [60, 60]], [1], 1, 0, True, "fast", 5]
ARRAYS = [
    np.array([BOX]),
    torch.tensor([BOX]),
    np.zeros((1, 128, 128), bool),
    np.ones((2, 9, 9)),
    np.array(NAN),
    np.array([]),
]
ARRAYS += [
    b"x",
    {1},
    object(),
    lambda x: x,
    np.full((1, 128, 128), NAN, np.float32),
    np.ones((128, 128), np.uint8),
    (1, 2),
    range(3),
]
things = values | st.sampled_from(GOOD) | st.sampled_from(ARRAYS)


@pytest.fixture(scope="module")
def segmenter():
    return ovsam.Segmenter(tiny_model(), tiny_processor())


@pytest.fixture(scope="module")
def image(segmenter):
    return segmenter.encode(picture(1))


def options(names):
    return st.dictionaries(st.sampled_from(names), things, min_size=1, max_size=3)


@given(options(WHERE))
@examples(900)
def test_where(segmenter, image, given):
    with counted("where"):
        look_at(segmenter.where(image, **{"words": ["cat"]} | given))


@given(options(WHAT), st.booleans())
@examples(900)
def test_what(segmenter, image, given, boxed):
    with counted("what"):
        look_at(segmenter.what(image, **({"boxes": BOX} if boxed else {}) | {"vocabulary": ["cat"]} | given))


@given(options(EVERYTHING))
@examples(250)
def test_everything(segmenter, image, given):
    with counted("everything"):
        look_at(segmenter.everything(image, **{"vocabulary": ["cat"]} | given))


@given(things)
@examples(400)
def test_images(segmenter, image):
    with counted("image"):
        segmenter.encode(image)


@given(
    st.dictionaries(
        st.sampled_from(["text", "negative_text", "input_points", "input_labels", "input_boxes"]), things, min_size=1
    )
)
@examples(600)
def test_processor(segmenter, given):
    with counted("processor"):
        segmenter.processor(images=picture(1), **given)


@given(st.dictionaries(st.sampled_from(["score", "min_area", "labels", "max_area"]), things, max_size=2), things)
@examples(1000)
def test_filters(given, label):
    mask = np.zeros((1, 32, 48), bool)
    mask[0, 4:20, 6:30] = True
    results = Results.from_arrays(mask, ["cup"], [0], [0.5], [0.6], ["cup"], "text", file_name="a.png")
    known = {key: value for key, value in given.items() if key in ("score", "min_area", "labels")}
    with counted("results"):
        look_at(results.filter(**known))


@given(things, things, things)
@examples(800)
def test_results_of_arrays(masks, labels, scores):
    with counted("results"):
        look_at(Results.from_arrays(masks, labels, [0], scores, [0.6], ["cup"], "text"))


CALLS = {  # a method of Results -> its arguments
    "overlay": ["zoom"],
    "to_coco": ["image_id", "labels"],
    "to_yolo": ["labels", "tolerance"],
    "to_labelme": ["shape", "tolerance"],
    "to_label_studio": ["shape", "image_url"],
    "to_geojson": ["transform", "crs", "tolerance"],
    "to_panoptic": ["label_ids_to_fuse", "overlap_mask_area_threshold"],
}


@given(st.sampled_from(sorted(CALLS)).flatmap(lambda name: st.tuples(st.just(name), options(CALLS[name]))))
@examples(800)
def test_methods_of_results(call):
    name, given = call
    mask = np.zeros((1, 32, 48), bool)
    mask[0, 4:20, 6:30] = True
    results = Results.from_arrays(mask, ["cup"], [0], [0.5], [0.6], ["cup"], "text", file_name="a.png")
    given |= {"image": Image.new("RGB", (48, 32))} if name == "overlay" else {}
    with counted("results"):
        getattr(results, name)(**given)


@pytest.fixture(scope="module")
def outputs(segmenter):
    with torch.no_grad():
        return segmenter.model(**segmenter.processor(images=picture(1), text=["cat", "dog"]))


POST = ["threshold", "mask_threshold", "target_sizes", "text_labels", "nms"]


@given(
    st.sampled_from(["instance", "semantic", "panoptic"]),
    options([*POST, "top_k", "exclusive", "label_ids_to_fuse", "return_scores"]),
)
@examples(500)
def test_post_processing(segmenter, outputs, kind, given):
    call = getattr(segmenter.processor, f"post_process_{kind}_segmentation")
    known = inspect.signature(call).parameters
    with counted("post-processing"):
        call(outputs, **{name: value for name, value in given.items() if name in known})


@given(options(["points", "labels", "box", "mask", "frame", "id", "name"]), st.booleans())
@examples(500)
def test_prompts_of_videos(given, boxed):
    with counted("videos"):
        ovsam.Prompt(**({"box": BOX} if boxed else {}) | given).checked()


SESSION = ["frame_idx", "obj_ids", "input_points", "input_labels", "input_boxes", "input_masks", "original_size"]


@given(options(SESSION))
@examples(400)
def test_sessions(segmenter, given):
    processor, good = segmenter.processor, {"frame_idx": 0, "obj_ids": 1, "input_boxes": [[BOX]]}
    with counted("videos"):
        processor.add_inputs_to_inference_session(processor.init_video_session([picture(1)]), **good | given)


ASKED = ["text", "candidate_labels", "negative_text", "input_points", "input_boxes", "vocabulary", "everything"]
ASKED += ["threshold", "mask_threshold", "top_k", "batch_size", "words"]


@given(options(ASKED))
@examples(150)
def test_pipeline(segmenter, given):
    pipe = ovsam.OpenVocabularySegmentationPipeline(model=segmenter.model, processor=segmenter.processor)
    with counted("pipeline"):
        found = pipe(picture(1), **given)
        assert all(0 <= one["score"] <= 1 for one in found)
