"""Trackers: the same masks as transformers' own video models, memories that do not grow, sessions."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, EdgeTamVideoModel, Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

import ovsam
from ovsam.errors import InputError
from ovsam.modeling.sam.motion import LARGEST, Motion
from ovsam.modeling.sam.propagation import Keys, LabelMemory, Reference, nest
from ovsam.modeling.tracking import OVSamVideoSession, VideoPrompt
from tests.common import SIZE, picture, tiny_config, tiny_model, tiny_processor, tiny_video_model

STOCK = {"sam2_video": Sam2VideoModel, "edgetam_video": EdgeTamVideoModel}


def square(x: int, side: int = 40) -> torch.Tensor:
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[x : x + side, x : x + side] = True
    return mask


def frames(count: int) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(count, 3, SIZE, SIZE)


def session_of(video) -> OVSamVideoSession:
    return OVSamVideoSession(list(video), lambda frame: {"pixel_values": frame[None]}, SIZE, SIZE)


def assert_same_masks(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """1e-4 of their range, which random weights make larger than trained ones do."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max().clamp(max=50)


@pytest.mark.parametrize("prompt", ["points", "mask"])
@pytest.mark.parametrize("kind", STOCK)
def test_masks_are_those_of_transformers(kind, prompt):
    # In double precision: memories are rounded to bfloat16, and random weights amplify a value that is rounded to the
    # other side from frame to frame.
    ours, video = tiny_video_model(kind).double(), frames(8)
    stock = STOCK[kind](ours.sam.model.config).eval().double()
    stock.load_state_dict(ours.sam.model.state_dict())
    theirs = Sam2VideoInferenceSession(video=video, video_height=SIZE, video_width=SIZE, dtype=torch.float64)
    session = session_of(video)
    for number in (1, 2):
        place = theirs.obj_id_to_idx(number)
        if prompt == "points":  # one click, ambiguous; two clicks, not
            points = torch.tensor([[20.0 * number, 40.0], [90.0, 70.0]])[:number]
            labels = torch.tensor([1, 0])[:number]
            theirs.add_point_inputs(place, 0, {"point_coords": points[None, None], "point_labels": labels[None, None]})
            session.add_prompt(number, 0, VideoPrompt(points, labels))
        else:
            theirs.add_mask_inputs(place, 0, square(20 * number)[None, None])
            session.add_prompt(number, 0, VideoPrompt(mask=square(20 * number)))
    theirs.obj_with_new_inputs = [1, 2]
    for one, other in zip(
        stock.propagate_in_video_iterator(theirs, start_frame_idx=0),
        ours.propagate_in_video_iterator(session),
        strict=True,
    ):
        assert one.pred_masks.abs().max() < 1000  # the objects are there: it is not the constant of an absent object
        assert_same_masks(other.pred_masks, one.pred_masks)
        assert_same_masks(other.object_score_logits.flatten(), one.object_score_logits.flatten())


def test_a_correction_and_an_object_that_is_absent_are_as_in_transformers():
    ours, video = tiny_video_model("sam2_video"), frames(6)
    ours.sam.model.mask_decoder.pred_obj_score_head.proj_out.bias.data.zero_()
    stock = Sam2VideoModel(ours.sam.model.config).eval()
    stock.load_state_dict(ours.sam.model.state_dict())
    theirs = Sam2VideoInferenceSession(video=video, video_height=SIZE, video_width=SIZE, dtype=torch.float32)
    session = session_of(video)
    theirs.add_mask_inputs(theirs.obj_id_to_idx(1), 0, square(20)[None, None])
    theirs.obj_with_new_inputs = [1]
    session.add_prompt(1, 0, VideoPrompt(mask=square(20)))
    points, labels = torch.tensor([[30.0, 40.0], [90.0, 70.0]]), torch.tensor([1, 0])
    for number in (0, 1, 2, 2, 3, 4, 5):
        if number == 2 and session.next_frame == 3:  # frame 2 again, now with clicks
            theirs.add_point_inputs(0, 2, {"point_coords": points[None, None], "point_labels": labels[None, None]})
            theirs.obj_with_new_inputs = [1]
            session.add_prompt(1, 2, VideoPrompt(points, labels))
        one, other = stock(theirs, frame_idx=number), ours(session, frame_idx=number)
        assert_same_masks(other.pred_masks, one.pred_masks)


