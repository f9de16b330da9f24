"""Whole models out of parts: against the models the parts came from, through folders in their authors' layouts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from common import CHANNELS, SIZE, WORDS, C, D, picture, sam_config, save_sam, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModel,
    EdgeTamVideoConfig,
    EdgeTamVideoModel,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VideoProcessor,
    Sam2VideoVideoProcessor,
    Sam3VideoConfig,
    SamModel,
    SamProcessor,
)
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

import ovsam
import ovsam_cli
from ovsam.checkpoints.compose import compose, compose_model, describe
from ovsam.errors import InputError
from ovsam.modeling.sam import SAM_SIDES
from ovsam.modeling.tracking import VideoPrompt

ROOT = Path(__file__).resolve().parents[2]
PICTURE = picture(5, width=150, height=90)
MODEL_INPUTS = ("pixel_values", "clip_pixel_values", "clip_window", "input_boxes", "input_points", "input_labels")
HEADS = {"width": 16, "mask_width": 12}


@pytest.fixture(scope="module")
def parts(sam_folder, clip_folder):
    sams, clips = ("sam", "sam2"), ("convnext", "clip", "owlv2")
    return {kind: sam_folder(kind) for kind in sams} | {kind: clip_folder(kind) for kind in clips}


@pytest.fixture(scope="module")
def photo(parts, tmp_path_factory):
    """SAM 2 + OWLv2, written by the command line, and its output."""
    folder = tmp_path_factory.mktemp("composed") / "photo"
    assert ovsam_cli.main(["compose", "--sam", parts["sam2"], "--clip", parts["owlv2"], "-o", str(folder)]) == 0
    return folder


def own_owlv2(folder):
    processor = Owlv2Processor(Owlv2ImageProcessor(size={"height": SIZE, "width": SIZE}), tiny_tokenizer())
    return Owlv2ForObjectDetection.from_pretrained(folder).eval(), processor


# --------------------------------------------------------------------------------------------- against the originals


@torch.no_grad()
def test_sam1_gets_the_padding_of_its_processor(parts):
    """Boxes and clicks on an image that is not square: the masks of transformers' pipeline, in pixels of the image."""
    model, processor = compose(parts["sam"], parts["clip"], vocabulary=list(WORDS))
    segmenter = ovsam.Segmenter(model, processor)
    own, own_processor = SamModel.from_pretrained(parts["sam"]).eval(), SamProcessor.from_pretrained(parts["sam"])
    for prompt, asked in (
        ({"input_boxes": [[[20.0, 10.0, 120.0, 70.0]]]}, {"boxes": [[20, 10, 120, 70]]}),
        ({"input_points": [[[[60.0, 40.0]]]], "input_labels": [[[1]]]}, {"points": [[60, 40]]}),
    ):
        inputs = own_processor(PICTURE, return_tensors="pt", **prompt)
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        # The processor makes float64 of coordinates.
        inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
        expected = own(**inputs, multimask_output=False)
        found = model(**{k: v for k, v in processor(PICTURE, **prompt).items() if k in MODEL_INPUTS})
        assert_close(found.pred_masks, expected.pred_masks, rtol=1e-4, atol=1e-4)
        masks = own_processor.image_processor.post_process_masks(expected.pred_masks, *sizes)[0][:, 0]
        found = segmenter.what(PICTURE, **asked)
        assert found[0].mask_score == pytest.approx(expected.iou_scores.item(), abs=1e-4)
        mask = torch.from_numpy(found[0].mask)
        assert mask.shape == masks[0].shape == (90, 150) and 0 < mask.float().mean() < 1
        assert (mask != masks[0]).float().mean() < 0.02  # enlarged in one step here, in two there


