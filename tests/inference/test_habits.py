"""What users of transformers are used to, one row a habit: it works, or it is an InputError."""

import copy
import pickle
import threading

import accelerate
import numpy as np
import pytest
import torch
from common import SIZE, picture, tiny_processor
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoProcessor, SamImageProcessor, pipeline
from web import serve

import ovsam
from ovsam.errors import InputError

IMAGE, OTHER = picture(1, width=200, height=90), picture(2)
WORDS = ["cat", "dog"]
BOX = [30, 30, 100, 80]


def ask(model, **more):
    with torch.no_grad():
        return model(**tiny_processor()(images=IMAGE, text=WORDS, **more))


def load(folder, **how):
    return AutoModel.from_pretrained(folder, **how).eval()


def alike(found, expected, atol=1e-5):
    torch.testing.assert_close(found.scores.float(), expected.scores.float(), rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------- loading and models


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16", "auto"])
def test_a_dtype(tiny_folder, dtype):
    model = load(tiny_folder, dtype=dtype)
    found = ask(model, input_boxes=[[BOX]])
    assert found.pred_masks.isfinite().all() and found.pred_masks.dtype == model.dtype
    words = ask(model)
    assert words.scores.isfinite().all() and 0 <= words.scores.min() and words.scores.max() <= 1


def in_place(change):
    def habit(folder):
        model = load(folder)
        change(model)
        return model

    return habit


def under_a_default_device(folder):
    torch.set_default_device("cpu")
    try:
        return load(folder)
    finally:
        torch.set_default_device(None)


HABITS = {  # name -> folder of a model -> a model that answers as the plain one does
    "attn_implementation eager": lambda folder: load(folder, attn_implementation="eager"),
    "attn_implementation sdpa": lambda folder: load(folder, attn_implementation="sdpa"),
    "device_map auto": lambda folder: load(folder, device_map="auto"),
    "device_map cpu": lambda folder: load(folder, device_map="cpu"),
    "low_cpu_mem_usage": lambda folder: load(folder, low_cpu_mem_usage=True),
    "set_default_device": under_a_default_device,
    "deepcopy": lambda folder: copy.deepcopy(load(folder)),
    "pickle": lambda folder: pickle.loads(pickle.dumps(load(folder))),
    "gradient_checkpointing_enable": in_place(lambda model: model.gradient_checkpointing_enable()),
    "half and float again": in_place(lambda model: model.to(torch.float64).to(torch.float32)),
    "channels_last": in_place(lambda model: model.to(memory_format=torch.channels_last)),
    "requires_grad_": in_place(lambda model: model.requires_grad_(False)),
    "float()": in_place(lambda model: model.float()),
}


@pytest.mark.slow
@pytest.mark.parametrize("question", [{"input_boxes": [[BOX]]}, {}], ids=["boxes", "words"])
def test_a_compiled_model_answers_as_the_plain_one(question, tiny_folder):
    """The whole call. The only data that shapes depend on is the number of proposals; the mask decoder is one graph."""
    model = load(tiny_folder)
    plain = ask(model, **question)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = ask(torch.compile(model, backend="eager"), **question)
    torch.testing.assert_close(found.pred_masks, plain.pred_masks, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.logits, plain.logits, rtol=0, atol=1e-4)
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert all("modeling/sam" not in reason and "decode" not in reason for reason in breaks), breaks
    assert len(breaks) <= (0 if question else 1), breaks
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def expected(tiny_folder):
    return ask(load(tiny_folder))


@pytest.mark.parametrize("habit", HABITS)
def test_a_model_answers_as_the_plain_one(habit, tiny_folder, expected):
    model = HABITS[habit](tiny_folder)
    alike(ask(model.eval()), expected, atol=1e-4)


def test_half_precision_by_a_method(tiny_folder):
    for model in (load(tiny_folder).half(), load(tiny_folder).bfloat16()):
        assert ask(model).scores.isfinite().all() and ask(model, input_boxes=[[BOX]]).logits.isfinite().all()


def test_the_labels_of_the_vocabulary_are_in_id2label(tiny_folder):
    model = load(tiny_folder)
    words = model.config.vocabulary
    assert not words or list(model.config.id2label.values()) == list(words)


OFFLOADED = {
    "cpu_offload": lambda folder, _: accelerate.cpu_offload(load(folder), "cpu"),
    "disk_offload": lambda folder, disk: accelerate.disk_offload(load(folder), disk, "cpu"),
    "device_map auto": lambda folder, disk: load(
        folder, device_map="auto", max_memory={"cpu": "400kB"}, offload_folder=disk
    ),
}


@pytest.mark.parametrize("way", OFFLOADED)
def test_offloaded_weights_are_refused(way, tiny_folder, tmp_path):
    with pytest.raises(InputError, match="Weights of the model are offloaded"):
        ask(OFFLOADED[way](tiny_folder, tmp_path / "weights"))


def test_a_model_offloaded_as_a_whole_answers_as_the_plain_one(tiny_folder, expected):
    model = accelerate.cpu_offload(load(tiny_folder), "cpu", preload_module_classes=["OVSamModel"])
    alike(ask(model), expected)
    assert next(model.parameters()).is_meta


def test_two_threads_share_a_model(tiny_folder):
    segmenter, found = ovsam.load(tiny_folder, device="cpu"), {}
    images = [picture(seed) for seed in range(4)]
    alone = [segmenter.where(image, [WORDS[i % 2]]).scores for i, image in enumerate(images)]

    def work(i):
        found[i] = [segmenter.where(images[i], [WORDS[i % 2]]).scores for _ in range(2)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, scores in enumerate(alone):
        for again in found[i]:
            np.testing.assert_allclose(again, scores, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- processor


class Images(torch.utils.data.Dataset):
    def __init__(self, processor):
        self.processor = processor

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.processor(images=picture(index))["pixel_values"][0]


def test_a_processor_in_the_workers_of_a_data_loader(tiny_folder):
    processor = AutoProcessor.from_pretrained(tiny_folder)
    for copied in (processor, copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        torch.testing.assert_close(Images(copied)[1], Images(processor)[1])
    (batch,) = DataLoader(Images(processor), batch_size=4, num_workers=2, multiprocessing_context="fork")
    torch.testing.assert_close(batch[2], Images(processor)[2])


def test_images_of_all_kinds_are_one_image(tiny_folder):
    processor = AutoProcessor.from_pretrained(tiny_folder)
    pixels = np.array(IMAGE)
    given = [IMAGE, pixels, torch.from_numpy(pixels).permute(2, 0, 1), pixels.astype(np.float32) / 255]
    first, *others = (processor(images=one)["pixel_values"] for one in given)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0.02)


# ----------------------------------------------------------------------------------------------------- pipeline


@pytest.fixture(scope="module")
def segment(tiny_folder):
    return pipeline(ovsam.TASK, model=str(tiny_folder), device="cpu")


def scores(found):
    return [(one["label"], round(one["score"], 4)) for one in found]


def test_candidate_labels_and_dictionaries(segment):
    first = segment(IMAGE, text=WORDS)
    assert first and [one["score"] for one in first] == sorted((one["score"] for one in first), reverse=True)
    for other in (
        segment(IMAGE, WORDS),
        segment(IMAGE, candidate_labels=WORDS),
        segment({"image": IMAGE, "candidate_labels": WORDS}),
        segment(image=IMAGE, candidate_labels=WORDS),
        segment([{"image": IMAGE, "candidate_labels": WORDS}])[0],
    ):
        assert scores(other) == scores(first)


@pytest.mark.parametrize("size", [None, 1, 2, 3])
def test_lists_generators_and_batches(segment, size):
    images, one_by_one = [IMAGE, OTHER, picture(3)], [segment(one, WORDS) for one in (IMAGE, OTHER, picture(3))]
    for given in (images, tuple(images), iter(images)):
        found = list(segment(given, WORDS, batch_size=size))
        assert [[label for label, _ in scores(one)] for one in found] == [[x for x, _ in scores(y)] for y in one_by_one]
        for one, other in zip(found, one_by_one, strict=True):
            np.testing.assert_allclose([x["score"] for x in one], [x["score"] for x in other], atol=1e-4)
    assert segment([], WORDS) == []


def test_addresses(segment, tmp_path):
    IMAGE.save(tmp_path / "a.png")
    with serve(tmp_path) as (address, _):
        assert scores(segment(f"{address}/a.png", WORDS)) == scores(segment(IMAGE, WORDS))


def test_limits(segment):
    found = segment(IMAGE, WORDS, threshold=0.2)
    assert all(one["score"] >= 0.2 for one in found)
    assert scores(segment(IMAGE, WORDS, threshold=0.2, top_k=2)) == scores(found)[:2]
    assert scores(segment([IMAGE], WORDS, threshold=0.2, top_k=1)[0]) == scores(found)[:1]


def test_everything_with_a_vocabulary(segment):
    named = segment(IMAGE, vocabulary=WORDS)
    assert named and {one["label"] for one in named} <= set(WORDS)
    assert scores(segment(IMAGE, everything=True, vocabulary=WORDS)) == scores(named)
    assert len(segment([IMAGE, OTHER], vocabulary=WORDS, batch_size=2, top_k=3)) == 2
    (box,) = segment(IMAGE, vocabulary=WORDS, input_boxes=[[BOX]])
    assert scores([box]) == scores(segment(IMAGE, text=WORDS, input_boxes=[[BOX]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pipeline_of_another_dtype(tiny_folder, dtype):
    half = pipeline(ovsam.TASK, model=str(tiny_folder), device="cpu", dtype=dtype)
    for found in (half([IMAGE, OTHER], WORDS, batch_size=2), half([IMAGE], vocabulary=WORDS)):
        assert all(np.isfinite(one["score"]) for each in found for one in each)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidate_labels": WORDS, "text": WORDS}, "given twice"),
        ({"text": WORDS, "vocabulary": WORDS, "input_boxes": [[BOX]]}, "given twice"),
        ({"text": WORDS, "everything": True}, "takes a vocabulary, no text"),
        ({"negative_text": WORDS, "everything": True}, "takes a vocabulary, no text"),
        ({"text": {"a cat": ["cat"]}}, "both strings"),
        ({"text": WORDS, "threshold": float("nan")}, "The threshold is nan"),
        ({"text": WORDS, "top_k": 0}, "The top_k is 0"),
        ({"text": WORDS, "batch_size": -1}, "The batch_size is -1"),
        ({"text": []}, "empty|at least one"),
        ({"text": 5}, "5"),
        ({"text": WORDS, "conf": 0.5}, "did you mean 'threshold'"),
        ({"text": WORDS, "batch_size": 0}, "The batch_size is 0"),
    ],
)
def test_what_cannot_work_is_one_sentence(segment, options, message):
    with pytest.raises(InputError, match=message):
        segment(IMAGE, **options)


SAM_HABITS = {  # levels of nesting, of SAM and SAM 2 -> those that are meant
    "points of SAM": ({"input_points": [[[50, 50]]], "input_labels": [[1]]}, {"input_points": [[[[50, 50]]]]}),
    "points alone": ({"input_points": [[50, 50], [60, 60]]}, {"input_points": [[[[50, 50], [60, 60]]]]}),
    "one point": ({"input_points": [50, 50], "input_labels": 1}, {"input_points": [[[[50, 50]]]]}),
    "boxes alone": ({"input_boxes": [BOX, BOX]}, {"input_boxes": [[BOX, BOX]]}),
    "one box": ({"input_boxes": BOX}, {"input_boxes": [[BOX]]}),
    "padding and truncation": ({"text": WORDS, "padding": "max_length", "truncation": True}, {"text": WORDS}),
}


@pytest.mark.parametrize("habit", SAM_HABITS)
def test_inputs_as_other_processors_take_them(habit):
    given, meant = (tiny_processor()(images=IMAGE, **one) for one in SAM_HABITS[habit])
    for name in meant:
        if isinstance(meant[name], torch.Tensor):
            assert torch.equal(given[name], meant[name]), name


def test_prompts_of_several_images_without_the_level_of_objects():
    given = tiny_processor()(images=[IMAGE, OTHER], input_points=[[[50, 50]], None], input_labels=[[1], None])
    meant = tiny_processor()(images=[IMAGE, OTHER], input_points=[[[[50, 50]]], []], input_labels=[[[1]], []])
    assert torch.equal(given["input_points"], meant["input_points"])


def test_tuples_and_old_names(tiny_folder):
    model, processor = load(tiny_folder), tiny_processor()
    inputs = processor(images=IMAGE, text=WORDS)
    with torch.no_grad():
        whole, row = model(**inputs, return_dict=True), model(**inputs, return_dict=False)
    assert isinstance(row, tuple) and any(one is not None and torch.equal(one, whole.pred_masks) for one in row[:3])
    found = processor.post_process_object_detection(outputs=whole, threshold=0.1, target_sizes=[IMAGE.size[::-1]])
    assert {"scores", "labels", "boxes"} <= found[0].keys()


def test_a_list_of_class_names_is_id2label():
    config = ovsam.OVSamConfig(vocabulary=["cat", "dog"])
    assert config.id2label == {0: "cat", 1: "dog"} and config.label2id == {"cat": 0, "dog": 1}


@pytest.mark.weights
def test_the_words_of_ovsam_tiny_are_id2label():
    config = AutoModel.from_pretrained(ovsam.path()).config
    assert list(config.id2label.values()) == ovsam.Vocabulary("coco").labels


PIXELS, IDS = torch.zeros(1, 3, SIZE, SIZE), torch.ones(2, 4, dtype=torch.long)
POINTS = torch.ones(1, 1, 1, 2)
NO_INPUTS = {  # arguments of the model -> what the message contains
    "an image": ({"pixel_values": IMAGE}, "pixel_values must be .*B, 3, H, W.*type Image"),
    "an array": ({"pixel_values": PIXELS.numpy()}, "pixel_values must be .*type ndarray"),
    "a list of images": ({"pixel_values": [IMAGE]}, "pixel_values must be .*type list"),
    "one image": ({"pixel_values": PIXELS[0]}, r"pixel_values must be .*float32 \[3, 128, 128\]"),
    "channels last": ({"pixel_values": torch.zeros(1, SIZE, SIZE, 3)}, "pixel_values must be"),
    "bytes": ({"pixel_values": PIXELS.byte()}, "pixel_values must be a floating-point tensor .*uint8"),
    "an array for CLIP": ({"pixel_values": PIXELS, "clip_pixel_values": PIXELS.numpy()}, "clip_pixel_values must be"),
    "words": ({"pixel_values": PIXELS, "input_ids": ["cat"]}, "input_ids must be .*K, T.*type list"),
    "fractions as tokens": ({"pixel_values": PIXELS, "input_ids": IDS.float()}, "input_ids must be a tensor of whole"),
    "one query": ({"pixel_values": PIXELS, "input_ids": IDS[0]}, "input_ids must be"),
    "a mask in a list": ({"pixel_values": PIXELS, "input_ids": IDS, "attention_mask": [[1]]}, "attention_mask must be"),
    "embeddings": ({"pixel_values": PIXELS, "text_embeds": [[0.5]]}, "text_embeds must be"),
    "a word": ({"pixel_values": PIXELS, "input_ids": IDS, "text_labels": "cat"}, "text_labels must be a list"),
    "a number of words": ({"pixel_values": PIXELS, "input_ids": IDS, "text_labels": 2}, "text_labels must be a list"),
    "a list of points": ({"pixel_values": PIXELS, "input_points": [[[[5, 5]]]]}, "input_points must be .*type list"),
    "points without a level": ({"pixel_values": PIXELS, "input_points": POINTS[0]}, "input_points must be"),
    "labels": ({"pixel_values": PIXELS, "input_points": POINTS, "input_labels": 1}, "input_labels must be"),
    "a box": ({"pixel_values": PIXELS, "input_boxes": BOX}, "input_boxes must be .*B, P, 4"),
    "masks of pixels": ({"pixel_values": PIXELS, "input_masks": torch.ones(1, 1, 32, 32) > 0}, "input_masks must be"),
    "other features": ({"features": PIXELS}, "features must be those that `encode` returns"),
    "an embedding": ({"image_embeddings": PIXELS, "input_boxes": torch.ones(1, 1, 4)}, "image_embeddings must be"),
    "no embeddings": ({"image_embeddings": [], "input_boxes": torch.ones(1, 1, 4)}, "image_embeddings must be"),
    "counts": ({"pixel_values": PIXELS, "input_points": POINTS, "prompt_counts": "one"}, "prompt_counts must be"),
    "a threshold": ({"pixel_values": PIXELS, "input_ids": IDS, "proposal_threshold": "low"}, "proposal_threshold must"),
    "nothing": ({}, "Pass pixel_values"),
}


@pytest.mark.parametrize("case", NO_INPUTS)
def test_what_is_no_tensor_of_the_processor_is_one_sentence(tiny_folder, case, monkeypatch):
    given, message = NO_INPUTS[case]
    model = load(tiny_folder)
    monkeypatch.setattr("ovsam.modeling.modeling_ovsam.encode_image", None)  # nothing runs
    with pytest.raises(InputError, match=message):
        model(**given)


def test_other_calls_of_a_model_check_their_tensors(tiny_folder):
    model = load(tiny_folder)
    vision = ovsam.OVSamVisionModel.from_pretrained(tiny_folder)
    for call in (model.encode, model.get_image_embeddings, vision):
        with pytest.raises(InputError, match="pixel_values must be"):
            call(IMAGE)
    with pytest.raises(InputError, match="input_ids must be"):
        model.get_text_features(["cat"])


@pytest.mark.parametrize("pads", [False, True])
def test_masks_are_enlarged_as_by_sam(pads):
    """Of an image processor of SAM 2, which stretches images, and of SAM 1, which pads them."""
    square, small = {"height": SIZE, "width": SIZE}, {"height": SIZE // 4, "width": SIZE // 4}
    edges = {"size": {"longest_edge": SIZE}, "mask_size": {"longest_edge": SIZE // 4}}
    stock = (
        SamImageProcessor(**edges, pad_size=square, mask_pad_size=small) if pads else tiny_processor().image_processor
    )
    processor = ovsam.OVSamProcessor(stock, tiny_processor().tokenizer, max_text_length=12)
    masks, sizes = [torch.randn(2, 1, 32, 32), torch.randn(1, 3, 32, 32)], [(90, 200), (50, 40)]
    further = ([(58, 128), (128, 102)],) if pads else ()
    expected = stock.post_process_masks(list(masks), sizes, *further)
    for given in (masks, [mask.numpy() for mask in masks], tuple(masks)):
        for found, mask in zip(processor.post_process_masks(given, torch.tensor(sizes)), expected, strict=True):
            assert torch.equal(found, mask)
    logits = processor.post_process_masks(masks, sizes, binarize=False)
    assert torch.equal(logits[1] > 0, expected[1]) and logits[1].is_floating_point()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.zeros(1, 1, 1, 8, 8), None), "original_sizes are None"),
        ((torch.zeros(1, 1, 1, 8, 8), [(8, 0)]), "whole and positive"),
        ((torch.zeros(1, 1, 1, 8, 8), "big"), "original_sizes"),
        ((torch.zeros(2, 1, 1, 8, 8), [(8, 8)]), "masks of 2 images, and original_sizes of 1"),
        ((None, [(8, 8)]), "The masks are None"),
        ((torch.tensor(1.0), [(8, 8)]), "The masks are"),
        (("masks", [(8, 8)]), "The masks are 'masks'"),
        ((torch.zeros(1, 8, 8), [(8, 8)]), r"logits \[P, M, h, w\]; got torch.float32 \[8, 8\]"),
        ((torch.zeros(1, 1, 1, 8, 8) > 0, [(8, 8)]), "got torch.bool"),
        (([IMAGE], [(8, 8)]), "must be logits"),
        ((torch.zeros(1, 1, 1, 8, 8), [(8, 8)], float("nan")), "mask_threshold is nan"),
        ((torch.zeros(1, 1, 1, 8, 8), [(8, 8)], 0.0, "yes"), "binarize"),
    ],
)
def test_masks_that_cannot_be_enlarged_are_one_sentence(given, message):
    with pytest.raises(InputError, match=message):
        tiny_processor().post_process_masks(*given)
