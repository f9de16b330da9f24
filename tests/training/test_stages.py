"""Each training stage against numbers by hand or another implementation; its loss falls, and only declared parameters
change."""

import copy

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from common import SIZE, D, randomise, tiny_config, tiny_model
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from testers.stage import WORDS, StageTester, draw_batch, draw_words, towers
from torch import nn
from torch.testing import assert_close
from torch.utils.data import Dataset
from transformers import CLIPModel, Owlv2Config, Sam2Model, ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.mask2former import modeling_mask2former as mask2former

from ovsam.errors import InputError
from ovsam.modeling.adapters.common import maps_at_strides
from ovsam.modeling.adapters.concepts import ConceptHead, ConceptHeadConfig
from ovsam.modeling.adapters.mask_head import MARGIN
from ovsam.modeling.adapters.sam2clip import Sam2ClipAdapter, Sam2ClipConfig
from ovsam.modeling.clip import CLIP_SIDES, OpenClipConfig
from ovsam.modeling.outputs import ConceptOutput
from ovsam.modeling.sam import DecodedMasks
from ovsam.ops.boxes import masks_to_boxes
from ovsam.training.feature_cache import FeatureCache, state_hash
from ovsam.training.stages import losses
from ovsam.training.stages import prompts as targets
from ovsam.training.stages.adapters import AdaptersStage
from ovsam.training.stages.clip import ClipStage, drop_patches
from ovsam.training.stages.clip2sam import Clip2SamStage, background_prompts
from ovsam.training.stages.concepts import ConceptsStage, assign
from ovsam.training.stages.mae import MaeStage, masked_error
from ovsam.training.stages.sam import SamStage, going_on, random_window
from ovsam.training.stages.sam2clip import Sam2ClipStage, start_linear
from ovsam.training.stages.text_embeddings import WordTable
from ovsam.training.stages.towers import Towers, build_towers, clip_side, sam_side
from ovsam.training.stages.word_losses import WordLosses, text_targets

VIT = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear", "image_size": 64}


@pytest.fixture(scope="module")
def words():
    return draw_words()


@pytest.fixture(scope="module")
def batch():
    return draw_batch()


