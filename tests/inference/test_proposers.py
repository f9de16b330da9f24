"""Proposers: the output of each on tiny random models, and instances from proposals."""

import pytest
import torch
from common import picture, randomise, tiny_model, tiny_processor, word_tokenizer
from torch.testing import assert_close
from transformers import (
    DetrImageProcessor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    OmDetTurboConfig,
    OmDetTurboForObjectDetection,
    OmDetTurboProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    PreTrainedTokenizerFast,
    Sam3Config,
    Sam3ImageProcessor,
    Sam3Model,
    Sam3Processor,
    SwinConfig,
)

import ovsam
from ovsam.inference.proposers import Proposals, get_proposer
from ovsam.inference.proposers.detector import Detector
from ovsam.inference.proposers.grid import stability
from ovsam.inference.proposers.sam3 import Sam3

PICTURE = picture(3, width=150, height=100)
WORDS = ["cat", "red ball"]
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SWIN = {
    "image_size": 64,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 1, 1],
    "window_size": 4,
    "out_features": ["stage2", "stage3", "stage4"],
}


@pytest.fixture(scope="module")
def segmenter():
    """Without a ConceptHead, so that another proposer is needed."""
    return ovsam.Segmenter(tiny_model(concepts_config=None), tiny_processor(), "tiny")


def tokenizer(kind: str, length: int = 64) -> PreTrainedTokenizerFast:
    start, end = {"bert": ("[CLS]", "[SEP]"), "clip": ("<|startoftext|>", "<|endoftext|>")}[kind]
    ids = {word: i for i, word in enumerate(["[PAD]", "[UNK]", start, end, "[MASK]", ".", "?", "cat", "red", "ball"])}
    special = {"pad_token": "[PAD]", "mask_token": "[MASK]", "model_max_length": length}
    special |= {"cls_token": start, "sep_token": end} if kind == "bert" else {"bos_token": start, "eos_token": end}
    return word_tokenizer(ids, start, end, **special)


def clip_text(width: int, length: int) -> dict:
    ids = {"vocab_size": 32, "bos_token_id": 2, "eos_token_id": 3}
    return TOWER | ids | {"hidden_size": width, "projection_dim": width, "max_position_embeddings": length}


def owlv2() -> Detector:
    vision = TOWER | {"image_size": 64, "patch_size": 16}
    config = Owlv2Config(text_config=clip_text(32, 16), vision_config=vision, projection_dim=32)
    processor = Owlv2Processor(Owlv2ImageProcessor(size={"height": 64, "width": 64}), tokenizer("clip", 16))
    return Detector(randomise(Owlv2ForObjectDetection(config)), processor)


def grounding_dino() -> Detector:
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(**SWIN),
        text_config=TOWER | {"model_type": "bert", "vocab_size": 32},
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=12,
        max_text_len=32,
    )
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    return Detector(GroundingDinoForObjectDetection(config).eval(), GroundingDinoProcessor(images, tokenizer("bert")))


def omdet() -> Detector:
    config = OmDetTurboConfig(
        text_config=clip_text(24, 77) | {"model_type": "clip_text_model"},
        backbone_config=SwinConfig(**SWIN),
        use_timm_backbone=False,
        apply_layernorm_after_vision_backbone=False,
        encoder_in_channels=[16, 32, 64],
        vision_features_channels=[16, 16, 16],
        encoder_hidden_dim=16,
        encoder_dim_feedforward=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        class_embed_dim=24,
        text_projection_in_dim=24,
        text_projection_out_dim=24,
        task_encoder_hidden_dim=16,
        decoder_hidden_dim=16,
        decoder_num_heads=2,
        decoder_num_layers=1,
        decoder_dim_feedforward=16,
        num_queries=12,
        image_size=64,
        num_projection_layers=1,
    )
    images = DetrImageProcessor(size={"height": 64, "width": 64})
    return Detector(OmDetTurboForObjectDetection(config).eval(), OmDetTurboProcessor(images, tokenizer("clip")))