@pytest.mark.parametrize("kind", STOCK)
def test_a_batch_of_objects_equals_separate_calls(kind):
    model, video = tiny_video_model(kind).double(), frames(5).double()  # rounding grows from frame to frame
    together = session_of(video)
    prompts = {n: VideoPrompt(mask=square(12 * n)) for n in range(1, 6)}
    for number, prompt in prompts.items():
        together.add_prompt(number, 0 if number < 4 else 2, prompt)  # some enter later
    outputs = list(model.propagate_in_video_iterator(together))
    assert [len(output.object_ids) for output in outputs] == [3, 3, 5, 5, 5]
    for number, prompt in prompts.items():
        alone = session_of(video)
        start = 0 if number < 4 else 2
        alone.add_prompt(number, start, prompt)
        for output, one in zip(outputs[start:], model.propagate_in_video_iterator(alone), strict=True):
            mask = output.pred_masks[output.object_ids.index(number)]
            assert_same_masks(mask, one.pred_masks[0])


@pytest.mark.parametrize("kind", STOCK)
def test_memory_is_flat_and_pruning_changes_no_mask(kind, monkeypatch):
    model, video = tiny_video_model(kind), frames(12)
    sizes, masks = {}, {}
    for pruned in (True, False):
        if not pruned:
            keep = lambda self, frame, memory, new, config: (  # noqa: E731
                (self.conditioned if new else self.tracked).__setitem__(frame, memory)
            )
            monkeypatch.setattr("ovsam.modeling.sam.memory.ObjectMemory.store", keep)
        session = session_of(video)
        session.add_prompt(1, 0, VideoPrompt(mask=square(20)))
        outputs = model.propagate_in_video_iterator(session)
        masks[pruned], sizes[pruned] = zip(*((o.pred_masks, session.nbytes()) for o in outputs), strict=True)
    assert sizes[True][11] == sizes[True][7] == sizes[True][6]  # pointers reach back 5 frames
    assert sizes[False][11] > 1.3 * sizes[False][7]
    for one, other in zip(masks[True], masks[False], strict=True):
        assert torch.equal(one, other)


def test_auto_model_loads_it_and_the_parts_load_from_its_folder(tmp_path):
    model, video = tiny_video_model(), frames(3)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is ovsam.OVSamVideoModel
    masks = []
    for one in (model, loaded):
        session = session_of(video)
        session.add_prompt(1, 0, VideoPrompt(mask=square(20)))
        masks.append([output.pred_masks for output in one.propagate_in_video_iterator(session)])
    for before, after in zip(*masks, strict=True):
        torch.testing.assert_close(after, before)
    image = ovsam.OVSamModel.from_pretrained(tmp_path)
    box = torch.tensor([[[20.0, 20.0, 80.0, 90.0]]])
    torch.testing.assert_close(
        image(pixel_values=video[:1], input_boxes=box).pred_masks,
        model(pixel_values=video[:1], input_boxes=box).pred_masks,
    )
    for part in (ovsam.OVSamVisionModel, ovsam.OVSamMaskDecoder):
        found, report = part.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert not any("memory_attention" in name for name in found.state_dict())


def test_streaming_removal_and_reset():
    model, video = tiny_video_model(), frames(4)
    session = OVSamVideoSession()
    session.add_prompt(7, 0, VideoPrompt(mask=square(20)))
    session.add_prompt(9, 0, VideoPrompt(mask=square(50)))
    streamed = [model(session, frame=frame) for frame in video[:2]]
    assert [output.frame_idx for output in streamed] == [0, 1]
    session.remove_object(7)
    assert model(session, frame=video[2]).object_ids == [9]
    with pytest.raises(InputError, match="no object 7"):
        session.remove_object(7)
    session.reset_tracking_data()
    with pytest.raises(InputError, match="no object to track"):
        model(session, frame=video[3])


def test_sizes_of_the_memory_and_an_unknown_tracker_raise_an_error():
    config = copy.deepcopy(tiny_video_model().config)
    config.sam_config.memory_attention_rope_feat_sizes = [4, 4]
    with pytest.raises(InputError, match="rope_feat_sizes"):
        ovsam.OVSamVideoModel(config)
    with pytest.raises(InputError, match="no tracker 'magic'"):
        OVSamVideoSession(tracker="magic")
    session = OVSamVideoSession(tracker="memory")
    session.add_prompt(1, 0, VideoPrompt(mask=square(20)))
    with pytest.raises(InputError, match="has no memory"):
        ovsam.OVSamVideoModel(tiny_config(adapters=False))(session, frame=frames(1)[0])


