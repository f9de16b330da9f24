"""Conversions: masks of the authors' own code, every key of every official checkpoint, and errors."""

import re
import shutil

import parity
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoProcessor, EdgeTamVideoModel, SamModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession
from transformers.utils import logging

import ovsam.checkpoints.convert.sam
from ovsam import InputError, OVSamVideoModel, OVSamVideoSession
from ovsam.checkpoints.convert import KINDS, convert_checkpoint, map_tensors
from ovsam.modeling.tracking import VideoPrompt
from ovsam_cli import convert, main
from tests.common import SIZE

OFFICIAL = {
    **{f"sam_vit_{size}": ("sam", f"ViT-{size.upper()}") for size in "blh"},
    **{
        f"sam{version}_hiera_{size}": ("sam2", f"SAM {version} hiera {size.replace('_', ' ')}")
        for version in ("2", "2.1")
        for size in parity.SIZES
    },
    "edgetam": ("edgetam", "RepViT-M1"),
    "efficienttam_ti": ("efficienttam", "EfficientTAM-Ti"),
    "efficienttam_s": ("efficienttam", "EfficientTAM-S"),
}


@pytest.fixture
def folder(tmp_path):
    """A folder that does not stay: pytest would keep gigabytes of checkpoints."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_key_of_an_official_checkpoint_is_accounted_for(name):
    """At full size, by names and shapes alone."""
    keys = parity.read_keys(name)
    source = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    recognised = [
        kind for kind, layout in KINDS.items() if all(any(re.search(m, key) for key in keys) for m in layout.marks)
    ]
    kind, size = OFFICIAL[name]
    assert recognised == [kind]
    layout = KINDS[kind]
    found, config = layout.read_config(source, None)
    assert found == size
    with torch.device("meta"):
        expected = layout.model_classes[0](config).state_dict()
    prepared = layout.prepare(source, config) if layout.prepare else source
    mapped, unused = map_tensors(prepared, expected, layout.renames, layout.unused)
    assert mapped.keys() == expected.keys()
    if kind == "efficienttam":
        assert len(unused) == 157 and all(key.startswith(TRACKER) for key in unused)
        assert set(unused.values()) == {"is part of the tracker, for which transformers has no class"}
    else:
        assert not unused


TRACKER = ("memory_", "maskmem_", "mask_downsample", "obj_ptr_", "no_mem_pos_enc", "no_obj_")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param("sam_vit_b", marks=pytest.mark.slow), "sam2.1_hiera_tiny_256", "edgetam", "efficienttam_ti"],
)
def test_converted_masks_are_those_of_the_authors_code(name, folder):
    source = parity.write_checkpoint(name, folder)
    report = convert_checkpoint(source, folder / "out", image_size=parity.SIDES[name])
    close, worst = parity.compare(parity.masks_of_folder(folder / "out", name), name)
    assert close, worst
    assert report.kind == OFFICIAL[name.removesuffix("_256")][0]
    assert AutoConfig.from_pretrained(folder / "out").model_type in (
        "sam",
        "sam2_video",
        "edgetam_video",
        "efficienttam",
    )
    side = parity.SIDES[name]
    images = AutoProcessor.from_pretrained(folder / "out")(images=parity.draw_picture(64), return_tensors="pt")
    assert images["pixel_values"].shape == (1, 3, side, side)


@pytest.mark.slow
@torch.no_grad()
def test_a_tracker_from_an_official_file_tracks_as_transformers(folder, clip_folder):
    """`ovsam convert` and `ovsam compose --memory` by the command line: the masks of transformers' own tracker."""
    side = parity.SIDES["edgetam"]
    source, sam, whole = parity.write_checkpoint("edgetam", folder), folder / "sam", folder / "whole"
    assert main(["convert", str(source), "-o", str(sam), "--image-size", str(side)]) == 0
    assert main(["compose", "--sam", str(sam), "--clip", clip_folder("clip"), "--memory", "-o", str(whole)]) == 0
    own = EdgeTamVideoModel.from_pretrained(sam).eval().double()
    video = OVSamVideoModel.from_pretrained(whole).eval().double()
    frames = torch.randn(3, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[60:160, 60:160] = True
    small = frames[:, :, :SIZE, :SIZE]  # what the CLIP side gets makes no difference
    prepare = lambda frame: {"pixel_values": frame[None], "clip_pixel_values": small[:1]}  # noqa: E731
    session = OVSamVideoSession(list(frames), prepare, side, side, tracker="memory")
    session.add_prompt(1, 0, VideoPrompt(mask=mask))
    theirs = Sam2VideoInferenceSession(video=frames, video_height=side, video_width=side, dtype=torch.float64)
    theirs.add_mask_inputs(theirs.obj_id_to_idx(1), 0, mask[None, None])
    theirs.obj_with_new_inputs = [1]
    for number in range(3):
        found, expected = video(session, frame_idx=number).pred_masks, own(theirs, frame_idx=number).pred_masks
        assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert expected.std() > 0


@pytest.mark.slow
def test_the_comparison_notices_a_small_change(folder):
    """One window of another size, which changes no weight, and one weight by a thousandth."""
    name = "efficienttam_ti"
    source = parity.write_checkpoint(name, folder)
    convert_checkpoint(source, folder / "out", image_size=256)
    config = (folder / "out" / "config.json").read_text()
    (folder / "out" / "config.json").write_text(config.replace('"window_size": 14', '"window_size": 8'))
    assert not parity.compare(parity.masks_of_folder(folder / "out", name), name)[0]
    (folder / "out" / "config.json").write_text(config)
    weights = {key: value.clone() for key, value in load_file(folder / "out" / "model.safetensors").items()}
    weights["vision_encoder.layers.3.mlp.lin1.weight"] += 1e-3
    save_file(weights, folder / "out" / "model.safetensors", metadata={"format": "pt"})
    assert not parity.compare(parity.masks_of_folder(folder / "out", name), name)[0]


def test_map_tensors_cuts_joins_and_copies():
    source = {
        "attn.kv": torch.arange(8.0).view(4, 2),
        "points.1": torch.tensor([[1.0]]),
        "points.0": torch.tensor([[0.0]]),
        "code": torch.tensor([3.0]),
        "mean": torch.tensor([5.0]),
    }
    shapes = {"attn.k": (2, 2), "attn.v": (2, 2), "points": (2, 1), "code": (1,), "shared": (1,)}
    expected = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    renames = [(r"kv$", "{k,v}"), (r"^points\.(\d)$", r"points[\1]"), ("^code$", "code = shared")]
    mapped, unused = map_tensors(source, expected, renames, [("^mean$", "the processor's")])
    assert unused == {"mean": "the processor's"}
    assert_close(mapped["attn.k"], torch.tensor([[0.0, 1], [2, 3]]))
    assert_close(mapped["attn.v"], torch.tensor([[4.0, 5], [6, 7]]))
    assert_close(mapped["points"], torch.tensor([[0.0], [1]]))
    assert_close(mapped["shared"], mapped["code"])
    with pytest.raises(InputError, match="'points.0' and 'points.1'|'points.1' and 'points.0'"):
        map_tensors(source, expected, [*renames, (r"\[\d]$", "[0]")], [("^mean$", "")])


@pytest.fixture
def tiny_sam(monkeypatch):
    """Weights of a SAM 1 in the official layout with two blocks of width 32, for images of 128 pixels."""
    monkeypatch.setitem(ovsam.checkpoints.convert.sam.SIZES, (32, 2), ("test", 2, [1]))
    widths = {768: 32, 2304: 96, 3072: 128, 64: 16}
    keys = {}
    for key, shape in parity.resize_sam(parity.read_keys("sam_vit_b"), 128).items():
        if match := re.match(r"image_encoder\.blocks\.(\d+)\.", key):
            if match[1] in ("1", "2"):  # one with attention in windows, one over the whole image
                key = key.replace(f"blocks.{match[1]}.", f"blocks.{int(match[1]) - 1}.")
                keys[key] = [widths.get(n, n) for n in shape]
        else:
            keys[key] = [32 if n == 768 else n for n in shape]
    return parity.draw_weights(keys)


def stop(folder, tensors, message, **how):
    """The conversion fails with that message and leaves nothing."""
    torch.save(tensors, folder / "source.pth")
    with pytest.raises(InputError, match=message):
        convert_checkpoint(folder / "source.pth", folder / "out", **how)
    assert [path.name for path in folder.iterdir()] == ["source.pth"]


def test_a_tensor_that_stops_a_conversion_is_named(tiny_sam, folder):
    whole = tiny_sam
    stop(folder, {k: v for k, v in whole.items() if k != "mask_decoder.iou_token.weight"}, "mask_decoder.iou_token")
    stop(folder, {k: v for k, v in whole.items() if k != "image_encoder.pos_embed"}, "'image_encoder.pos_embed'")
    stop(folder, whole | {"image_encoder.neck.0.weight": torch.ones(256, 16, 1, 1)}, r"neck\.0\.weight'.*\[256, 16")
    stop(
        folder, whole | {"image_encoder.pos_embed": torch.ones(8, 8, 32)}, r"pos_embed' has the shape \[8, 8, 32\], wh"
    )
    broken = whole["mask_decoder.mask_tokens.weight"].clone()
    broken[2, 5] = float("nan")
    stop(folder, whole | {"mask_decoder.mask_tokens.weight": broken}, "mask_tokens.weight' holds NaN")
    broken[2, 5] = float("inf")
    stop(folder, whole | {"mask_decoder.mask_tokens.weight": broken}, "mask_tokens.weight' holds NaN or inf")
    stop(folder, whole | {"adapter.weight": torch.ones(3)}, "'adapter.weight' has no place")
    huge = whole["image_encoder.neck.0.weight"] * 1e38
    stop(folder, whole | {"image_encoder.neck.0.weight": huge}, "masks are not finite")
    stop(
        folder,
        {k: v for k, v in whole.items() if "blocks.1." not in k},
        "1 blocks of width 32 is unknown; known sizes: ViT-B",
    )
    stop(folder, whole, "128 pixels, not 1024", image_size=1024)
    stop(folder, whole, "There is no kind 'sam9'; choose one of sam, sam2", kind="sam9")
    stop(folder, whole, "'image_encoder.trunk.patch_embed.proj.weight' is missing", kind="sam2")


def test_each_half_of_the_new_tensors_of_sam_2_1_needs_the_other():
    keys = parity.read_keys("sam2.1_hiera_tiny")
    for lost in ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight"):
        source = {key: torch.empty(shape, device="meta") for key, shape in keys.items() if key != lost}
        _, config = KINDS["sam2"].read_config(source, None)
        assert config.enable_occlusion_spatial_embedding and config.enable_temporal_pos_encoding_for_object_pointers


def test_files_of_an_unknown_kind_raise_an_error(folder):
    stop(folder, {"encoder.weight": torch.ones(2)}, "of an unknown kind.*'encoder.weight'.*SAM 2 or 2.1.*EdgeTAM")
    stop(folder, {"model": {}}, "no state dict")
    stop(folder, torch.ones(3), "no state dict")
    stop(folder, {"model": InputError("an object of somebody's class")}, "holds an object of ovsam.errors.InputError")
    (folder / "source.pth").write_bytes(b"PK\x03\x04 a download that broke off")
    with pytest.raises(InputError, match="damaged or not a checkpoint"):
        convert_checkpoint(folder / "source.pth", folder / "out")
    for text in ("<html>not found</html>", "hello"):
        (folder / "source.pth").write_text(text)
        with pytest.raises(InputError, match="damaged or not a checkpoint"):
            convert_checkpoint(folder / "source.pth", folder / "out")
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(InputError, match="is not a file"):
            convert_checkpoint(name, folder / "out")
        with pytest.raises(InputError, match="cannot be written"):
            convert_checkpoint(folder / "source.pth", name)
    (folder / "source.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match="damaged"):
        convert_checkpoint(folder / "source.safetensors", folder / "out")
    with pytest.raises(InputError, match="is not a file"):
        convert_checkpoint(folder / "missing.pt", folder / "out")
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_every_container_gives_the_same_folder(tiny_sam, folder):
    half = {key: value.half() for key, value in tiny_sam.items()}
    torch.save(tiny_sam, folder / "plain.pth")
    torch.save(tiny_sam, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": tiny_sam | {"pixel_mean": torch.ones(3)}, "epoch": 3}, folder / "wrapped.pth")
    save_file(tiny_sam, folder / "safe.safetensors")
    torch.save(half, folder / "half.pth")
    folders = {}
    for source in ("plain.pth", "legacy.pth", "wrapped.pth", "safe.safetensors", "half.pth"):
        report = convert_checkpoint(folder / source, folder / source.split(".")[0])
        folders[source] = {
            key: value.clone() for key, value in load_file(folder / source.split(".")[0] / "model.safetensors").items()
        }
        assert (report.kind, report.size, report.classes) == ("sam", "test", ("SamModel",))
        assert report.used == len(tiny_sam)
        if source == "wrapped.pth":
            assert report.unused == {
                "pixel_mean": "the processor normalises images",
                "epoch": "is outside the state dict 'state_dict'",
            }
    for source in ("legacy.pth", "wrapped.pth", "safe.safetensors"):
        assert_close(folders[source], folders["plain.pth"], rtol=0, atol=0)
    assert all(value.dtype == torch.float32 for value in folders["half.pth"].values())
    code = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    model = SamModel.from_pretrained(folder / "plain")
    assert torch.equal(model.shared_image_embedding.positional_embedding, tiny_sam[code])
    assert torch.equal(model.prompt_encoder.shared_embedding.positional_embedding, tiny_sam[code])


def test_the_command(tiny_sam, folder, capsys):
    torch.save(tiny_sam | {"pixel_std": torch.ones(3)}, folder / "source.pth")
    source, output = str(folder / "source.pth"), str(folder / "out")
    verbosity = logging.get_verbosity()
    try:
        assert main(["convert", source, "-o", output]) == 0
        out, err = capsys.readouterr()
        assert f"{source}: test, {len(tiny_sam)} tensors used, 1 not" in out
        assert "not used: pixel_std (the processor normalises images)" in out
        assert f"{output}: loads with the same weights as SamModel" in out
        assert SamModel.from_pretrained(output).config.dtype == torch.float32

        assert main(["convert", source, "-o", output]) == 2
        assert "exists already; give the name of a new or empty folder" in capsys.readouterr().err
        assert main(["convert", source, "-o", str(folder / "source.pth" / "out")]) == 2
        assert "a part of the path is a file" in capsys.readouterr().err
        (folder / "empty").mkdir()
        assert main(["convert", source, "-o", str(folder / "empty"), "--kind", "sam", "--image-size", "128"]) == 0
        assert sorted(path.name for path in folder.iterdir()) == ["empty", "out", "source.pth"]
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def test_the_command_line_offers_every_kind():
    assert tuple(KINDS) == convert.KINDS
