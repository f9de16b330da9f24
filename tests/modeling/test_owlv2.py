"""OWLv2 as a ConceptHead: the same boxes, objectness, class embeddings and scores as transformers' own full forward on
the same weights, through its own processor and post-processing, from one encoding of the image."""

import copy

import numpy as np
import pytest
import torch
from common import randomise, tiny_config, tiny_processor, word_tokenizer
from testers.clip_side import ClipSideTester, make_inputs
from transformers import (
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
)

import ovsam
from ovsam.errors import InputError
from ovsam.modeling.clip import CLIP_SIDES
from ovsam.modeling.geometry import square_window
from ovsam.modeling.scoring import Naming

WORDS = [f"word{index}" for index in range(1203)]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = TOWER | {"vocab_size": 1210, "max_position_embeddings": 8, "bos_token_id": 1208, "eos_token_id": 1209}
SIZE, PATCH = 64, 8
CONFIG = Owlv2Config(
    text_config=TEXT,
    vision_config=TOWER | {"image_size": SIZE, "patch_size": PATCH},
    projection_dim=TOWER["hidden_size"],
)


@pytest.fixture(scope="module")
def own():
    torch.manual_seed(0)
    model = Owlv2ForObjectDetection(copy.deepcopy(CONFIG)).eval()
    with torch.no_grad():  # weights at which places and words differ; untrained ones hardly do
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            elif isinstance(module, torch.nn.Embedding):
                torch.nn.init.normal_(module.weight)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
        model.class_head.logit_scale.bias.fill_(8.0)
    return model


@pytest.fixture(scope="module")
def side(own):
    side = CLIP_SIDES["owlv2"](copy.deepcopy(CONFIG)).eval()
    side.model.load_state_dict(own.state_dict())
    return side


def processor(size=SIZE) -> Owlv2Processor:
    """OWLv2's own; the end of a phrase has the highest id, as in CLIP's vocabulary."""
    ids = {"!": 0, "<unk>": 1} | {word: 2 + index for index, word in enumerate(WORDS)}
    ids |= {"<start>": 1208, "<end>": 1209}
    tokenizer = word_tokenizer(ids, "<start>", "<end>", "<unk>", pad_token="!", model_max_length=8)
    return Owlv2Processor(Owlv2ImageProcessor(size={"height": size, "width": size}), tokenizer)


def pictures(*sizes):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 255, (height, width, 3), dtype=np.uint8) for height, width in sizes]


def found_by(side, inputs, words):
    """One encoding of the images, then every word in one matrix product: OVSamModel's own naming."""
    features = side.encode_image(inputs["pixel_values"])
    concepts = side.concepts(features)
    # The processor repeats the words for every image.
    embeds = side.encode_text(inputs["input_ids"][: len(words)])
    logits = Naming(concepts.embeds, concepts.logit_scale, concepts.logit_shift).logits(embeds)
    return concepts, logits