def sam3() -> Sam3:
    layers = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = TOWER | {
        "model_type": "sam3_vit_model",
        "image_size": 112,
        "patch_size": 14,
        "window_size": 4,
        "global_attn_indexes": [0],
        "pretrain_image_size": 56,
    }
    sizes = [[32, 32], [16, 16], [8, 8]]
    config = Sam3Config(
        vision_config={"backbone_config": backbone, "fpn_hidden_size": 32, "backbone_feature_sizes": sizes},
        text_config=clip_text(16, 32) | {"model_type": "clip_text_model"},
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config=layers | {"num_queries": 10},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )
    torch.manual_seed(0)
    images = Sam3ImageProcessor(size={"height": 112, "width": 112})
    return Sam3(Sam3Model(config).eval(), Sam3Processor(images, tokenizer("clip", 32)), least_score=0.0)


def own_answer(detector: Detector, text, labels: list[str]) -> dict:
    """The output of the detector's own processor for a text."""
    inputs = detector.processor(images=PICTURE, text=text, return_tensors="pt")
    with torch.no_grad():
        outputs = detector.model(**inputs)
    return detector.processor.post_process_grounded_object_detection(
        outputs, threshold=0.05, target_sizes=[(100, 150)], text_labels=[labels]
    )[0]


@pytest.mark.parametrize("make", [owlv2, omdet])
def test_detectors_that_take_all_words_at_once(segmenter, make):
    detector = make()
    asked = []
    image = segmenter.encode(PICTURE)

    def propose(question):
        asked.append((question, detector(question)))
        return asked[-1][1]

    results = segmenter.where(image, WORDS, proposer=propose, threshold=0.0)
    own = own_answer(detector, [WORDS], WORDS)
    question, proposals = asked[0]
    assert question.words == WORDS and len(proposals) > 0
    places = torch.minimum(own["boxes"].clamp(min=0), torch.tensor([150.0, 100.0] * 2))
    real = (places[:, 2:] - places[:, :2] > 1).all(1)
    assert_close(proposals.boxes, places[real])
    assert_close(proposals.scores, own["scores"][real])
    best = proposals.word_scores.argmax(1).tolist()
    assert [WORDS[i] for i in best] == [word for word, kept in zip(own["text_labels"], real, strict=True) if kept]
    assert 0 < len(results) <= len(proposals)
    given = {round(float(score), 4) for score in proposals.scores}
    assert {round(found.score, 4) for found in results} <= given  # the detector's own scores


def test_grounding_dino_is_run_word_by_word(segmenter):
    detector, seen = grounding_dino(), []
    encoded = segmenter.encode(PICTURE)
    image, features = encoded.image, encoded.features
    question = ovsam.inference.proposers.Question(
        image, WORDS, None, False, segmenter.model, segmenter.processor, features
    )
    proposals = detector(question)
    for word, text in (("cat", "cat."), ("red ball", "red ball.")):
        seen.append(own_answer(detector, text, [word])["scores"])
    assert [len(scores) for scores in seen] == [(proposals.word_scores[:, i] > 0).sum() for i in range(2)]
    assert_close(proposals.scores, torch.cat(seen))
    assert ((proposals.word_scores > 0).sum(1) == 1).all()  # no name is two words'


def test_sam3_masks_are_taken_as_they_are(segmenter):
    proposer = sam3()
    image = segmenter.encode(PICTURE)
    kept = []

    def propose(question):
        kept.append(proposer(question))
        return kept[0]

    results = segmenter.where(image, WORDS, proposer=propose, threshold=0.0)
    (proposals,) = kept
    assert proposals.masks.shape == (20, 100, 150) and len(results) > 0
    masks = {mask.numpy().tobytes() for mask in proposals.masks}
    for found in results:
        assert torch.as_tensor(found.mask).numpy().astype(bool).tobytes() in masks


def test_a_function_is_a_proposer(segmenter):
    """Boxes are prompts: the masks and class names are those of `what`."""
    box = [20.0, 10.0, 90.0, 70.0]

    def mine(question):
        assert question.image.size == (150, 100)
        return Proposals(boxes=torch.tensor([box]), scores=torch.tensor([0.9]))

    image = segmenter.encode(PICTURE)
    found = segmenter.where(image, WORDS, proposer=mine, threshold=0.0)
    asked = segmenter.what(image, boxes=[box], vocabulary=WORDS)
    assert len(found) == 1
    assert found[0].segmentation == asked[0].segmentation and found[0].label == asked[0].label
    assert found[0].source == "text" and asked[0].source == "box"