# ---- propagation, which any SAM side has ----------------------------------------------------------------------------


def moving(count: int, step: int = 16) -> torch.Tensor:
    """An image that moves to the right, a whole cell of stride 16 a frame."""
    torch.manual_seed(4)
    wide = torch.randn(3, SIZE, SIZE + step * count)
    wide = torch.nn.functional.avg_pool2d(wide, 5, 1, 2)
    return torch.stack([wide[:, :, step * (count - n) : step * (count - n) + SIZE] for n in range(count)])


@pytest.mark.parametrize("composition", ["dual", "clip", "sam"])
def test_labels_follow_an_image_that_moves_and_objects_apart_do_not_disturb_each_other(composition):
    torch.manual_seed(0)
    model = ovsam.OVSamVideoModel(tiny_config(composition, adapters=False)).eval()
    video, squares = moving(3), {1: (16, 48), 2: (48, 16)}
    truth = {n: torch.zeros(3, SIZE, SIZE, dtype=torch.bool) for n in squares}
    for number, (x, y) in squares.items():
        for frame in range(3):
            truth[number][frame, y : y + 32, x + 16 * frame : x + 16 * frame + 32] = True
    together = session_of(video)
    for number in squares:
        together.add_prompt(number, 0, VideoPrompt(mask=truth[number][0]))
    outputs = list(model.propagate_in_video_iterator(together))
    for number in squares:
        alone = session_of(video)
        alone.add_prompt(number, 0, VideoPrompt(mask=truth[number][0]))
        for frame, (output, one) in enumerate(zip(outputs, model.propagate_in_video_iterator(alone), strict=True)):
            mask = output.pred_masks[output.object_ids.index(number)]
            assert ((mask > 0) == (one.pred_masks[0] > 0)).float().mean() > 0.98
            full = torch.nn.functional.interpolate(mask[None], (SIZE, SIZE), mode="bilinear")[0, 0] > 0
            both, either = (full & truth[number][frame]).sum(), (full | truth[number][frame]).sum()
            assert both / either > 0.7, (number, frame)  # a mask that stays where it was: 0.33


def test_an_object_that_enters_later_and_frames_without_objects():
    model = ovsam.OVSamVideoModel(tiny_config(adapters=False)).eval()
    session = session_of(moving(5))
    session.add_prompt(5, 2, VideoPrompt(mask=square(40)))
    shown = [model(session, frame_idx=frame).object_ids for frame in range(5)]
    assert shown == [[], [], [5], [5], [5]]


def test_the_memory_of_propagation_is_bounded():
    model = ovsam.OVSamVideoModel(tiny_config(adapters=False)).eval()
    session, sizes = OVSamVideoSession(), []
    session.add_prompt(1, 0, VideoPrompt(mask=square(20)))
    for number, frame in enumerate(torch.randn(24, 3, SIZE, SIZE)):
        if number >= 12:  # a correction on every frame
            session.add_prompt(1, number, VideoPrompt(mask=square(20)))
        model(session, frame=frame)
        sizes.append(session.nbytes())
    assert sizes[11] == sizes[5] and sizes[23] == sizes[21]
    assert min(session.labels.frames) > 12  # the newest prompts stay