@torch.no_grad()
def test_a_tracker_gives_its_image_model(parts, tmp_path):
    """Released checkpoints of SAM 2 are those of its tracker."""
    own = Sam2Model.from_pretrained(parts["sam2"]).eval()
    config = {name: getattr(own.config, name).to_dict() for name in ("vision_config", "prompt_encoder_config")}
    config["mask_decoder_config"] = own.config.mask_decoder_config.to_dict()
    memory = {"memory_attention_hidden_size": C, "memory_attention_num_layers": 1, "memory_encoder_hidden_size": C}
    memory |= {"mask_downsampler_embed_dim": C, "memory_fuser_embed_dim": C, "memory_fuser_intermediate_dim": C}
    for part in ("prompt_encoder_config", "mask_decoder_config"):
        config[part].pop("model_type")
    tracker = Sam2VideoModel(Sam2VideoConfig(**config, **memory, image_size=SIZE))
    tracker.load_state_dict(own.state_dict(), strict=False)
    tracker.half().save_pretrained(tmp_path)
    images = Sam2ImageProcessor.from_pretrained(parts["sam2"])
    Sam2VideoProcessor(images, Sam2VideoVideoProcessor(size=images.size)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sam2_video"

    model, processor = compose(str(tmp_path), parts["clip"])
    assert model.config.sam_config.model_type == "sam2" and model.dtype == torch.float32
    assert not [name for name in vars(model.config.sam_config) if name.startswith("memory")]
    box = [[[20.0, 10.0, 120.0, 70.0]]]
    inputs = Sam2Processor(images)(PICTURE, input_boxes=box, return_tensors="pt")
    expected = own(inputs["pixel_values"], input_boxes=inputs["input_boxes"].float(), multimask_output=False)
    found = model(**{k: v for k, v in processor(PICTURE, input_boxes=box).items() if k in MODEL_INPUTS})
    assert_close(found.pred_masks, expected.pred_masks, rtol=0, atol=0.02 * float(expected.pred_masks.std()))
    assert_close(found.iou_scores, expected.iou_scores, rtol=0, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sam2_video", "edgetam_video"])
@torch.no_grad()
def test_a_tracker_that_keeps_its_memory_tracks_as_alone(kind, parts, tmp_path):
    save_sam(tmp_path / "sam", kind)
    own = {"sam2_video": Sam2VideoModel, "edgetam_video": EdgeTamVideoModel}[kind].from_pretrained(tmp_path / "sam")
    model, _ = compose(str(tmp_path / "sam"), parts["clip"], memory=True, vocabulary=list(WORDS))
    assert model.config.sam_config.model_type == kind and "video: by memory" in describe(model)
    assert "video: by label propagation" in describe(compose_model(str(tmp_path / "sam"), parts["clip"])[0])
    model.save_pretrained(tmp_path / "whole")
    # In double precision, as in tests/modeling/test_tracking.py: random weights amplify what is rounded.
    video = ovsam.OVSamVideoModel.from_pretrained(tmp_path / "whole").eval().double()
    own, frames = own.eval().double(), torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64)
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[30:80, 30:80] = True
    # The model input of the CLIP side is the frame as well.
    prepare = lambda frame: {"pixel_values": frame[None], "clip_pixel_values": frame[None]}  # noqa: E731
    session = ovsam.OVSamVideoSession(list(frames), prepare, SIZE, SIZE, tracker="memory")
    session.add_prompt(1, 0, VideoPrompt(mask=mask))
    theirs = Sam2VideoInferenceSession(video=frames, video_height=SIZE, video_width=SIZE, dtype=torch.float64)
    theirs.add_mask_inputs(theirs.obj_id_to_idx(1), 0, mask[None, None])
    theirs.obj_with_new_inputs = [1]
    for number in range(3):
        found = video(session, frame_idx=number)
        expected = own(theirs, frame_idx=number).pred_masks
        assert_close(found.pred_masks, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(InputError, match="has no memory to keep"):
        compose(parts["sam2"], parts["clip"], memory=True)


@pytest.mark.parametrize("family", ["edgetam", "sam3_tracker"])
@torch.no_grad()
def test_trackers_of_other_families(family, parts, tmp_path):
    """The names that weights and configurations have in `edgetam_video` and in `sam3_video`."""
    own = SAM_SIDES[family].model_class(sam_config(family))
    own.prompt_encoder.shared_embedding.load_state_dict(own.shared_image_embedding.state_dict())
    config = {name: getattr(own.config, name).to_dict() for name in ("vision_config", "prompt_encoder_config")}
    config["mask_decoder_config"] = own.config.mask_decoder_config.to_dict()
    for name in ("prompt_encoder_config", "mask_decoder_config"):
        config[name].pop("model_type")
    state = {key: value.clone() for key, value in own.state_dict().items()}
    if family == "edgetam":
        EdgeTamVideoConfig(**config).save_pretrained(tmp_path)
    else:
        Sam3VideoConfig(tracker_config=config | {"model_type": "sam3_tracker_video"}).save_pretrained(tmp_path)
        moved = {"vision_encoder.backbone.": "detector_model.vision_encoder.backbone."}
        moved |= {"vision_encoder.neck.": "tracker_neck."}
        for key in list(state):
            old = next((start for start in moved if key.startswith(start)), None)
            new = moved[old] + key.removeprefix(old) if old else f"tracker_model.{key}"
            state[new] = state.pop(key)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    model, _ = compose_model(str(tmp_path), parts["clip"])
    assert model.config.sam_config.model_type == family
    for key, value in model.sam.model.state_dict().items():
        assert torch.equal(value, own.state_dict()[key]), key


@torch.no_grad()
def test_the_layout_of_open_clip(parts, tmp_path):
    """Its weights, its colours, and its own tokeniser where the folder has none."""
    model, processor = compose(parts["sam2"], parts["convnext"], vocabulary=list(WORDS))
    saved = load_file(Path(parts["convnext"], "open_clip_model.safetensors"))
    for name, tensor in model.clip.model.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    # The input of a tower with stages has the size of SAM's, with its own normalisation.
    assert processor.clip_images["size"] == {"height": SIZE, "width": SIZE}
    assert processor.clip_images["image_mean"] == list(model.clip.image_mean) != processor.image_processor.image_mean

    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (bare / name).write_bytes(Path(parts["convnext"], name).read_bytes())
    _, processor = compose(parts["sam2"], str(bare), vocabulary=list(WORDS))
    assert processor.tokenizer("a cat")["input_ids"] == [49406, 320, 2368, 49407]


@pytest.mark.slow
@torch.no_grad()
def test_a_whole_model_is_a_source_of_every_part(tiny_folder):
    """Taken apart and composed again, it is the same model."""
    tiny, whole = str(tiny_folder), ovsam.load(tiny_folder, "cpu")
    model, processor = compose(tiny, tiny, clip2sam=tiny, concepts=tiny)
    assert model.config.vocabulary == whole.model.config.vocabulary
    assert tuple(model.config.templates) == tuple(whole.model.config.templates)
    assert processor.clip_images is None  # both sides get the same pixels
    expected, found = whole.model.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_calibrations_come_with_the_adapters_they_were_fitted_for():
    whole = tiny_model(score_calibration=[3.0, 1.0], name_calibration=[2.0, -1.0])
    made = ovsam.from_parts(whole, whole, clip2sam=whole, concepts=whole)
    assert made.config.score_calibration == [3.0, 1.0] and made.config.name_calibration == [2.0, -1.0]
    head = ovsam.from_parts(whole, whole, concepts=whole)
    assert head.config.score_calibration == [3.0, 1.0] and tuple(head.config.name_calibration) == (1.0, 0.0)


@torch.no_grad()
def test_parts_in_memory_are_copied(parts):
    own = Sam2Model.from_pretrained(parts["sam2"]).eval()
    clip = AutoModel.from_pretrained(parts["clip"])
    head = ovsam.ConceptHead(ovsam.ConceptHeadConfig(in_channels=CHANNELS["clip"], embed_dim=D, **HEADS))
    before = own.mask_decoder.mask_tokens.weight.clone()
    model = ovsam.from_parts(own, clip, concepts=head, score_threshold=0.4)
    assert model.config.score_threshold == 0.4 and model.config.vocabulary == "lvis"
    assert torch.equal(model.sam.model.mask_decoder.mask_tokens.weight, before)
    assert torch.equal(model.concepts.objectness.weight, head.objectness.weight)
    model.sam.model.mask_decoder.mask_tokens.weight.data.zero_()
    model.config.sam_config.mask_decoder_config.num_multimask_outputs = 1
    assert torch.equal(own.mask_decoder.mask_tokens.weight, before)
    assert own.config.mask_decoder_config.num_multimask_outputs == 3
    with pytest.raises(ovsam.InputError, match="in memory has no tokenizer"):
        compose(own, clip)


@torch.no_grad()
def test_adapters_on_a_plain_transformer_work_in_half_precision(parts):
    """Its maps are resampled, for which PyTorch has no half precision."""
    head = ovsam.ConceptHead(ovsam.ConceptHeadConfig(in_channels=CHANNELS["clip"], embed_dim=D, **HEADS))
    model = ovsam.from_parts(parts["sam2"], parts["clip"], concepts=head)
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    exact = model.encode(pixels).concepts
    found = model.bfloat16().encode(pixels).concepts
    assert found.objectness.dtype == torch.bfloat16
    assert torch.cosine_similarity(found.embeds.float(), exact.embeds, dim=-1).mean() > 0.98


# ------------------------------------------------------------------------------------------------- photo, as composed


@torch.no_grad()
def test_photo_equals_owlv2(photo, parts, monkeypatch):
    """Boxes and scores of OWLv2's own post-processing, in pixels of an image that is not square; one encoding each."""
    segmenter = ovsam.load(photo, "cpu")
    encodings = []
    for name, tower in (
        ("sam", segmenter.model.sam.model.vision_encoder.backbone.patch_embed),
        ("owlv2", segmenter.model.clip.model.owlv2.vision_model),
    ):
        tower.register_forward_hook(lambda *_, name=name: encodings.append(name))
    image = segmenter.encode(PICTURE)
    for question in (
        lambda: segmenter.where(image, ["cat", "red ball"], threshold=0.0),
        lambda: segmenter.where(image, ["dog"], threshold=0.0),
        lambda: segmenter.everything(image, ["cat", "dog", "moon"], objectness=0.0),
        lambda: segmenter.what(image, boxes=[[20, 10, 120, 70]], vocabulary=["cat", "dog"]),
    ):
        assert len(question())
    assert sorted(encodings) == ["owlv2", "sam"]

    own, own_processor = own_owlv2(parts["owlv2"])
    assert segmenter.model.config.templates == ["a photo of a {}"]
    phrases = ["a photo of a cat", "a photo of a red ball"]
    inputs = own_processor(text=[phrases], images=PICTURE, padding="longest", return_tensors="pt")
    expected = own_processor.post_process_grounded_object_detection(
        own(**inputs), threshold=0.0, target_sizes=[(PICTURE.height, PICTURE.width)]
    )[0]
    model, processor = segmenter.model, segmenter.processor
    embeds = segmenter.embed(["cat", "red ball"])[1]
    features = image.features
    logits = model._concept_naming(features.concepts, torch.arange(features.concepts.boxes.shape[1])[None]).logits(
        embeds
    )
    assert_close(logits[0].sigmoid().amax(-1), expected["scores"], rtol=1e-4, atol=1e-5)
    assert_close(logits[0].argmax(-1), expected["labels"])
    scale = torch.tensor([PICTURE.width, PICTURE.height] * 2) / SIZE
    limit = torch.tensor([PICTURE.width, PICTURE.height] * 2).float()
    boxes = torch.minimum(expected["boxes"].clamp(min=0), limit)
    assert_close(features.concepts.boxes[0] * scale, boxes, rtol=1e-4, atol=1e-3)
    # What the processor reports: the best of them, boxes as they were proposed.
    outputs = model(features=features, text_embeds=embeds, proposal_threshold=0.0)
    found = processor.post_process_grounded_object_detection(
        outputs,
        threshold=0.0,
        target_sizes=[(PICTURE.height, PICTURE.width)],
        text_labels=["cat", "red ball"],
        nms=None,
    )[0]
    best = expected["scores"].argmax()
    assert_close(found["scores"][0], expected["scores"][best], rtol=1e-4, atol=1e-5)
    assert_close(found["boxes"][0], boxes[best], rtol=1e-4, atol=1e-3)


def test_photo_on_the_command_line(photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    PICTURE.save("wide.png")
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    for question in (
        ["--text", "cat", "red ball", "--threshold", "0"],
        ["--point", "60,40", "--vocabulary", "words.txt"],
        ["--everything", "--vocabulary", "words.txt", "--threshold", "0", "--json", "all.json"],
    ):
        assert ovsam_cli.main(["segment", "wide.png", *question, "--model", str(photo), "--device", "cpu"]) == 0
        assert f"found ({photo})" in capsys.readouterr().err
    coco = json.loads((tmp_path / "all.json").read_text())
    assert coco["info"]["model"] == str(photo) and coco["annotations"]
    for annotation in coco["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert 0 <= x <= x + width <= 150 and 0 <= y <= y + height <= 90


def test_output_of_the_command(photo, parts, tmp_path, capsys):
    target = tmp_path / "composed"
    command = ["compose", "--sam", parts["sam2"], "--clip", parts["owlv2"], "-o", str(target)]
    assert ovsam_cli.main(command) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert (
        "Names of prompted masks: yes" in first and "words and everything: yes" in first and "video: by label" in first
    )
    assert rest == [
        f"  sam: {parts['sam2']} (Sam2Side, licence: apache-2.0)",
        f"  clip: {parts['owlv2']} (Owlv2Side, licence: not stated)",
    ]
    written = sorted(path.name for path in target.iterdir())
    assert {"config.json", "model.safetensors", "processor_config.json", "modeling_ovsam.py"} <= set(written)
    config = (target / "config.json").read_text()
    assert parts["sam2"] not in config and str(tmp_path) not in config

    def levels(value):
        if isinstance(value, dict) and "model_type" in value:
            yield value
        for part in value.values() if isinstance(value, dict) else ():
            yield from levels(part)

    found = list(levels(json.loads(config)))
    assert len(found) >= 8 and {level["dtype"] for level in found} == {"float32"}
    assert json.loads(config)["vocabulary"] == "lvis" and json.loads(config)["templates"] == ["a photo of a {}"]

    assert ovsam_cli.main(command) == 2  # nothing is overwritten
    assert "exists already" in capsys.readouterr().err
    assert ovsam_cli.main(["compose", "--sam", parts["clip"], "--clip", parts["clip"], "-o", str(tmp_path / "x")]) == 2
    assert "'clip'; a SAM must be one of sam, sam_hq" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["composed"]  # nor is anything left behind


def test_vocabulary_of_a_composed_model_is_lvis(photo, monkeypatch, tmp_path):
    monkeypatch.setattr("ovsam.inference.text_embedder.CACHE", tmp_path)
    segmenter = ovsam.load(photo, "cpu")
    segmenter.model.config.templates = ["{}"]  # this tokeniser takes every bracket for a word of its own
    found = segmenter.what(PICTURE, boxes=[[20, 10, 120, 70]])
    assert found[0].label in ovsam.Vocabulary("lvis").labels
    assert list(tmp_path.glob("*.safetensors"))  # embedded once


# ------------------------------------------------------------------------------------------------ parts that do not fit


WRONG = {
    "channels": (
        "clip2sam",
        {"in_channels": [8, 16, 24, 32]},
        "in_channels are 8, 16, 24, 32, the CLIP side's channels",
    ),
    "maps": ("clip2sam", {"in_channels": [32, 32, 32]}, "Clip2SamAdapter's maps are 3, the CLIP side's 4"),
    "width of words": ("concepts", {"embed_dim": 48}, "ConceptHead's embed_dim is 48, the CLIP side's 32"),
    "tokens": ("clip2sam", {"token_dim": 256}, "token_dim is 256, the width of the SAM side's tokens 32"),
    "width": ("sam2clip", {"width": 64}, "Sam2ClipAdapter's width is 64, the SAM side's 32"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_names_the_number_that_disagrees(parts, wrong):
    kind, changes, message = WRONG[wrong]
    right = {"in_channels": CHANNELS["clip"], "embed_dim": D, "width": 16}
    adapters = {
        "clip2sam": lambda: ovsam.Clip2SamAdapter(ovsam.Clip2SamConfig(**right | changes)),
        "concepts": lambda: ovsam.ConceptHead(ovsam.ConceptHeadConfig(**right | HEADS | changes)),
        "sam2clip": lambda: ovsam.Sam2ClipAdapter(ovsam.Sam2ClipConfig(in_channels=CHANNELS["clip"], **changes)),
    }
    given = {kind: adapters[kind]()}
    with pytest.raises(ovsam.InputError, match=message) as caught:
        ovsam.from_parts(parts["sam2"], parts["clip"], **given)
    assert str(caught.value).count(".") == 1  # one sentence


def test_a_stand_in_gives_as_many_maps_as_the_decoder_reads(parts):
    vit = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "global_blocks": [0], "grid": 8, "width": C}
    adapter = ovsam.Sam2ClipVitAdapter(ovsam.Sam2ClipVitConfig(in_channels=CHANNELS["clip"], **vit))
    with pytest.raises(ovsam.InputError, match="finer maps are 0, the SAM side's decoder reads 2"):
        ovsam.from_parts(parts["sam2"], parts["clip"], sam2clip=adapter)
    adapter = ovsam.Sam2ClipVitAdapter(ovsam.Sam2ClipVitConfig(in_channels=CHANNELS["clip"], **vit | {"grid": 16}))
    with pytest.raises(ovsam.InputError, match="grid is 16, the SAM side's 8"):
        ovsam.from_parts(parts["sam"], parts["clip"], sam2clip=adapter)


def test_wrong_parts_raise_an_error(parts, tiny_folder, tmp_path):
    head = ovsam.ConceptHead(ovsam.ConceptHeadConfig(in_channels=CHANNELS["clip"], embed_dim=D, **HEADS))
    head.save_pretrained(tmp_path / "head")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in Path(parts["sam2"]).iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    weights = load_file(damaged / "model.safetensors")
    del weights["no_memory_embedding"]
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_bytes((damaged / "config.json").read_bytes())
    (tmp_path / "cut" / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-9])
    clip = parts["clip"]
    for arguments, message in (
        ({"sam": parts["sam2"], "clip": parts["sam2"]}, "of type 'sam2'; a CLIP must be one of"),
        ({"sam": parts["sam2"], "clip": clip, "clip2sam": str(tmp_path / "head")}, "it has a ConceptHead"),
        (
            {"sam": parts["sam2"], "clip": clip, "concepts": clip},
            "passed as concepts, but it is a model of type clip",
        ),
        ({"sam": str(tiny_folder), "clip": clip, "sam2clip": str(tiny_folder)}, "it has no sam2clip"),
        ({"sam": str(tmp_path / "cut"), "clip": clip}, "is not a complete safetensors file"),
        ({"sam": str(tmp_path), "clip": clip}, "lacks the weight file model.safetensors"),
        ({"sam": "nowhere/at/all", "clip": clip}, "neither a folder nor the id"),
        ({"sam": parts["sam2"], "clip": clip, "composition": "both"}, "no composition 'both'"),
    ):
        with pytest.raises(ovsam.InputError, match=message):
            compose_model(**arguments)
    with pytest.raises(ovsam.InputError, match="no_memory_embedding"):
        compose_model(str(damaged), clip)


def test_a_model_without_any_classifier(parts):
    """Of SAM alone, without adapters, there are masks but no names."""
    segmenter = ovsam.Segmenter(*compose(parts["sam"], parts["clip"], composition="sam", vocabulary=list(WORDS)))
    image = segmenter.encode(PICTURE)
    assert segmenter.what(image, boxes=[[20, 10, 120, 70]])[0].label == "object"
    assert {one.label for one in segmenter.everything(image, objectness=0.0)} <= {"object"}
    with pytest.raises(
        ovsam.InputError, match="cannot classify; text queries need a proposer that scores them, such as detector:"
    ):
        segmenter.where(image, ["cat", "red ball"])


def test_describe(parts):
    head = ovsam.ConceptHead(ovsam.ConceptHeadConfig(in_channels=CHANNELS["clip"], embed_dim=D, **HEADS))
    nothing_trained = (
        "yes, by CLIP's own features; words and everything: yes, by the proposer clip-dense; video: by label "
        "propagation"
    )
    for given, sentence in (
        ({}, f"{nothing_trained}; missing: clip2sam and concepts, to be trained."),
        ({"concepts": head}, "yes, by the locations that match them; words and everything: yes, by its ConceptHead"),
        ({"composition": "sam"}, "no; words and everything: only with a proposer such as detector:ID"),
    ):
        model, _ = compose_model(parts["sam2"], parts["clip"], **given)
        assert f"Names of prompted masks: {sentence}" in describe(model)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_part_never_runs(parts, tmp_path, monkeypatch, file):
    """transformers asks whether it may run code of a folder of a type that it does not know; the answer is no."""
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "clip"
    shutil.copytree(parts["clip"], folder)
    settings = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    auto_map = {"AutoConfig": "evil.X", "AutoTokenizer": ["evil.X", None]}
    settings |= {"model_type": "strange", "tokenizer_class": "Strange", "auto_map": auto_map}
    (folder / file).write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\nclass X: pass\n")
    try:
        compose(sam=parts["sam2"], clip=str(folder))
    except InputError:
        pass
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 100_000), ("hidden_size", "wide"), ("hidden_size", -3), ("hidden_act", 5)]
)
def test_settings_of_a_part_that_cannot_be_used_are_one_sentence(parts, tmp_path, key, value):
    folder = tmp_path / "clip"
    shutil.copytree(parts["clip"], folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"] |= {key: value}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError) as error:
        compose(sam=parts["sam2"], clip=str(folder))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