def owl():
    tower = {"hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    text = tower | {"vocab_size": 64, "max_position_embeddings": 12}
    config = Owlv2Config(
        text_config=text, vision_config=tower | {"image_size": SIZE, "patch_size": 16}, projection_dim=D
    )
    return randomise(CLIP_SIDES["owlv2"](config, part="vision"))


class TestClip(StageTester):
    trained = ("clip.", "lit.")

    def make(self, words):
        return ClipStage(words, towers())


class TestSam(StageTester):
    trained = ("towers.sam.",)

    def make(self, words):
        return SamStage(towers(), prompts=2, clicks=1)


class TestSamOverClip(StageTester):
    trained = ("sam2clip.", "towers.sam.model.prompt_encoder.", "towers.sam.model.mask_decoder.")

    def make(self, words):
        over_clip = towers(composition="clip")
        size = {"in_channels": over_clip.channels, "embed_dim": D, "width": 16}
        over_clip.concepts = randomise(ConceptHead(ConceptHeadConfig(**size))).requires_grad_(False)
        return SamStage(over_clip, prompts=2, clicks=1, layers=1, heads=4, cache=True, window=SIZE // 2)

    def test_it_publishes_no_image_encoder(self, words):
        names = self.make(words).published_state()
        assert not any("vision_encoder" in name or "no_memory" in name for name in names)

    def test_cached_maps_equal_those_of_the_tower(self, words, batch, tmp_path):
        stage = self.make(words)
        cached = stage.prepare(Pictures(batch), tmp_path, "pictures, seed 1")
        assert isinstance(cached, FeatureCache) and cached[1].keys() >= {"map_0", "map_1", "map_2", "map_3"}
        maps = stage.towers.maps(batch["image"])
        kept = {name: torch.stack([cached[0][name], cached[1][name]]) for name in cached[0] if name.startswith("map_")}
        for one, other in zip(stage.towers.maps(batch["image"], kept=kept), maps, strict=True):
            assert_close(one, other, rtol=2e-3, atol=2e-3)  # half precision
        window, masks = random_window(maps, batch["masks"], SIZE // 2)
        assert [m.shape[-1] for m in window] == [SIZE // 8, SIZE // 16, SIZE // 32, SIZE // 64]
        assert masks.shape[-1] == SIZE // 2

    def test_the_maps_of_a_trained_encoder_are_not_cached(self, words):
        with pytest.raises(InputError, match="the maps of a trained encoder change"):
            SamStage(towers(), cache=True)
        with pytest.raises(InputError, match="leave out cache or train_clip"):
            AdaptersStage(words, towers(), width=16, train_clip=True, cache=True)


class TestSam2Clip(StageTester):
    trained = ("sam2clip.",)
    options: dict = {}

    def make(self, words):
        return Sam2ClipStage(towers(), layers=1, heads=4, cache=False, **self.options)


class TestSam2ClipWithPromptsInTheLoop(TestSam2Clip):
    options = {"loops": 1, "prompts": 2}


class TestSam2ClipWithTrueMasks(TestSam2Clip):
    options = {"loops": 1, "prompts": 2, "true_masks": True}


class TestClip2Sam(StageTester):
    trained = ("clip2sam.", "word_losses.")
    options: dict = {}

    def make(self, words):
        return Clip2SamStage(words, towers(), width=16, prompts=2, **self.options)


class TestClip2SamWithDecoder(TestClip2Sam):
    trained = ("clip2sam.", "word_losses.", "towers.sam.model.mask_decoder.")
    options = {"train_decoder": True, "mask_token": True, "points": 512}


class TestConcepts(StageTester):
    trained = ("concepts.", "word_losses.")

    def make(self, words):
        return ConceptsStage(words, towers(clip="convnext"), width=16, mask_objects=4)


class TestAdapters(StageTester):
    trained = ("concepts.", "clip2sam.", "word_losses.")

    def make(self, words):
        return AdaptersStage(words, towers(), width=16)

    def test_frozen_towers_keep_their_batch_statistics(self, words):
        stage = self.make(words).train()
        assert not stage.towers.clip.training and not stage.towers.sam.training and stage.concepts.training


class TestAdaptersWithClip(StageTester):
    trained = ("concepts.", "clip2sam.", "word_losses.", "lit.", "towers.clip.")

    def make(self, words):
        return AdaptersStage(words, towers(), width=16, train_clip=True)

    def test_a_trained_tower_updates_its_batch_statistics(self, words):
        assert self.make(words).train().towers.clip.training


class TestAdaptersWithTeacher(StageTester):
    trained = ("concepts.", "clip2sam.", "word_losses.")

    def make(self, words):
        both = Towers(towers().sam, owl(), composition="sam")
        return AdaptersStage(words, both, width=16, teacher_weight=1.0)


class TestMae(StageTester):
    trained = ("",)
    test_it_goes_on_from_its_published_state_and_predicts = None  # the encoder alone is published

    def make(self, words):
        return MaeStage("test_vit", 96, decoder_width=32, decoder_depth=1, decoder_heads=2)


# ------------------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (2.0, None), (0.0, None), (0.0, 0.75)])
def test_focal_loss(gamma, alpha):
    """Lin et al. 2017, eq. 5, written out."""
    logits, target = torch.randn(4, 5), (torch.rand(4, 5) > 0.5).float()
    p = torch.where(target > 0, logits.sigmoid(), 1 - logits.sigmoid())
    weight = torch.ones_like(p) if alpha is None else torch.where(target > 0, alpha, 1 - alpha)
    want = -weight * (1 - p) ** gamma * p.log()
    torch.testing.assert_close(losses.focal_loss(logits, target, gamma, alpha), want, atol=1e-6, rtol=1e-5)


def test_giou_loss_and_iou():
    """Rezatofighi et al. 2019, algorithm 1: overlapping, apart, equal, without area."""
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 2, 2], [1, 1, 5, 3], [3, 3, 3, 3]])
    targets = torch.tensor([[2.0, 2, 6, 6], [4, 0, 6, 2], [1, 1, 5, 3], [0, 0, 2, 2]])
    loss, iou = losses.giou_loss(boxes, targets)
    union, hull = torch.tensor([28.0, 8, 8, 4]), torch.tensor([36.0, 12, 8, 9])
    torch.testing.assert_close(iou, torch.tensor([4 / 28, 0, 1, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(loss, 1 - iou + (hull - union) / hull, atol=1e-6, rtol=0)


def test_point_losses_are_mask2formers():
    logits, truth = torch.randn(3, 16, 16), (torch.rand(3, 64, 64) > 0.5).float()
    torch.manual_seed(0)
    with torch.no_grad():
        points = mask2former.Mask2FormerLoss.sample_points_using_uncertainty(
            None, logits[:, None], lambda values: -values.abs(), 200, 3, 0.75
        )
    got = mask2former.sample_point(logits[:, None], points, align_corners=False).squeeze(1)
    want = mask2former.sample_point(truth[:, None], points, align_corners=False).squeeze(1)
    torch.manual_seed(0)
    pixel, dice = losses.point_mask_losses(logits, truth, 200)
    torch.testing.assert_close(pixel.mean(), mask2former.sigmoid_cross_entropy_loss(got, want, 3))
    torch.testing.assert_close(dice.mean(), mask2former.dice_loss(got, want, 3))


def test_background_is_a_class_of_low_weight():
    table = WordTable(torch.eye(3), torch.zeros(0, 3), torch.zeros(3, 0, dtype=torch.bool), torch.tensor([True] * 3))
    naming = WordLosses(table, background_weight=0.1)
    embeds = F.normalize(torch.tensor([[1.0, 0.2, 0], [0, 0.3, 1.0], [0.1, 0.1, 0.1]]), dim=-1)
    loss, top1 = naming.classify(embeds, torch.tensor([0, 1, -1]))
    logits = torch.cat([embeds * naming.scale.exp(), torch.zeros(3, 1)], 1).log_softmax(-1)
    weights = torch.tensor([1.0, 1.0, 0.1])
    want = -(logits[range(3), [0, 1, 3]] * weights).sum() / weights.sum()
    torch.testing.assert_close(loss, want)
    assert top1 == 0.5  # of the two that are named
    # Without the class, background is ignored.
    alone = WordLosses(table).classify(embeds, torch.tensor([0, 1, -1]))[0]
    torch.testing.assert_close(alone, F.cross_entropy(embeds[:2] * naming.scale.exp(), torch.tensor([0, 1])))


def test_an_unknown_word_is_no_negative(words):
    naming = WordLosses(words)
    known = torch.ones(1, WORDS, dtype=torch.bool)
    known[0, 3] = False
    logits = torch.zeros(2, 5 + 4, requires_grad=True)
    asked = naming.known_texts(known).expand(2, -1)
    naming.word_loss(logits, torch.tensor([0]), asked).backward()
    silent = logits.grad == 0
    # Word 3 and its own keyword 3 get no gradient from an object of word 0, nor from background.
    assert silent.nonzero().tolist() == [[0, 3], [0, 5 + 3], [1, 3], [1, 5 + 3]]
    # But an object that is annotated with it is one, known or not.
    logits.grad = None
    naming.word_loss(logits, torch.tensor([3]), asked).backward()
    assert logits.grad[0, 3] < 0 and logits.grad[1, 3] == 0


def test_text_targets_leave_out_words_that_share_a_keyword():
    table = WordTable(
        names=torch.eye(3),
        keywords=torch.eye(2, 3),
        has_keyword=torch.tensor([[True, False], [True, False], [False, True]]),
        is_base=torch.tensor([True, True, False]),
    )
    # Words 0 and 1 share their only keyword; word 2 is novel, so its name is no target of anyone.
    assert text_targets(table).tolist() == [[1, -1, 1, 0], [-1, 1, 1, 0], [0, 0, 0, 1]]


# --------------------------------------------------------------------------------------------------------------- sam


def decoded(single, three, iou=(0.1, 0.2, 0.9, 0.3)):
    """Four constant masks of 4 x 4 cells with the given logits."""
    masks = torch.tensor([single, *three])[None, None, :, None, None].expand(1, 1, 4, 4, 4)
    return DecodedMasks(masks=masks, iou=torch.tensor(iou)[None, None])


def test_sam_loss_by_hand():
    stage = SamStage(towers())
    target, valid = torch.ones(1, 1, 4, 4), torch.ones(1, 1)
    out = decoded(1.0, (2.0, -3.0, 0.0))

    def one(logit):  # 20 focal + dice of a constant mask against ones
        p = torch.tensor(logit).sigmoid()
        return 20 * 0.25 * (1 - p) ** 2 * -p.log() + 1 - (2 * 16 * p + 1) / (16 * p + 16 + 1)

    # A first prompt: the best of three, and the squared errors of their three IoUs (1, 0, 0 in truth).
    quality = ((0.2 - 1) ** 2 + 0.9**2 + 0.3**2) / 3
    got = stage.mask_losses(out, target, valid, stage.first)
    torch.testing.assert_close(got, one(2.0) + quality)
    # Later ones: the single mask, whose IoU is 1.
    got = stage.mask_losses(out, target, valid, stage.later)
    torch.testing.assert_close(got, one(1.0) + (0.1 - 1) ** 2)
    # As ovsam-tiny was trained: both, always.
    stage = SamStage(towers(), focal_weight=5.0, dice_weight=5.0, focal_gamma=0.0, focal_alpha=0.0)
    p = torch.tensor([1.0, 2.0]).sigmoid()
    each = 5 * -p.log() + 5 * (1 - (32 * p + 1) / (16 * p + 17))
    quality = ((0.1 - 1) ** 2 + (0.2 - 1) ** 2 + 0.9**2 + 0.3**2) / 4
    got = stage.mask_losses(out, target, valid, (1.0, 0.5))
    torch.testing.assert_close(got, each[0] + 0.5 * each[1] + quality)


def test_the_mask_of_the_highest_predicted_iou_goes_on():
    out = decoded(1.0, (2.0, -3.0, 0.0))
    assert (going_on(out, (0.0, 1.0)) == -3.0).all()  # predicted IoU 0.9
    assert (going_on(out, (1.0, 0.0)) == 1.0).all()


def test_rounds_of_clicks_are_those_of_the_paper():
    stage = SamStage(towers())
    plans = [stage.plan() for _ in range(40)]
    assert all(len(plan) == 11 and sum(plan) == 9 and plan[0] and not plan[-1] for plan in plans)
    places = {plan.index(False) for plan in plans}
    assert len(places) > 4  # the other round without a click lies anywhere
    short = SamStage(towers(), clicks=1, repeats=0, click_share=0.5)
    assert {len(short.plan()) for _ in range(40)} == {1, 2}


def test_corrective_clicks_lie_in_the_error_and_have_its_label():
    truth = torch.zeros(1, 3, 8, 8, dtype=torch.bool)
    truth[:, :, 2:4, 2:4] = True
    predicted = truth.clone()
    predicted[0, 0, 2:4, 2:4] = False  # missed
    predicted[0, 1, 6, 5] = True  # too much
    clicks, labels = targets.corrective_clicks(predicted, truth, 32)
    assert labels.tolist() == [[[1], [0], [-1]]]
    x, y = (clicks[0, 0, 0] + 0.5).tolist()
    assert 8 <= x <= 16 and 8 <= y <= 16
    assert (clicks[0, 1, 0] + 0.5).tolist() == [5.5 * 4, 6.5 * 4]


def test_points_of_label_minus_one_are_the_padding_of_sam(batch):
    stage = SamStage(towers()).eval()
    points = torch.tensor([[[[20.0, 30.0], [0.0, 0.0]]]])
    padded = stage.embed(points, torch.tensor([[[1, -1]]]))
    want, _ = stage.sam.model.prompt_encoder(points, torch.tensor([[[1, -1]]]), None, None)
    torch.testing.assert_close(padded[:, :, :2], want[:, :, :2])


def test_the_stage_sam_raises_an_error_for_other_sam_models():
    older = towers()
    del older.sam.model.no_memory_embedding  # SAM 1 has none
    with pytest.raises(InputError, match="SAM 2 and EdgeTAM"):
        SamStage(older)
    with pytest.raises(InputError, match="repeats is 3"):
        SamStage(towers(), repeats=3)


# ---------------------------------------------------------------------------------------------------------- sam2clip


class Pictures(Dataset):
    words = ["a"]

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["image"])

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.batch.items()}


def test_the_teacher_runs_once_and_a_broken_file_is_made_again(batch, tmp_path, monkeypatch):
    stage = Sam2ClipStage(towers(), layers=1, heads=4)
    asked = []
    teach = Sam2ClipStage.teach
    monkeypatch.setattr(Sam2ClipStage, "teach", lambda self, image: asked.append(len(image)) or teach(self, image))
    cached = stage.prepare(Pictures(batch), tmp_path, "pictures, seed 1")
    assert len(asked) == 2 and isinstance(cached, FeatureCache) and cached.words == ["a"]
    # The cached features are the teacher's, to half precision, and train to the same loss.
    items = [cached[0], cached[1]]
    stacked = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    direct = teach(stage, batch["image"])
    for name, tensor in direct.items():
        torch.testing.assert_close(stacked[name].float(), tensor, atol=1e-2, rtol=2e-3)
    torch.testing.assert_close(stage(**stacked)["loss"], stage(**batch)["loss"], rtol=1e-3, atol=0)

    asked.clear()
    stage.prepare(Pictures(batch), tmp_path, "pictures, seed 1")
    assert not asked
    whole = cached.path(1).read_bytes()
    cached.path(1).write_bytes(whole[:100])  # as a full disk leaves it
    stage.prepare(Pictures(batch), tmp_path, "pictures, seed 1")
    assert asked == [1] and cached.path(1).read_bytes() == whole

    # Another data set or another teacher has files of its own.
    asked.clear()
    stage.prepare(Pictures(batch), tmp_path, "pictures, seed 2")
    with torch.no_grad():
        next(stage.towers.sam.parameters()).add_(1)
    stage.prepare(Pictures(batch), tmp_path, "pictures, seed 1")
    assert len(asked) == 4 and len(list(tmp_path.iterdir())) == 3


def test_the_hash_of_a_teacher_is_that_of_its_numbers():
    side = towers().sam
    assert state_hash(side) == state_hash(copy.deepcopy(side))
    with torch.no_grad():
        next(side.parameters()).view(-1)[0] += 1e-3
    assert state_hash(side) != state_hash(towers().sam)


def test_sam2clip_loss_is_the_error_per_pixel(batch):
    stage = Sam2ClipStage(towers(), layers=1, heads=4, cache=False)
    out = stage(**batch)
    teacher = stage.towers.encode_sam(batch["image"])
    student = stage.sam2clip(stage.towers.maps(batch["image"]))
    error = (student.embedding - teacher.embedding).square().mean()
    torch.testing.assert_close(out["embedding_mse"], error)
    finer = sum((s - t).square().mean() for s, t in zip(student.high_res, teacher.high_res, strict=True))
    torch.testing.assert_close(out["loss"], error + finer)
    # A student that is the teacher decodes its masks.
    loss, iou = stage.prompt_in_the_loop(teacher, teacher, batch["masks"])
    assert iou == 1 and loss > 0  # cross entropy and Dice against the teacher's thresholded mask


def test_sam2clip_needs_one_geometry():
    with pytest.raises(InputError, match="clip_size"):
        Sam2ClipStage(towers(clip_size=64))


def test_true_masks_need_no_teacher_and_train_all_four_masks(batch):
    stage = Sam2ClipStage(towers(), layers=1, heads=4, cache=False, loops=1, prompts=2, true_masks=True)
    features = stage.towers.encode_sam(batch["image"])
    loss, iou = stage.prompt_in_the_loop(features, None, batch["masks"])
    assert loss > 0 and 0 <= iou < 1  # a random decoder does not find them

    generator = torch.Generator().manual_seed(3)
    masks, target = torch.randn(1, 2, 4, 8, 8, generator=generator), torch.zeros(1, 2, 8, 8)
    target[..., 2:6] = 1
    predicted = torch.rand(1, 2, 4, generator=generator)
    each = stage.mask_losses(DecodedMasks(masks=masks, iou=predicted), target)
    for p in range(2):
        by_mask = [
            F.binary_cross_entropy_with_logits(masks[0, p, m], target[0, p])
            + losses.dice_loss(masks[0, p, m], target[0, p])
            for m in range(4)
        ]
        found = [losses.mask_iou(masks[0, p, m], target[0, p]) for m in range(4)]
        quality = (predicted[0, p] - torch.stack(found)).square().mean()
        torch.testing.assert_close(each[0, p], by_mask[0] + 0.5 * min(by_mask[1:]) + quality)


def test_the_linear_start_finds_a_linear_teacher():
    torch.manual_seed(0)
    channels, pictures = [4, 6, 8, 10], 24
    config = Sam2ClipConfig(in_channels=channels, width=16, num_layers=2, num_heads=2)
    teacher, student = Sam2ClipAdapter(config), Sam2ClipAdapter(config)
    sizes = list(zip(channels, (32, 16, 8, 4), strict=True))
    maps = [tuple(torch.randn(1, c, side, side) for c, side in sizes) for _ in range(pictures)]
    with torch.no_grad():
        start_linear(teacher, maps, [teacher(m) for m in maps])  # from here on it is linear
        for layer in (*teacher.pyramid.laterals, teacher.stride4):
            torch.nn.init.normal_(layer.weight)
            torch.nn.init.normal_(layer.bias)
        wanted = [teacher(m) for m in maps]
        start_linear(student, maps[:-1], wanted[:-1])
        found = student(maps[-1])  # an image that it was not fitted to
    for ours, theirs in zip(found.pyramid, wanted[-1].pyramid, strict=True):
        assert (ours - theirs).square().mean() < 1e-3 * theirs.var()


def test_the_linear_start_is_nearer_to_the_teacher(batch, tmp_path):
    stage = Sam2ClipStage(towers(), layers=1, heads=4, cache=False, start=2)
    before = stage(**batch)
    data = Pictures(batch)
    assert stage.prepare(data, tmp_path, "pictures") is data
    after = stage(**batch)
    assert after["embedding_mse"] < 0.5 * before["embedding_mse"]
    assert after["high_res_mse"] < 0.5 * before["high_res_mse"]
    with pytest.raises(InputError, match="strides 4 and 8"):
        Sam2ClipStage(towers(sam="sam"), start=2)


# ---------------------------------------------------------------------------------------------------------- clip2sam


def test_an_image_label_has_no_mask_loss(words, batch):
    stage = Clip2SamStage(words, towers(), width=16, prompts=2, train_decoder=True, points=256)
    whole = batch | {"masks": torch.zeros_like(batch["masks"]), "word_ids": torch.full_like(batch["word_ids"], -1)}
    whole["masks"][:, 0], whole["word_ids"][:, 0] = True, 2
    out = stage(**whole)
    assert out["mask"] == 0 and out["name"] > 0
    out["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in stage.decoder.parameters())
    mixed = {name: torch.cat([batch[name], whole[name]]) for name in batch}
    assert stage(**mixed)["mask"] > 0


def test_clip2sam_loss_is_the_sum_of_the_paper(words, batch):
    stage = Clip2SamStage(words, towers(), width=16, prompts=3, train_decoder=True, points=256, word_weight=0.0)
    out = stage(**batch)
    torch.testing.assert_close(out["loss"], 2 * out["name"] + out["mask"])


def test_background_prompts_hit_no_object_where_all_objects_are_known(batch):
    known = batch["known"].clone()
    known[1, 0] = False
    nothing = background_prompts(batch["masks"], known, 4)
    x, y = nothing.points.long().unbind(-1)
    assert not batch["masks"][0, :, y[0], x[0]].any()
    assert nothing.valid[0].any() and not nothing.valid[1].any()
    full = torch.ones_like(batch["masks"])
    assert not background_prompts(full, batch["known"], 4).valid.any()


def test_clip_may_take_a_smaller_image(words, batch):
    """SigLIP at a size of its own beside a larger SAM: boxes and masks move into its frame."""
    stage = Clip2SamStage(words, towers(clip_size=64), width=16, prompts=2)
    assert stage(**batch)["loss"].isfinite()
    decoded_ = stage.towers.sam.decode(
        stage.towers.encode_sam(batch["image"]), input_boxes=torch.tensor([[[16.0, 16, 80, 96]]] * 2)
    )
    seen = []
    stage.clip2sam.register_forward_hook(lambda module, inputs, out: seen.append(inputs))
    stage.name(stage.towers.maps(batch["image"]), decoded_, torch.tensor([[[16.0, 16, 80, 96]]] * 2), SIZE)
    maps, boxes, masks = seen[0][:3]
    assert maps[0].shape[-1] == 16 and boxes[0, 0].tolist() == [8, 8, 40, 48] and masks.shape[-1] == 16


# ---------------------------------------------------------------------------------------------------------- concepts


def test_a_location_belongs_to_the_object_under_it(batch):
    masks = batch["masks"]
    place = assign(masks, masks_to_boxes(masks), (16, 32))
    assert place.owner.shape == (2, 8 * 8 + 4 * 4)
    for b in range(2):
        # Each object has at least one location that is surely its own.
        sure = {int(o) for o, c in zip(place.owner[b], place.centrality[b], strict=True) if c > 0.5}
        assert sure == {0, 1}


def test_objects_without_a_name_train_all_but_words(words, batch):
    stage = ConceptsStage(words, towers(), width=16)
    nameless = batch | {"word_ids": torch.full_like(batch["word_ids"], -1)}
    nameless["known"] = torch.zeros_like(batch["known"])
    out = stage(**nameless)
    assert out["concept_name"] == 0 and out["concept_word"] == 0
    assert min(out["box"], out["objectness"], out["mask"]) > 0


def test_an_image_label_labels_no_location(words, batch):
    stage = ConceptsStage(words, towers(), width=16, box_noise=0.0, mask_objects=100)  # no random numbers
    whole = batch | {"masks": torch.zeros_like(batch["masks"])}
    whole["masks"][:, 0] = True
    assert stage(**whole)["loss"] == 0
    both = {name: torch.cat([batch[name], whole[name]]) for name in batch}
    torch.testing.assert_close(stage(**both)["loss"], stage(**batch)["loss"])


def test_the_mask_loss_compares_masks_inside_the_regions(words):
    """Objects that fill their boxes, which are 1 / MARGIN of the regions across."""
    stage = ConceptsStage(words, towers(), width=16, box_noise=0.0)
    masks = torch.zeros(1, 2, 128, 128, dtype=torch.bool)
    masks[0, 0, 10:60, 20:90] = masks[0, 1, 70:120, 5:40] = True
    inside = ((torch.arange(56) + 0.5) / 56 * 2 - 1).abs() < 1 / MARGIN

    def head(sign):
        logits = torch.where(inside[:, None] & inside, 10.0, -10.0).expand(1, 2, -1, -1) * sign
        return lambda features, regions: (F.avg_pool2d(logits, 2), logits)

    found = {}
    for sign in (1, -1):
        stage.concepts.mask_head.forward = head(sign)
        found[sign] = stage.mask_loss(ConceptOutput(mask_features=()), masks)
    assert found[1][0] < 0.6 and found[1][1] > 0.95
    assert found[-1][0] > 10 and found[-1][1] < 0.1


def test_an_unknown_word_gets_no_gradient_from_any_location(words, batch):
    stage = ConceptsStage(words, towers(), width=16)
    stage.word_losses.texts.requires_grad_(True)
    known = batch["known"].clone()
    known[:, 4] = False  # of no object in the batch
    out = stage.concepts(stage.towers.maps(batch["image"]))
    losses_, _ = stage.concept_losses(out, batch["masks"], batch["word_ids"], known)
    (gradient,) = torch.autograd.grad(losses_["concept_word"], stage.word_losses.texts)
    assert (gradient[4] == 0).all() and (gradient[:4].abs().sum(1) > 0).all()


def test_the_embedding_of_the_teacher_is_that_of_the_best_fitting_location(batch):
    side = owl()
    both = Towers(towers().sam, side, composition="sam")
    out = side.concepts(side.encode_image(both.clip_pixels(batch["image"])))
    # The box of a location itself is fitted best by that location, if it is object-like enough.
    with torch.no_grad():
        index = out.objectness.argmax(1)
    boxes = out.boxes[range(2), index][:, None]
    taught = both.teach(batch["image"], boxes)
    torch.testing.assert_close(taught[:, 0], out.embeds[range(2), index])
    # Any other CLIP pools its own map.
    plain = towers()
    want = plain.clip.pool(plain.clip.encode_image(plain.clip_pixels(batch["image"])), boxes=boxes)
    torch.testing.assert_close(plain.teach(batch["image"], boxes), want)


# --------------------------------------------------------------------------------------------------------- clip, FLIP


def open_clip_side(**vision):
    text = {"context_length": 12, "vocab_size": 64, "width": D, "heads": 2, "layers": 1}
    config = OpenClipConfig(model_cfg={"embed_dim": D, "vision_cfg": vision, "text_cfg": text})
    torch.manual_seed(0)
    return CLIP_SIDES["ovsam_open_clip"](config, part="vision")


def plain_transformers():
    native = open_clip_side(image_size=64, layers=2, width=64, head_width=32, patch_size=16)
    assert isinstance(native.model.visual, VisionTransformer)
    return {
        "open_clip": (native, native.model.visual.transformer),
        "timm": (side := open_clip_side(**VIT), side.model.visual.trunk.blocks),
        "clip": (side := towers(clip="clip").clip, side.model.vision_model.encoder.layers),
        "siglip": (side := towers(clip="siglip").clip, side.model.vision_model.encoder.layers),
    }


@pytest.mark.parametrize("kind", ["open_clip", "timm", "clip", "siglip"])
def test_half_of_the_patches_are_dropped_in_training_and_none_in_evaluation(kind, words):
    side, blocks = plain_transformers()[kind]
    stage = ClipStage(words, Towers(clip=side), pictures="whole")
    lengths = []
    first = blocks[0] if isinstance(blocks, nn.Sequential | nn.ModuleList) else blocks
    first.register_forward_hook(lambda module, inputs, out: lengths.append(inputs[0].shape[1]))
    batch = draw_batch(64)
    plain = stage.eval().picture_embeds(batch["image"])
    drop_patches(side, 0.5)
    torch.testing.assert_close(stage.eval().picture_embeds(batch["image"]), plain)  # in use it is as it was
    loss = stage.train()(**batch)["loss"]
    loss.backward()
    tokens = lengths[0]
    prefix = tokens % 16  # the class token, of 16 or 64 patches
    assert lengths == [tokens, tokens, prefix + (tokens - prefix) // 2]


@pytest.mark.parametrize("kind", ["dual_encoder", "convnext", "resnet"])
def test_other_towers_keep_all_their_patches(kind, words):
    with pytest.raises(InputError, match="plain vision transformer"):
        ClipStage(words, towers(clip=kind), pictures="whole", patch_drop=0.5)


def test_patches_are_not_dropped_under_objects(words):
    with pytest.raises(InputError, match="whole"):
        ClipStage(words, towers(clip="clip"), patch_drop=0.5)
    with pytest.raises(InputError, match="images is"):
        ClipStage(words, towers(), pictures="crops")


def test_a_whole_image_is_classified_by_the_pooling_of_the_tower(words):
    side = open_clip_side(**VIT)
    stage = ClipStage(words, Towers(clip=side), pictures="whole", label_smoothing=0.0, keyword_weight=0.0).eval()
    batch = draw_batch(64)
    embeds = F.normalize(side.model.visual(stage.clip_pixels(batch["image"])), dim=-1)
    logits = stage.lit.log_scale.exp() * embeds @ words.names[:5].T
    torch.testing.assert_close(stage(**batch)["loss"], F.cross_entropy(logits, batch["word_ids"][:, 0]))


# --------------------------------------------------------------------------------------------------------------- mae


@pytest.mark.parametrize("architecture", ["test_vit", "test_vit2", "test_vit3", "vit_tiny_patch16_224"])
def test_without_masking_the_encoder_is_the_forward_of_the_tower(architecture):
    """Class token, register tokens, neither with position encodings of their own, layer scale: timm's test variants."""
    torch.manual_seed(0)
    stage = MaeStage(architecture, 96, decoder_width=32, decoder_depth=1, decoder_heads=2).eval()
    randomise(stage.vit)
    pixels = torch.randn(2, 3, 96, 96)
    count = stage.grid[0] * stage.grid[1]
    with torch.no_grad():
        got = stage.encode(pixels, torch.arange(count).expand(2, -1))
        torch.testing.assert_close(got, stage.vit.forward_features(pixels), atol=1e-5, rtol=1e-5)
        # With some patches left, the same blocks run on those patches: hidden patches have no influence.
        kept = torch.tensor([[0, 3, 7, 11], [2, 5, 6, 13]])
        hidden = torch.ones(2, count).scatter(1, kept, 0).view(2, 1, *stage.grid)
        other = pixels + 9 * hidden.repeat_interleave(stage.patch, 2).repeat_interleave(stage.patch, 3)
        torch.testing.assert_close(stage.encode(other, kept), stage.encode(pixels, kept))
        assert stage.encode(pixels, kept).shape[1] == stage.vit.num_prefix_tokens + 4


def test_mae_loss_is_transformers():
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTMAEConfig(**sizes, **{f"decoder_{n}": v for n, v in sizes.items()}, image_size=96, norm_pix_loss=True)
    reference = ViTMAEForPreTraining(config)
    stage = MaeStage("vit_tiny_patch16_224", 96, decoder_width=32, decoder_depth=1, decoder_heads=2)
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        out = reference(pixels)
    torch.testing.assert_close(stage.patchify(pixels), reference.patchify(pixels))
    torch.testing.assert_close(masked_error(out.logits, stage.patchify(pixels), out.mask, True), out.loss)


def test_mae_raises_an_error_for_other_towers_than_plain_transformers():
    for name in ("convnext_tiny", "hiera_tiny_224", "swin_tiny_patch4_window7_224"):
        with pytest.raises(InputError, match="plain vision transformer"):
            MaeStage(name)


def test_weights_of_mae_start_a_clip_tower(tmp_path):
    stage = MaeStage("vit_tiny_patch16_224", 224, decoder_width=32, decoder_depth=1, decoder_heads=2)
    save_file({n: t.contiguous() for n, t in stage.published_state().items()}, tmp_path / "mae.safetensors")
    text = {"context_length": 12, "vocab_size": 64, "width": D, "heads": 2, "layers": 1}
    spec = {"model_type": "ovsam_open_clip", "model_cfg": {"embed_dim": D, "vision_cfg": VIT, "text_cfg": text}}
    side = clip_side(spec | {"weights": str(tmp_path / "mae.safetensors")})
    for name, tensor in stage.vit.state_dict().items():
        assert torch.equal(side.model.visual.trunk.state_dict()[name], tensor), name
    with pytest.raises(InputError, match="another model"):
        clip_side({"architecture": "test_efficientnet", "weights": str(tmp_path / "mae.safetensors")})


# ------------------------------------------------------------------------------------------------------------- towers


def test_released_towers_open_from_their_folders(tmp_path):
    config = tiny_config(sam="sam2", clip="clip", adapters=False)
    model = randomise(Sam2Model(config.sam_config))
    model.save_pretrained(tmp_path / "sam2")
    side, picture = sam_side(str(tmp_path / "sam2")).eval(), torch.randn(1, 3, SIZE, SIZE)
    embedding = model.get_image_embeddings(picture)[-1]
    torch.testing.assert_close(side.encode(picture).embedding, embedding)
    model = randomise(CLIPModel(config.clip_config))
    model.save_pretrained(tmp_path / "clip")
    side = clip_side(str(tmp_path / "clip")).eval()
    want = model.get_image_features(picture, interpolate_pos_encoding=True).pooler_output
    got = side.model.get_image_features(picture, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(got, want)


def test_a_missing_tower_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="hf download facebook/sam2.1-hiera-none"):
        sam_side("facebook/sam2.1-hiera-none")
    with pytest.raises(InputError, match="no side for a model of type 'bert'"):
        clip_side({"model_type": "bert"})
    with pytest.raises(InputError, match="train that recipe first"):
        clip_side({"architecture": "test_efficientnet", "weights": str(tmp_path / "none.safetensors")})
    with pytest.raises(InputError, match="it takes sam, clip"):
        build_towers({"size": 3})


def test_maps_of_a_plain_transformer_become_a_pyramid():
    maps = tuple(torch.full((1, 2, 8, 8), float(i)) for i in range(4))
    pyramid = maps_at_strides(maps, (128, 128))
    assert [m.shape[-1] for m in pyramid] == [32, 16, 8, 4]
    assert all((m == i).all() for i, m in enumerate(pyramid)) and pyramid[2] is maps[2]


def test_words_of_another_text_tower_raise_an_error(words):
    narrow = WordTable(words.names[:, :8], words.keywords[:, :8], words.has_keyword, words.is_base)
    for stage in (ClipStage, ConceptsStage, Clip2SamStage):
        with pytest.raises(InputError, match="image tower have 32 numbers, those of the text tower 8"):
            stage(narrow, towers())


@pytest.mark.parametrize("composition", ["dual", "sam"])
@pytest.mark.parametrize("clip, clip_size", [("convnext", None), ("convnext", 64), ("dual_encoder", None)])
def test_adapters_are_trained_on_the_maps_the_whole_model_gives_them(composition, clip, clip_size, batch):
    model = tiny_model(composition, clip=clip)
    image_towers = towers(clip=clip).clip if composition == "sam" else model.clip
    same = Towers(model.sam, image_towers, composition, clip_size).eval()
    pixels = same.sam_pixels(batch["image"])
    with torch.no_grad():
        want = model.encode(pixels, None if composition == "sam" else same.clip_pixels(batch["image"])).maps
        got = same.maps(batch["image"])
    assert same.frame(batch["image"]) == (clip_size if clip_size and composition == "dual" else SIZE)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sam", ["sam", "edgetam"])
def test_towers_read_the_four_maps_of_any_sam(sam, batch):
    """SAM 1 has one map, EdgeTAM three; adapters read four of either, as in the whole model."""
    model = tiny_model("sam", sam=sam)
    same = Towers(model.sam, None, "sam").eval()
    with torch.no_grad():
        want, got = model.encode(same.sam_pixels(batch["image"])).maps, same.maps(batch["image"])
    assert same.channels == [m.shape[1] for m in want] and len(got) == 4
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
