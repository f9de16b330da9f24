"""OVSam as the released Open-Vocabulary SAM: the same numbers as the official modules, and every key accounted for."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from official_ovsam import written_out_decoder, written_out_neck
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

import ovsam
from ovsam.checkpoints.convert import convert_checkpoint, map_tensors
from ovsam.checkpoints.convert.open_vocabulary_sam import RENAMES, TEMPLATES, UNUSED, read_config
from ovsam.modeling.adapters import Clip2SamFpnAdapter, Sam2ClipVitAdapter, Sam2ClipVitConfig
from ovsam.modeling.adapters.common import box_levels, pool_from_pyramid
from ovsam.modeling.sam import SAM_SIDES, DecodedMasks
from ovsam.modeling.scoring import FusedNaming, row_labels
from ovsam.ops.boxes import masks_to_boxes
from ovsam.processing.vocabulary import Vocabulary

pytestmark = pytest.mark.slow

HERE = Path(__file__).parents[1] / "data" / "ovsam_vectors"

TOLERANCE = 1e-5
# Words of COCO with the roles of the vectors' classes: 1 was trained on, 2 was not, 0 is of neither split.
WORDS = ("person", "bus", "car", "traffic light", "dog", "bicycle", "fire hydrant")
KINDS = pytest.mark.parametrize("kind", ["box", "point"])


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(scope="module")
def numbers() -> dict[str, torch.Tensor]:
    # .clone(): mapped memory is not aligned, and kernels then take other paths
    return {key: tensor.clone() for key, tensor in load_file(HERE / "numbers.safetensors").items()}


def official_weights(source: Path, name: str, table: str | None = "state_dict") -> dict[str, torch.Tensor]:
    weights = torch.load(source / name, weights_only=True)
    return weights[table] if table else weights


def random_tensors(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: 0.1 * torch.randn(shape, generator=generator).half() for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The four files of a small release, in the official layout."""
    folder = tmp_path_factory.mktemp("release")
    kept, shapes = load_file(HERE / "weights.safetensors"), json.loads((HERE / "keys.json").read_text())["small"]
    for name, file in (("sam2clip", "sam2clip_small.pth"), ("clip2sam", "clip2sam_coco_small.pth")):
        state = random_tensors(shapes[name]) | {k: v.clone() for k, v in kept.items() if k in shapes[name]}
        torch.save({"meta": {"epoch": 12}, "state_dict": state}, folder / file)
    torch.save({k: v.clone() for k, v in kept.items() if k.startswith("prompt_encoder.")}, folder / "sam_small.pth")
    torch.manual_seed(0)
    text = TextTransformer(context_length=77, vocab_size=49408, width=64, heads=1, layers=1, output_dim=64).state_dict()
    tower = {k: v for k, v in kept.items() if k.startswith("visual.")}
    save_file(tower | text | {"logit_scale": torch.tensor(4.6)}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "ovsam-release"
    report = convert_checkpoint(source, folder)
    assert report.kind == "open-vocabulary-sam"
    assert report.size == "Open-Vocabulary SAM RN50x16, trained on COCO"
    assert {reason for key, reason in report.unused.items() if "label_mlp" in key} == {
        "the release multiplies its result by zero"
    }
    assert all("label_mlp" in key or key.endswith("/meta") for key in report.unused)
    return folder


@pytest.fixture(scope="module")
def model(converted) -> ovsam.OVSamModel:
    return AutoModel.from_pretrained(converted).eval()


@pytest.fixture(scope="module")
def processor(converted) -> ovsam.OVSamProcessor:
    return AutoProcessor.from_pretrained(converted)


@pytest.fixture(scope="module")
def picture(numbers) -> Image.Image:
    return Image.fromarray(numbers["image_rgb_u8"].permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
@torch.no_grad()
def features(model, processor, picture) -> ovsam.OVSamFeatures:
    return model.encode(processor(images=picture)["pixel_values"])


def prompts(numbers, kind: str) -> dict[str, torch.Tensor]:
    if kind == "box":
        return {"input_boxes": numbers["boxes"][None]}
    return {"input_points": numbers["point_coords"][None], "input_labels": torch.ones(1, 3, 1, dtype=torch.long)}


# ---- the image side --------------------------------------------------------------------------------------------


def test_maps_of_the_tower(features, numbers):
    for i, feature in enumerate(features.maps):
        if f"feat_{i}" in numbers:
            assert distance(feature, numbers[f"feat_{i}"]) < TOLERANCE
    assert features.maps[3].shape == numbers["feat_3"].shape


def test_pixels(processor, picture, numbers):
    """Normalised, and padded with zeros after that."""
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])[:, :, None, None]
    expected = F.pad((numbers["image_rgb_u8"] - mean) / std, (0, 0, 0, 32))
    assert distance(processor(images=picture)["pixel_values"][0], expected) < TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_neck(source, model, features, attention):
    config = Sam2ClipVitConfig.from_dict(model.sam2clip.config.to_dict())
    config._attn_implementation = attention
    adapter = Sam2ClipVitAdapter(config).eval()
    adapter.load_state_dict(model.sam2clip.state_dict())
    expected = written_out_neck(official_weights(source, "sam2clip_small.pth"), features.maps)
    assert distance(adapter(features.maps).embedding, expected) < TOLERANCE