@pytest.mark.parametrize("words", [WORDS[:1], WORDS], ids=["1 word", "1203 words"])
@pytest.mark.parametrize(
    ("sizes", "input_size"),
    [
        (((48, 64), (64, 48)), 64),  # wide and tall: padded at the bottom, and at the right
        (((61, 33),), 64),  # odd sides
        (((300, 420),), 64),  # large: blurred while it is reduced
        (((20, 30),), 64),  # small: enlarged
        (((48, 64),), 128),  # not the size it was trained at: position embeddings and box biases are interpolated
        (((48, 64),), 40),
    ],
)
@torch.no_grad()
def test_all_outputs_equal_those_of_owlv2(own, side, words, sizes, input_size):
    process = processor(input_size)
    images = pictures(*sizes)
    inputs = process(text=[words] * len(images), images=images, return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (input_size, input_size)
    expected = own(**inputs, interpolate_pos_encoding=input_size != SIZE)
    concepts, logits = found_by(side, inputs, words)

    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(concepts.objectness, expected.objectness_logits, **close)
    own_embeds = expected.class_embeds / (expected.class_embeds.norm(dim=-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(concepts.embeds, own_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits, expected.logits, **close)
    assert concepts.objectness.std() > 0.1 and concepts.boxes.std(1).min() > 0.1  # not constant
    if len(words) > 1:
        assert logits.std(-1).mean() > 0.3 and logits.argmax(-1).unique().numel() > 3

    # Its own post-processing, boxes in pixels of each image; ours goes through the window of the padded square.
    results = process.post_process_grounded_object_detection(expected, threshold=0.0, target_sizes=list(sizes))
    for index, (height, width) in enumerate(sizes):
        scores, labels = logits[index].sigmoid().max(-1)
        torch.testing.assert_close(scores, results[index]["scores"], **close)
        assert (labels == results[index]["labels"]).float().mean() > 0.99  # ties apart
        _, _, right, bottom = square_window(height, width)
        in_picture = torch.tensor([right * width, bottom * height] * 2) / input_size
        boxes = concepts.boxes[index] * in_picture
        torch.testing.assert_close(boxes, results[index]["boxes"], rtol=1e-5, atol=1e-5 * max(height, width))


@torch.no_grad()
def test_the_image_is_encoded_once_for_any_number_of_words(side):
    calls = {"image": 0, "text": 0}

    def count(name):
        return lambda *_: calls.update({name: calls[name] + 1})

    hooks = [
        side.model.owlv2.vision_model.embeddings.patch_embedding.register_forward_hook(count("image")),
        side.model.owlv2.text_model.register_forward_hook(count("text")),
    ]
    inputs = processor()(text=[WORDS], images=pictures((48, 64)), return_tensors="pt")
    concepts = side.concepts(side.encode_image(inputs["pixel_values"]))
    embeds = side.encode_text(inputs["input_ids"])
    for words in (embeds[:1], embeds[:80], embeds):
        Naming(concepts.embeds, concepts.logit_scale, concepts.logit_shift).logits(words)
    for hook in hooks:
        hook.remove()
    assert calls == {"image": 1, "text": 1}


@torch.no_grad()
def test_non_square_inputs_keep_pixels(own, side):
    """Not how OWLv2 was trained, yet each axis has its own length."""
    pixel_values = torch.randn(1, 3, 32, 96)
    expected = own(
        input_ids=torch.tensor([[1208, 5, 1209]]), pixel_values=pixel_values, interpolate_pos_encoding=True
    ).pred_boxes
    boxes = side.concepts(side.encode_image(pixel_values)).boxes
    centre, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    found = torch.cat([centre, sides], -1) / torch.tensor([96, 32, 96, 32])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bfloat16_is_as_close_as_in_owlv2_and_boxes_closer(own, side):
    """Against float32, in the mean: scores and objectness within 0.01, cosines of embeddings above 0.999; boxes nearer
    than OWLv2's own, whose last step rounds them to 8 bits."""
    inputs = processor()(text=[WORDS[:20]], images=pictures((48, 64)), return_tensors="pt")
    exact, exact_logits = found_by(side, inputs, WORDS[:20])
    half_inputs = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    concepts, logits = found_by(copy.deepcopy(side).to(torch.bfloat16), half_inputs, WORDS[:20])
    assert concepts.boxes.dtype == concepts.logit_scale.dtype == concepts.logit_shift.dtype == torch.float32
    theirs = copy.deepcopy(own).to(torch.bfloat16)(**half_inputs)

    def error(found, expected):
        return (found.float() - expected).abs().mean()

    assert error(logits.float().sigmoid(), exact_logits.sigmoid()) < 0.01
    assert error(concepts.objectness.float().sigmoid(), exact.objectness.sigmoid()) < 0.01
    assert torch.cosine_similarity(concepts.embeds.float(), exact.embeds, dim=-1).min() > 0.999
    own_exact = own(**inputs).pred_boxes * SIZE
    ours = torch.cat(
        [(concepts.boxes[..., :2] + concepts.boxes[..., 2:]) / 2, concepts.boxes[..., 2:] - concepts.boxes[..., :2]], -1
    )
    assert error(ours, own_exact) < error(theirs.pred_boxes * SIZE, own_exact) < 0.005 * SIZE
    assert error(logits.float().sigmoid(), exact_logits.sigmoid()) < 1.1 * error(
        theirs.logits.sigmoid(), exact_logits.sigmoid()
    )


@torch.no_grad()
def test_regions_pool_to_the_embeddings_of_their_locations(side):
    features = side.encode_image(torch.randn(2, 3, SIZE, SIZE))
    concepts = side.concepts(features)
    torch.testing.assert_close(side.dense(features).flatten(2).mT, concepts.embeds, rtol=0, atol=1e-6)
    box = torch.tensor([[[16.0, 8.0, 24.0, 16.0]]]).repeat(2, 1, 1)  # the patch in row 1, column 2
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, 2:4, 4:6] = 1
    for pooled in (side.pool(features, boxes=box), side.pool(features, masks=mask)):
        torch.testing.assert_close(pooled[:, 0], concepts.embeds[:, 8 + 2], rtol=0, atol=1e-6)
    low, high = concepts.logit_scale.min(), concepts.logit_scale.max()
    assert low < side.logit_scale < high and not side.softmax  # an average location's, for pooled regions
    assert concepts.logit_shift.min() < side.logit_shift < concepts.logit_shift.max()


def test_the_window_is_the_padding_of_its_own_processor():
    """A white image padded with zeros: the window ends where the white ends."""
    for height, width in ((30, 60), (60, 45), (64, 64), (37, 64)):
        white = np.full((height, width, 3), 255, dtype=np.uint8)
        side = max(height, width)
        plain = Owlv2ImageProcessor(
            size={"height": side, "width": side}, do_normalize=False, image_mean=[0.0] * 3, image_std=[1.0] * 3
        )
        padded = plain(white, return_tensors="pt")["pixel_values"][0, 0] > 0.5
        assert padded.any(1).sum() == height and padded.any(0).sum() == width
        left, top, right, bottom = square_window(height, width)
        assert (left, top) == (0.0, 0.0)
        assert (width * right, height * bottom) == pytest.approx((side, side), rel=1e-12)


def test_an_input_of_incomplete_patches_raises_an_error(side):
    with pytest.raises(InputError, match="multiples of 8 pixels, not 64 x 60"):
        side.encode_image(torch.randn(1, 3, 64, 60))


class TestOwlv2(ClipSideTester):
    softmax = False

    @classmethod
    def config(cls):
        vision = TOWER | {"image_size": 32, "patch_size": 8}
        text = TEXT | {"vocab_size": 64, "max_position_embeddings": 12, "bos_token_id": 62, "eos_token_id": 63}
        return Owlv2Config(text_config=text, vision_config=vision, projection_dim=32)

    def outputs(self, side, part="all"):
        found = super().outputs(side, part)
        if part != "text":
            with torch.no_grad():
                pixels = make_inputs(side)[0].to(next(side.parameters()).dtype)
                found |= dict(side.concepts(side.encode_image(pixels)))
        return found

    @torch.no_grad()
    def test_the_last_map_is_the_last_hidden_state(self, side):
        pixel_values, vision = make_inputs(side)[0], side.model.owlv2.vision_model
        embedded = vision.pre_layernorm(vision.embeddings(pixel_values))
        expected = vision.encoder(inputs_embeds=embedded).last_hidden_state[:, -16:]
        found = side.encode_image(pixel_values).maps[-1].flatten(2).mT
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# In a whole model: SAM 2 + OWLv2, nothing trained


@pytest.fixture(scope="module")
def whole(own):
    """A tiny SAM 2 (128 px, squashed) with OWLv2 (64 px, padded to a square), and their processor."""
    sam = tiny_config(sam="sam2", adapters=False).sam_config
    config = ovsam.OVSamConfig(
        sam_config=sam, clip_config=copy.deepcopy(CONFIG), objectness_weight=0.0, proposal_threshold=0.01
    )
    model = randomise(ovsam.OVSamModel(config))
    model.clip.model.load_state_dict(own.state_dict())
    stock = processor()
    images = tiny_processor().image_processor
    return model, ovsam.OVSamProcessor(
        images, stock.tokenizer, clip_images=stock.image_processor.to_dict(), max_text_length=8
    )


@pytest.mark.parametrize("size", [(48, 64), (64, 37), (300, 420)], ids=str)
@torch.no_grad()
def test_a_whole_model_equals_owlv2(own, whole, size):
    model, process = whole
    image = pictures(size)[0]
    expected = own(**processor()(text=[WORDS[:9]], images=[image], return_tensors="pt"))
    results = processor().post_process_grounded_object_detection(expected, threshold=0.0, target_sizes=[size])[0]

    calls = []
    hook = model.clip.model.owlv2.vision_model.register_forward_hook(lambda *_: calls.append(1))
    inputs = process(image, text=WORDS[:9])
    output = model(**inputs)
    more = model(
        features=output.features,
        text_embeds=model.get_text_features(process(text=WORDS[:1], images=image)["input_ids"]),
    )
    hook.remove()
    assert len(calls) == 1 and more.logits.shape[-1] == 1

    # Every location, in pixels of the image and clipped to it
    concepts = output.features.concepts
    in_picture = torch.tensor([size[1], size[0]] * 2) / model.sam.image_size
    limit = torch.tensor([size[1], size[0]] * 2)
    boxes = results["boxes"].clamp(min=0).minimum(limit)
    torch.testing.assert_close(concepts.boxes[0] * in_picture, boxes, rtol=1e-5, atol=1e-4 * max(size))
    # and every instance: its words' scores are those of the location it came from.
    found = output.pred_boxes[0] * in_picture
    location = torch.cdist(found, boxes).argmin(-1)
    assert found.shape[0] > 1 and output.valid.all()
    torch.testing.assert_close(output.logits[0], expected.logits[0, location], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_whole_model_survives_save_and_load(whole, tmp_path):
    model, process = whole
    model.save_pretrained(tmp_path)
    process.save_pretrained(tmp_path)
    inputs = ovsam.OVSamProcessor.from_pretrained(tmp_path)(pictures((48, 64))[0], text=WORDS[:9])
    expected = model(**inputs)
    loaded = ovsam.OVSamModel.from_pretrained(tmp_path)(**inputs)
    torch.testing.assert_close(loaded.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded.logits, expected.logits, rtol=0, atol=1e-5)