def test_no_proposals_give_no_results(segmenter):
    assert len(segmenter.where(PICTURE, WORDS, proposer=lambda _: Proposals(boxes=torch.zeros(0, 4)))) == 0


@pytest.mark.parametrize(
    "proposals, message",
    [
        (Proposals(scores=torch.ones(1)), "must give boxes"),
        (Proposals(boxes=torch.zeros(2, 5)), r"boxes must be \[n, 4\]"),
        (Proposals(boxes=torch.zeros(2, 4), scores=torch.ones(3)), r"scores must be \[n\] with n = 2"),
        (Proposals(boxes=torch.zeros(2, 4), word_scores=torch.ones(2, 3)), r"word_scores must be \[n, 2\]"),
    ],
)
def test_wrong_shapes_of_proposals_raise_an_error(segmenter, proposals, message):
    with pytest.raises(ovsam.InputError, match=message):
        segmenter.where(PICTURE, WORDS, proposer=lambda _: proposals)


def test_names_of_proposers():
    assert callable(get_proposer("grid")) and callable(get_proposer("clip-dense"))
    for name in ("gird", "detector", "sam3:"):
        with pytest.raises(ovsam.InputError, match="no proposer"):
            get_proposer(name)


def test_clip_dense_points_lie_at_the_highest_similarity(segmenter):
    encoded = segmenter.encode(PICTURE)
    image, features = encoded.image, encoded.features
    _, embeds = segmenter.embed(WORDS)
    question = ovsam.inference.proposers.Question(
        image, WORDS, embeds, False, segmenter.model, segmenter.processor, features
    )
    proposals = get_proposer("clip-dense")(question)
    with torch.no_grad():
        dense = segmenter.model.clip.dense(features.clip)[0]
    cosine = torch.einsum("kd,dhw->khw", embeds, dense)
    for heat in cosine:  # the strongest cell of each word is among the points, in pixels of the image
        row, column = divmod(int(heat.argmax()), heat.shape[1])
        center = torch.tensor([(column + 0.5) * 150 / heat.shape[1], (row + 0.5) * 100 / heat.shape[0]])
        assert (proposals.points - center).abs().amax(1).min() < 1e-3
    inside = (proposals.points >= proposals.boxes[:, :2]) & (proposals.points <= proposals.boxes[:, 2:])
    assert inside.all()


def test_stability_is_the_iou_of_two_cuts():
    logits = torch.tensor([[[2.0, 0.5, -2.0]], [[-3.0, -3.0, -3.0]]])
    assert_close(stability(logits, 1.0), torch.tensor([0.5, 0.0]))


def test_the_grid_returns_confident_and_distinct_masks(segmenter):
    encoded = segmenter.encode(PICTURE)
    image, features = encoded.image, encoded.features
    question = ovsam.inference.proposers.Question(image, [], None, True, segmenter.model, segmenter.processor, features)
    loose = {"pred_iou_threshold": -1e9, "stability_threshold": 0.0}
    everything = get_proposer("grid")(question, points_per_side=4, nms_threshold=1.0, **loose)
    grid = (torch.arange(4) + 0.5) * segmenter.model.sam.image_size / 4
    points = torch.cartesian_prod(grid, grid).flip(1)[None, :, None]  # [1, 16, 1, 2]
    with torch.no_grad():
        decoded = segmenter.model.sam.decode(features.sam, input_points=points)
    some = (decoded.masks[:, :, 1:] > 1).flatten(-2).any(-1)
    assert len(everything) == some.sum() > 20
    distinct = get_proposer("grid")(question, points_per_side=4, nms_threshold=0.5, **loose)
    flat = (distinct.masks > 0).flatten(1).float()
    shared = flat @ flat.T
    overlap = shared / (flat.sum(1)[:, None] + flat.sum(1) - shared).clamp(min=1)
    assert 0 < len(distinct) < 48 and overlap.triu(1).max() <= 0.5