def test_neck_raises_an_error_for_another_size(model):
    with pytest.raises(ovsam.InputError, match="takes square images of 256 x 256 pixels; got 128 x 256"):
        model.encode(torch.zeros(1, 3, 128, 256))


@torch.no_grad()
def test_feature_pyramid(model, features, numbers):
    for i, level in enumerate(model.clip2sam.levels(features.maps)):
        if f"fpn_{i}" in numbers:
            assert distance(level, numbers[f"fpn_{i}"]) < TOLERANCE


# ---- prompts and masks -----------------------------------------------------------------------------------------


@KINDS
@torch.no_grad()
def test_prompt_embeddings(model, numbers, kind):
    encoder = model.sam.model.prompt_encoder
    given = prompts(numbers, kind)
    sparse, dense = encoder(given.get("input_points"), given.get("input_labels"), given.get("input_boxes"), None)
    assert distance(sparse[0], numbers[f"{kind}.sparse_embed"]) < TOLERANCE
    assert distance(dense[:, :, :1, :1], numbers[f"{kind}.dense_embed"]) < TOLERANCE


@torch.no_grad()
def test_prompt_embeddings_of_several_points_and_with_boxes(model, numbers):
    points, labels = numbers["pe_probe.points"][None], torch.ones(1, 3, 2)
    encoder = model.sam.model.prompt_encoder
    alone, _ = encoder(points, labels, None, None)
    both, _ = encoder(points, labels, numbers["pe_probe.boxes"][None], None)
    assert distance(alone[0], numbers["pe_probe.sparse_points"]) < TOLERANCE
    assert distance(both[0], numbers["pe_probe.sparse_points_boxes"]) < TOLERANCE


@torch.no_grad()
def test_position_of_the_cells(source, model):
    name = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    matrix = official_weights(source, "sam_small.pth", None)[name].float()
    y, x = torch.meshgrid(*[(torch.arange(16) + 0.5) / 16] * 2, indexing="ij")
    angle = 2 * torch.pi * (2 * torch.stack([x, y], -1) - 1) @ matrix
    expected = torch.cat([angle.sin(), angle.cos()], -1).permute(2, 0, 1)[None]  # [h, w, C] -> [1, C, h, w]
    assert distance(model.sam._position(), expected) < TOLERANCE


@KINDS
@torch.no_grad()
def test_masks(source, model, features, numbers, kind):
    tokens = []
    norm = model.sam.model.mask_decoder.transformer.layer_norm_final_attn
    handle = norm.register_forward_hook(lambda module, args, output: tokens.append(output.flatten(0, -3)))
    decoded = model.sam.decode(features.sam, **prompts(numbers, kind))
    handle.remove()
    dense, sparse = numbers[f"{kind}.dense_embed"][0], numbers[f"{kind}.sparse_embed"]
    weights = official_weights(source, "clip2sam_coco_small.pth")
    masks, queries = written_out_decoder(weights, features.sam.embedding, model.sam._position(), sparse, dense)
    assert distance(decoded.masks[0, :, 0], masks) < TOLERANCE and decoded.iou is None
    assert distance(torch.cat(tokens), queries) < TOLERANCE  # [P, T, C]
    assert torch.equal(decoded.tokens[0, :, 0], torch.cat(tokens)[:, 1])