def test_a_box_and_clicks_equal_the_image_model():
    model = ovsam.OVSamVideoModel(tiny_config()).eval()
    video = frames(1)
    corners = torch.tensor([[20.0, 20.0], [80.0, 90.0]])
    session = session_of(video)
    session.add_prompt(1, 0, VideoPrompt(corners, torch.tensor([2, 3])))
    tracked = model(session, frame_idx=0).pred_masks[0, 0]
    image = model(pixel_values=video, input_boxes=corners.reshape(1, 1, 4)).pred_masks[0, 0, 0]
    size = (SIZE // 8, SIZE // 8)  # labels have stride 8
    soft = torch.nn.functional.interpolate((image > 0).float()[None, None], size, mode="bilinear", antialias=True)
    again = torch.nn.functional.interpolate(soft, image.shape, mode="bilinear")[0, 0]
    torch.testing.assert_close(tracked.sigmoid(), again.clamp(1e-4, 1 - 1e-4), atol=1e-4, rtol=0)


def test_clicks_on_a_later_frame_correct_the_mask_there():
    model, video = ovsam.OVSamVideoModel(tiny_config()).eval(), frames(2)
    session = session_of(video)
    session.add_prompt(1, 0, VideoPrompt(mask=square(20)))
    before = [model(session, frame_idx=number).pred_masks for number in (0, 1)][1]
    click, label = torch.tensor([[30.0, 30.0]]), torch.tensor([0])
    session.add_prompt(1, 1, VideoPrompt(click, label))
    corrected = model(session, frame_idx=1).pred_masks[0, 0]
    given = {"input_points": click[None, None], "input_labels": label[None, None], "input_masks": before}
    expected = model(pixel_values=video[1:], **given).pred_masks[0, 0, 0] > 0
    alone = model(pixel_values=video[1:], **{**given, "input_masks": None}).pred_masks[0, 0, 0] > 0
    assert not torch.equal(expected, alone)
    size = (SIZE // 8, SIZE // 8)  # labels have stride 8
    soft = torch.nn.functional.interpolate(expected.float()[None, None], size, mode="bilinear", antialias=True)
    again = torch.nn.functional.interpolate(soft, corrected.shape, mode="bilinear")[0, 0]
    torch.testing.assert_close(corrected.sigmoid(), again.clamp(1e-4, 1 - 1e-4), atol=1e-4, rtol=0)


# ---- the processor's session calls ----------------------------------------------------------------------------------


def test_prompts_of_a_session_are_in_pixels_of_the_frame():
    processor, images = tiny_processor(), [picture(n, 96, 64) for n in range(2)]
    session = processor.init_video_session(video=images)
    assert (session.num_frames, session.video_height, session.video_width) == (2, 64, 96)
    points, boxes = [[[[48.0, 32.0]], [[0.0, 64.0]]]], [[[0, 0, 48, 32], [48, 32, 96, 64]]]
    processor.add_inputs_to_inference_session(session, 0, [4, 6], input_points=points, input_labels=[[[1], [0]]])
    torch.testing.assert_close(session.prompts[4][0].points, torch.tensor([[SIZE / 2, SIZE / 2]]))
    torch.testing.assert_close(session.prompts[6][0].points, torch.tensor([[0.0, float(SIZE)]]))
    assert session.prompts[6][0].labels.tolist() == [0]
    processor.add_inputs_to_inference_session(session, 1, [4, 6], points, [[[1], [0]]], boxes)
    assert session.prompts[6][1].labels.tolist() == [2, 3, 0]
    torch.testing.assert_close(session.prompts[6][1].points[0], torch.tensor([SIZE / 2, SIZE / 2]))
    model = ovsam.OVSamVideoModel(tiny_config()).eval()
    outputs = list(model.propagate_in_video_iterator(session))
    assert [output.object_ids for output in outputs] == [[4, 6], [4, 6]]
    masks = processor.post_process_masks([outputs[1].pred_masks], [[64, 96]])[0]
    assert masks.shape == (2, 1, 64, 96) and masks.dtype == torch.bool


def test_text_queries_of_a_session_are_found_and_followed():
    processor, images = tiny_processor(), [picture(2, 96, 64)] * 4
    model = ovsam.OVSamVideoModel(tiny_config()).eval()
    model.load_state_dict(tiny_model().state_dict())
    session = processor.add_text_prompt(processor.init_video_session(video=images), ["cat", "red ball"], 2)
    model.config.score_threshold = 0.3
    outputs = list(model.propagate_in_video_iterator(session))
    assert [output.frame_idx for output in outputs] == [0, 1, 2, 3]
    first = outputs[0]
    assert first.object_ids == list(range(1, len(first.object_ids) + 1)) and {*first.text_labels} <= {"cat", "red ball"}
    with torch.no_grad():
        inputs = processor(images=images[0], text=["cat", "red ball"])
        found = model(**{name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask", "text_labels")})
    best = int(found.scores[0].amax(-1).masked_fill(~found.valid[0], 0).argmax())
    assert first.text_labels[0] == ["cat", "red ball"][int(found.scores[0, best].argmax())]
    whole = torch.nn.functional.interpolate(found.pred_masks[:, best, :1], (SIZE, SIZE), mode="bilinear") > 0
    soft = torch.nn.functional.interpolate(whole.float(), (SIZE // 8, SIZE // 8), mode="bilinear", antialias=True)
    again = torch.nn.functional.interpolate(soft, first.pred_masks.shape[-2:], mode="bilinear")[0, 0]  # of stride 8
    torch.testing.assert_close(first.pred_masks[0, 0].sigmoid(), again.clamp(1e-4, 1 - 1e-4), atol=1e-4, rtol=0)
    # The same image again: every object goes on under its id.
    assert all(output.object_ids[: len(first.object_ids)] == first.object_ids for output in outputs)
    model.config.score_threshold = 1.1
    session = processor.add_text_prompt(processor.init_video_session(), "cat")
    assert model(session, frame=processor(images=images[0])).object_ids == []
    with pytest.raises(InputError, match="redetect_every"):
        processor.add_text_prompt(session, "cat", 0)


def test_wrong_inputs_of_a_session_are_one_clear_error():
    processor = tiny_processor()
    session = processor.init_video_session()
    with pytest.raises(InputError, match="There is no prompt"):
        processor.add_inputs_to_inference_session(session, 0, 1)
    with pytest.raises(InputError, match="pass original_size"):
        processor.add_inputs_to_inference_session(session, 0, 1, input_boxes=[[[0, 0, 5, 5]]])
    with pytest.raises(InputError, match="2 input_masks for 1 objects"):
        processor.add_inputs_to_inference_session(session, 0, 1, input_masks=[square(2), square(3)])
    with pytest.raises(InputError, match="no frames"):
        processor.init_video_session(video=[])


class Board:
    """Frames of random features, on which a thing of 3 x 3 cells is shown at some columns, the last one in front."""

    side, width = 16, 64

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, self.width, generator=generator)  # noqa: E731
        # Cells of the background are alike, and so are those of the thing.
        self.back, self.thing = (F.normalize(draw(1) + 0.7 * draw(side, side), dim=-1) for side in (self.side, 3))

    def show(self, *columns: int) -> tuple[Keys, dict[int, torch.Tensor]]:
        """The keys of a frame, and the cells that show each thing, numbered from 1."""
        cells, owner = self.back.clone(), torch.zeros(self.side, self.side, dtype=torch.int)
        for number, x in enumerate(columns, 1):
            cells[6:9, x : x + 3], owner[6:9, x : x + 3] = self.thing, number
        cells = cells.flatten(0, 1)
        shown = {number: owner.flatten() == number for number in range(1, len(columns) + 1)}
        return Keys(cells, cells[:, None].expand(-1, 4, -1), self.side), shown

    def follow(self, *frames: Sequence[int]) -> dict[int, torch.Tensor]:
        """The cells of each thing of the first frame on the last one."""
        memory, (keys, shown) = LabelMemory(), self.show(*frames[0])
        first = Reference(keys)
        for number, cells in shown.items():
            first.prompt(number, cells[:, None].repeat(1, 4).float())
        memory.store(0, first)
        for number, columns in enumerate(frames[1:], 1):
            last = memory.propagate(number, self.show(*columns)[0], list(shown))
            memory.store(number, last)
        return {number: (label > 0.5).all(1) for number, label in last.labels.items()}


def test_an_object_that_is_lost_is_searched_for_in_the_whole_image_and_one_that_is_there_near_by():
    board = Board()
    assert not board.follow([0], [0], [], [])[1].any()
    assert torch.equal(board.follow([0], [0], [], [], [12])[1], board.show(12)[1][1])  # farther than it moves at once
    assert torch.equal(board.follow([0], [0], [2], [2, 13])[1], board.show(2)[1][1])  # not the copy of it


def test_a_prompt_on_a_later_frame_vouches_for_its_own_object_only():
    board, memory = Board(), LabelMemory()
    for frame in range(5):
        keys, shown = board.show(0, 12)
        reference = memory.propagate(frame, keys, [1, 2][:frame])
        if frame < 2:
            reference.prompt(frame + 1, shown[frame + 1][:, None].repeat(1, 4).float())
        memory.store(frame, reference)
    assert {number: sorted(kept.labels) for number, kept in memory.frames.items()} == {
        0: [1], 1: [2], 2: [1, 2], 3: [1, 2], 4: [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize(("x", "kept"), [(4, True), (24, False)])
def test_an_object_that_leaves_the_image_leaves_no_label_behind(x, kept):
    mask = torch.zeros(32, 32)
    mask[8:16, x : x + 8] = 1
    motion = replace(Motion.of_mask(mask), speed=torch.tensor([0.0, 2.0]))  # four parts to the right
    later, background = torch.zeros(32, 32), torch.zeros(32, 32)
    later[8:16, x : x + 12] = 1  # the object and what it leaves behind
    assert bool(motion.confine(later)[10, x].item()) == kept
    assert motion.confine(later)[10, x + 6] == 1
    moved = motion.follow(motion.confine(later), background)
    assert moved.centre[1] > motion.centre[1] and moved.absent == 0


def test_two_objects_of_one_look_keep_their_labels_when_they_pass_each_other():
    board = Board()
    path = [(12 - x, x) for x in range(13)]  # the second passes in front of the first
    for end in range(8, 13):
        found = board.follow(*path[: end + 1])
        for number, cells in board.show(*path[end])[1].items():
            wrong = (found[number] != cells).sum()
            assert wrong <= 2, (end, number)


@pytest.mark.parametrize("last", [18.0, 7.0, 3.5])
def test_the_references_of_an_object_that_becomes_larger_are_enlarged(last):
    """A disc of parts whose radius goes from 7 parts to `last` within 40 frames, with features that grow along."""
    torch.manual_seed(0)
    parts, width, first, count = 64, 32, 7.0, 40
    back = torch.randn(1, width, 1, 1) + 0.7 * torch.randn(1, width, parts, parts)
    thing = torch.randn(1, width, 1, 1) + 0.7 * F.interpolate(torch.randn(1, width, 9, 9), (64, 64), mode="bicubic")
    line = torch.arange(parts) - parts / 2 + 0.5
    offset = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    memory = LabelMemory()
    for frame in range(count):
        radius = first * (last / first) ** (frame / (count - 1))
        disc = (offset.norm(dim=-1) < radius).float()
        drawn = F.grid_sample(thing, offset[None] / radius / 1.2, align_corners=False)
        maps = F.normalize(back * (1 - disc) + drawn * disc, dim=1)
        coarse = F.normalize(F.avg_pool2d(maps, 2)[0].flatten(1).T, dim=1)
        reference = memory.propagate(frame, Keys(coarse, nest(maps[0]), parts // 2), [1] if frame else [])
        if not frame:
            reference.prompt(1, nest(disc[None])[..., 0])
        memory.store(frame, reference)
    found, right = reference.labels[1] > 0.5, nest(disc[None])[..., 0] > 0.5
    assert (found & right).sum() / (found | right).sum() > 0.8
    # The references of one that becomes smaller stay as they are.
    assert reference.motions[1].size == pytest.approx(max(last / first, 1.0), rel=0.2)


def test_a_prompt_on_a_later_frame_keeps_the_size_of_its_object():
    board, memory = Board(), LabelMemory()
    keys, shown = board.show(4)
    memory.store(0, Reference(keys))
    memory.frames[0].prompt(1, shown[1][:, None].repeat(1, 4).float())
    memory.frames[0].motions[1] = replace(memory.frames[0].motions[1], growth=0.05)
    reference = memory.propagate(1, keys, [1])
    size = reference.motions[1].size
    reference.prompt(1, shown[1][:, None].repeat(1, 4).float())
    assert reference.motions[1].size == size > 1


def test_an_object_that_is_absent_does_not_grow():
    mask, nothing = torch.zeros(32, 32), torch.zeros(32, 32)
    mask[8:16, 8:16] = 1
    motion = replace(Motion.of_mask(mask), growth=0.05)
    for _ in range(20):
        motion = motion.follow(nothing, nothing)
    assert motion.size == 1 and motion.larger_than(motion) == 1


def test_an_object_that_is_hidden_grows_on_within_limits():
    mask, little = torch.zeros(32, 32), torch.zeros(32, 32)
    mask[8:16, 8:16], little[8, 8:12] = 1, 1
    motion = replace(Motion.of_mask(mask), growth=0.05)
    assert motion.follow(little, 1 - mask).size == pytest.approx(1.05, rel=0.01)
    for _ in range(2000):
        motion = motion.follow(little, 1 - mask)
    assert motion.size == LARGEST