def test_no_vision_encoder(model):
    with pytest.raises(ovsam.InputError, match="use it with the composition"):
        SAM_SIDES["ovsam_label_token_sam"](model.config.sam_config, part="all")


# ---- names -----------------------------------------------------------------------------------------------------


@KINDS
@torch.no_grad()
def test_head(model, features, numbers, kind):
    head: Clip2SamFpnAdapter = model.clip2sam
    masks = numbers[f"{kind}.low_res_masks"][:, 0][None]
    boxes = masks_to_boxes(masks > 0) * 4
    assert torch.equal(boxes[0], numbers[f"{kind}.mask_boxes"])
    size, finest = head.config.roi_size, head.config.finest_size
    assert torch.equal(box_levels(boxes[0], finest, 4), numbers[f"{kind}.roi_level"])
    rois = pool_from_pyramid(head.levels(features.maps), 4, boxes, size, finest)
    assert distance(rois, numbers[f"{kind}.roi_feats"]) < TOLERANCE
    convolved = head.roi_conv(rois).relu()
    assert distance(convolved.mean((2, 3)), numbers[f"{kind}.roi_vec"]) < TOLERANCE
    embeds = head(features.maps, masks.sigmoid())
    logits = embeds[0] @ numbers["text_embed"][:, 0].T * torch.tensor(head.config.log_scale).exp()
    assert distance(logits, numbers[f"{kind}.head_logits"][:, :-1]) < TOLERANCE
    assert numbers[f"{kind}.head_logits"][:, -1].abs().max() == 0  # of the background


@torch.no_grad()
def test_head_on_boxes_at_the_edges(model, features, numbers):
    """At the borders of the levels, without area, outside the image."""
    head, boxes = model.clip2sam, numbers["roi_probe.boxes"]
    size, finest = head.config.roi_size, head.config.finest_size
    assert torch.equal(box_levels(boxes, finest, 4), numbers["roi_probe.level"])
    rois = pool_from_pyramid(head.levels(features.maps), 4, boxes[None], size, finest)
    vectors = head.roi_conv(rois).relu().mean((2, 3))
    assert distance(vectors, numbers["roi_probe.vec"]) < TOLERANCE
    assert vectors[:2].abs().max() == 0
    theirs = F.normalize(numbers["roi_probe.clip_vec"], dim=-1)
    assert distance(model.clip.pool(features.clip, boxes=boxes[None])[0], theirs) < TOLERANCE


@KINDS
@torch.no_grad()
def test_frozen_clip(model, features, numbers, kind):
    given, texts = numbers["boxes" if kind == "box" else "point_clip_boxes"], numbers["text_embed"][:, 0]
    for boxes, ending in ((given, ""), (numbers[f"{kind}.mask_boxes"], "_maskbox")):
        embeds = model.clip.pool(features.clip, boxes=boxes[None])[0]
        theirs = numbers[f"{kind}.clip_logits{ending}"][:, :-1]
        assert distance(embeds @ texts.T * torch.tensor(4.6052).exp(), theirs) < TOLERANCE
        if not ending:
            assert distance(embeds, F.normalize(numbers[f"{kind}.clip_vec"], dim=-1)) < TOLERANCE


def check_fused(logits: torch.Tensor, theirs: torch.Tensor, roles: torch.Tensor) -> None:
    """Logits whose sigmoid is p against log p [N, words + background] and the name that comes of it."""
    split = roles != 0  # the official code sets the rest to -1000
    assert distance(F.logsigmoid(logits)[:, split], theirs[:, :-1][:, split]) < TOLERANCE
    best = logits.masked_fill(~split, -torch.inf).argmax(1)
    assert torch.equal(best, theirs[:, :-1].argmax(1))


@KINDS
@torch.no_grad()
def test_fused(model, features, numbers, kind):
    masks = numbers[f"{kind}.low_res_masks"][:, 0][None]
    texts, roles = numbers["text_embed"][:, 0], numbers["base_novel_indicator"]
    for boxes, ending in (
        (numbers["boxes" if kind == "box" else "point_clip_boxes"], ""),
        (numbers[f"{kind}.mask_boxes"], "_maskbox"),
    ):
        naming = model.clip2sam.name(features, masks, boxes[None], None, model.clip)
        check_fused(naming.logits(texts, labels=WORDS)[0], numbers[f"{kind}.fused_logits{ending}"], roles)
        if not ending:
            best = naming.logits(texts, labels=WORDS)[0].masked_fill(roles == 0, -torch.inf).argmax(1)
            assert torch.equal(best, numbers[f"{kind}.labels"])


@torch.no_grad()
def test_fusion_of_a_mask_that_is_too_small_for_clip(model, features, numbers):
    """Masks that vanish at stride 32 are classified by the adapter alone, which gets the mask of the first box here."""
    masks, boxes = numbers["fuse_probe.masks"][:, 0][None], numbers["fuse_probe.boxes"][None]
    texts, roles = numbers["text_embed"][:, 0], numbers["base_novel_indicator"]
    naming = model.clip2sam.name(features, masks, boxes, None, model.clip)
    assert not naming.clip_sees.all() and naming.clip_sees.any()
    first = model.clip2sam.name(features, numbers["box.low_res_masks"][None, :1, 0], boxes[:, :1], None, model.clip)
    naming.embeds = first.embeds.expand_as(naming.embeds)
    check_fused(naming.logits(texts, labels=WORDS)[0], numbers["fuse_probe.fused"], roles)
    untold = F.logsigmoid(naming.logits(texts)[0])
    assert distance(untold, numbers["fuse_probe.fused_no_indicator"][:, :-1]) < TOLERANCE


def random_naming() -> tuple[FusedNaming, torch.Tensor]:
    torch.manual_seed(0)
    embeds, clip_embeds, words = (F.normalize(torch.randn(n, 8), dim=-1) for n in (4, 4, 6))
    sees = torch.tensor([[True, True, False, True]])
    return FusedNaming(embeds[None], clip_embeds[None], sees, 10.0, frozenset({"bat (animal)", "cat"})), words


def test_synonyms_share_the_best_of_them():
    naming, words = random_naming()
    labels = ["cat", "Bat_(animal)", "cat", "dog", "dog", "cup"]
    rows = {"cat": [0, 2], "Bat_(animal)": [1], "dog": [3, 4], "cup": [5]}

    def p(embeds: torch.Tensor) -> torch.Tensor:
        cosine = embeds[0].double() @ words.double().T
        best = torch.stack([cosine[:, index].amax(1) for index in rows.values()] + [torch.zeros(4).double()], 1)
        return (10 * best).softmax(1)[:, :-1]

    share = torch.tensor([0.1, 0.1, 0.9, 0.9]) * naming.clip_sees[0][:, None]
    by_name = p(naming.embeds) ** (1 - share) * p(naming.clip_embeds) ** share
    ours = naming.logits(words, labels=labels)[0].sigmoid()
    for i, label in enumerate(labels):
        assert distance(ours[:, i].double(), by_name[:, list(rows).index(label)]) < TOLERANCE


def test_words_of_other_images_do_not_count():
    naming, words = random_naming()
    labels = ["cat", "bat", "dog", "cup", "car", "owl"]
    asked = torch.tensor([[True, False, True, False, True, False]])
    ours, alone = naming.logits(words, asked, labels), naming.logits(words[::2], None, labels[::2])
    assert distance(ours[..., ::2], alone) < 1e-6
    assert ours[..., 1::2].max() < -1e30


def test_extreme_logits_stay_finite():
    naming, words = random_naming()
    naming.embeds = naming.clip_embeds = words[None, :4]
    naming.scale = 1e4
    logits = naming.logits(words)
    assert logits.isfinite().all()
    assert logits.sigmoid()[0].diagonal().min() > 0.9999


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, None),
        (["cat", "dog"], ["cat", "dog"]),
        ({"puppy": "dog", "dog": "dog"}, ["dog", "dog"]),
        ([["cat", "dog"], ["dog", "cup"]], ["cat", "dog", "cup"]),
        ([{"puppy": "dog"}, {"cat": "cat", "puppy": "dog"}], ["dog", "cat"]),
    ],
)
def test_names_of_the_rows(given, names):
    assert row_labels(given) == names


def test_text_labels_must_be_one_for_each_word(model, features, numbers):
    with pytest.raises(ovsam.InputError, match="There are 7 text embeddings for 2 entries"):
        model(
            features=features,
            text_embeds=numbers["text_embed"][:, 0],
            text_labels=["cat", "dog"],
            **prompts(numbers, "box"),
        )


# ---- words -----------------------------------------------------------------------------------------------------


def test_sentences_and_words_of_the_release(model):
    config = model.config
    assert list(config.templates) == list(TEMPLATES) and len(TEMPLATES) == 14
    assert [template.endswith(".") for template in TEMPLATES] == [True, *[False] * 4, *[True, True, True] * 3]
    assert "This is a photo of a medium {}." in TEMPLATES
    assert config.vocabulary == Vocabulary("coco").labels
    trained = config.clip2sam_config.trained_words
    assert len(trained) == 48 and set(trained) < set(config.vocabulary)
    novel = [5, 16, 19, 20, 25, 27, 36, 41, 43, 55, 57, 66, 71, 76, 4, 15, 31]
    assert not {config.vocabulary[i] for i in novel} & set(trained)


def test_tokenizer_is_clips(processor):
    stock = SimpleTokenizer()
    phrases = [template.replace("{}", word) for template in TEMPLATES for word in ("bat (animal)", "Crème brûlée 2's")]
    tokens = processor.tokenizer(phrases, padding="max_length", max_length=77)["input_ids"]
    assert torch.equal(torch.tensor(tokens), stock(phrases))


# ---- the whole folder ------------------------------------------------------------------------------------------


@KINDS
@torch.no_grad()
def test_click_and_box_have_the_class_names_of_the_release(model, processor, picture, numbers, kind, monkeypatch):
    """From the masks of the official decoder to names, scores and the final masks."""
    masks = numbers[f"{kind}.low_res_masks"]
    decoded = DecodedMasks(masks=masks[None], tokens=torch.zeros(1, len(masks), 1, 256))
    monkeypatch.setattr(model.sam, "decode", lambda features, **prompts: decoded)
    inputs = processor(
        images=picture,
        input_boxes=[numbers["boxes"].tolist()] if kind == "box" else None,
        input_points=[numbers["point_coords"].tolist()] if kind == "point" else None,
        input_labels=[[[1]] * 3] if kind == "point" else None,
    )
    sizes = inputs.pop("original_sizes").tolist()
    outputs = model(**inputs, text_embeds=numbers["text_embed"][:, 0], text_labels=list(WORDS))
    assert outputs.iou_scores is None and torch.equal(outputs.pred_masks[0], masks)
    # The official evaluation gives CLIP the true boxes; of a click there is only the mask's.
    theirs = numbers[f"{kind}.fused_logits" if kind == "box" else "point.fused_logits_maskbox"]
    roles = numbers["base_novel_indicator"]
    check_fused(outputs.logits[0], theirs, roles)

    kept = [i for i, role in enumerate(roles) if role]
    outputs.logits, outputs.scores = outputs.logits[..., kept], outputs.scores[..., kept]
    found = processor.post_process_instance_segmentation(
        outputs, target_sizes=sizes, text_labels=[WORDS[i] for i in kept]
    )[0]
    assert found["text_labels"] == [WORDS[i] for i in theirs[:, :-1].argmax(1)]
    p = theirs[:, :-1].amax(1).exp()
    assert distance(found["scores"], p) < 10 * TOLERANCE  # exp of a logarithm
    assert (found["masks"].flatten(1).sum(1) - numbers[f"{kind}.mask_area"]).abs().max() <= 2


def test_the_segmenter_passes_on_the_trained_words(model, processor, picture, features):
    segmenter, words, box = ovsam.Segmenter(model, processor), ["person", "bus"], [22.0, 30.0, 80.0, 95.0]
    found = segmenter.what(ovsam.EncodedImage(picture, features), boxes=[box], vocabulary=words)
    with torch.no_grad():
        given = {"features": features, "text_embeds": segmenter.embed(words)[1], "input_boxes": torch.tensor([[box]])}
        told, untold = model(**given, text_labels=words), model(**given)
    assert not torch.allclose(told.scores, untold.scores)
    assert abs(list(found)[0].score - told.scores.max().item()) < 1e-5


@torch.no_grad()
def test_folder_runs_saves_and_reloads(model, processor, picture, numbers, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its_processor = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    asked = {"images": picture, "text": {"puppy": "dog", "dog": "dog", "car": "car"}}
    asked |= {"input_points": [[[[60, 60]], [[180, 120]]]], "input_labels": [[[1], [1]]]}
    results = []
    for one, its in ((model, processor), (again, its_processor)):
        inputs = its(**asked)
        outputs = one(**{k: v for k, v in inputs.items() if k not in ("prompt_counts", "original_sizes")})
        results.append((outputs.pred_masks, outputs.logits, outputs.class_embeds))
        assert torch.equal(outputs.logits[..., 0], outputs.logits[..., 1])  # synonyms
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_parts_load_from_the_folder(converted, model):
    for part in (ovsam.OVSamVisionModel, ovsam.OVSamMaskDecoder):
        loaded, found = part.from_pretrained(converted, output_loading_info=True)
        assert not found["missing_keys"] and not found["unexpected_keys"]
        whole = model.state_dict()
        assert all(torch.equal(tensor, whole[name]) for name, tensor in loaded.state_dict().items())


def test_adapters_load_by_themselves(model, features, numbers, tmp_path):
    for name in ("sam2clip", "clip2sam"):
        getattr(model, name).save_pretrained(tmp_path / name)
        loaded = AutoModel.from_pretrained(tmp_path / name)
        assert type(loaded) is type(getattr(model, name))
        assert all(torch.equal(v, getattr(model, name).state_dict()[k]) for k, v in loaded.state_dict().items())


# ---- the converter ---------------------------------------------------------------------------------------------


def test_every_key_of_the_full_size_release_is_accounted_for():
    """Names and shapes are the full-size release's; each tensor is one random byte, repeated."""
    generator = torch.Generator().manual_seed(0)
    released = json.loads((HERE / "keys.json").read_text())["released"]
    parts = {
        "neck_student": "sam2clip",
        "fpn_neck": "clip2sam",
        "mask_decoder": "clip2sam",
        "clip_rn50x16.visual": "clip",
    }
    shapes = {
        f"{parts.get(part, 'sam')}/{key}": shape for part, shapes in released.items() for key, shape in shapes.items()
    }
    text = {"token_embedding.weight": [49408, 768], "positional_embedding": [77, 768], "text_projection": [768, 768]}
    text |= {f"ln_final.{name}": [768] for name in ("weight", "bias")} | {"logit_scale": []}
    with torch.device("meta"):
        layers = TextTransformer(context_length=77, vocab_size=9, width=768, heads=12, layers=12).transformer
    text |= {f"transformer.{key}": list(tensor.shape) for key, tensor in layers.state_dict().items()}
    shapes |= {f"clip/{key}": shape for key, shape in text.items()}
    # What training checkpoints hold besides, and SAM's own encoder.
    shapes |= {"sam2clip/backbone_student.stem.0.weight": [2], "clip2sam/pe.gaussian": [2], "clip2sam/neck.pos": [2]}
    shapes |= {"sam/image_encoder.pos_embed": [1, 64, 64, 1280], "clip/input_resolution": []}
    number = torch.randint(-100, 100, (len(shapes),), generator=generator).to(torch.int8)
    tensors = {key: number[i].expand(shape) for i, (key, shape) in enumerate(shapes.items())}

    config = read_config(tensors, "lvis")
    with torch.device("meta"):
        expected = {k: v.to(torch.int8) for k, v in ovsam.OVSamModel(config).state_dict().items()}
    mapped, unused = map_tensors(tensors, expected, RENAMES, UNUSED)

    assert mapped.keys() == expected.keys()
    assert all(mapped[name].shape == tensor.shape for name, tensor in expected.items())
    reasons = {
        "clip2sam/mask_decoder.label_mlp.": "multiplies its result by zero",
        "clip2sam/pe.": "training of",
        "clip2sam/neck.": "training of",
        "sam2clip/backbone_student.": "training of",
        "sam/mask_decoder.": "mask decoder of its own",
        "sam/image_encoder.": "is replaced by the SAM2CLIP adapter",
        "clip/input_resolution": "follows from the shapes",
    }
    for key, reason in unused.items():
        start = next(start for start in reasons if key.startswith(start))
        assert reasons[start] in reason
    used = [key for key in tensors if key not in unused]
    assert len(used) + len(unused) == len(tensors)
    # The position code has two names in our model.
    assert len(used) == len(mapped) - 1

    numbers = config.sam2clip_config
    assert (numbers.hidden_size, numbers.num_layers, numbers.num_heads, numbers.grid) == (1280, 5, 16, 64)
    assert (numbers.window_size, numbers.global_blocks) == (14, [4])
    assert config.clip2sam_config.roi_size == 7
    assert len(config.vocabulary) == 1203 and len(config.clip2sam_config.trained_words) == 866
    official = {"image_size": 384, "layers": [6, 8, 18, 8], "width": 96}
    assert config.clip_config.model_cfg["vision_cfg"] == official
    assert config.clip_config.model_cfg["quick_gelu"]


def copied(source: Path, folder: Path, change=lambda name, tensors: None) -> Path:
    """The four files again, with a change to their tensors."""
    folder.mkdir()
    for path in source.iterdir():
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        change(path.name, content.get("state_dict", content))
        save = save_file if path.suffix == ".safetensors" else torch.save
        save(content, folder / path.name)
    return folder


def _lose(name, tensors):
    tensors.pop("neck_student.level_encoding.weight", None)


def _spoil(name, tensors):
    if "fpn_neck.fpn_convs.2.conv.bias" in tensors:
        tensors["fpn_neck.fpn_convs.2.conv.bias"][3] = torch.nan


def _reshape(name, tensors):
    if "prompt_encoder.no_mask_embed.weight" in tensors:
        tensors["prompt_encoder.no_mask_embed.weight"] = torch.zeros(1, 255)


def _add(name, tensors):
    if "fpn_neck.fpn_convs.2.conv.bias" in tensors:
        tensors["mask_decoder.extra.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lose, "missing: none of the source becomes 'sam2clip.level_embed'"),
        (_spoil, "'clip2sam/fpn_neck.fpn_convs.2.conv.bias' holds NaN"),
        (_reshape, r"'sam/prompt_encoder.no_mask_embed.weight' gives .* the shape \[1, 255\]"),
        (_add, "'clip2sam/mask_decoder.extra.weight' has no place"),
    ],
)
def test_a_bad_tensor_stops_the_conversion(source, tmp_path, change, message):
    output = tmp_path / "out"
    with pytest.raises(ovsam.InputError, match=message):
        convert_checkpoint(copied(source, tmp_path / "in", change), output)
    assert not output.exists()


def test_a_bad_folder_stops_the_conversion(source, tmp_path):
    folder = copied(source, tmp_path / "in")
    (folder / "sam_small.pth").rename(folder / "sam_small.bak")
    with pytest.raises(ovsam.InputError, match="lacks SAM ViT-H, sam_vit_h_4b8939.pth"):
        convert_checkpoint(folder, tmp_path / "out")
    (folder / "sam_small.bak").rename(folder / "sam_small.pth")
    torch.save({"image_encoder.pos_embed": torch.zeros(2)}, folder / "other.pt")
    with pytest.raises(ovsam.InputError, match="other.pt is not a part of Open-Vocabulary SAM"):
        convert_checkpoint(folder, tmp_path / "out")
    torch.save({"neck_student.pos_embed": torch.zeros(2)}, folder / "other.pt")
    with pytest.raises(ovsam.InputError, match="are both the SAM2CLIP adapter"):
        convert_checkpoint(folder, tmp_path / "out")
    (folder / "other.pt").unlink()
    (folder / "clip2sam_coco_small.pth").rename(folder / "clip2sam_small.pth")
    with pytest.raises(ovsam.InputError, match="must contain the training data"):
        convert_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
