"""Images of every kind open as upright RGB, or raise an error of one sentence."""

import contextlib
import io
import os
import socketserver
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from web import serve

from ovsam.errors import InputError
from ovsam.processing import images
from ovsam.processing.images import MIN_SIDE, open_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.fixture
def picture():
    """Left half red, right half blue, 24x16."""
    array = np.zeros((16, 24, 3), np.uint8)
    array[:, :12, 0] = array[:, 12:, 2] = 255
    return Image.fromarray(array)


def png_header(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK", "RGBA", "YCbCr", "RGBX"])
def test_modes_keep_their_colours(picture, mode):
    opened = open_image(picture.convert(mode))
    assert opened.mode == "RGB"
    np.testing.assert_allclose(np.asarray(opened, int), np.asarray(picture, int), atol=2)


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, ending):
    ramp = np.arange(32, dtype=np.uint16).repeat(16).reshape(32, 16) * 2000
    Image.fromarray(ramp).save(tmp_path / f"ramp.{ending}")
    opened = np.asarray(open_image(tmp_path / f"ramp.{ending}"))
    np.testing.assert_array_equal(opened[..., 1], np.round(ramp / 257))


def test_grey_and_one_bit():
    assert open_image(Image.new("L", (9, 9), 77)).getpixel((4, 4)) == (77, 77, 77)
    assert open_image(Image.new("1", (9, 9), 1)).getpixel((4, 4)) == WHITE


def test_transparency_is_laid_on_white(picture, tmp_path):
    picture.putalpha(Image.fromarray(np.uint8(np.arange(24) < 12).repeat(16).reshape(24, 16).T * 255))
    opened = open_image(picture)
    assert opened.getpixel((3, 3)) == RED and opened.getpixel((20, 3)) == WHITE

    palette = Image.new("P", (9, 9), 0)
    palette.putpalette([10, 20, 30] * 256)
    palette.save(tmp_path / "clear.gif", transparency=0)
    assert open_image(tmp_path / "clear.gif").getpixel((4, 4)) == WHITE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(picture, tmp_path, orientation):
    picture.paste((0, 255, 0), (0, 0, 4, 4))  # so that no rotation and no mirroring gives the same image
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    with Image.open(tmp_path / "turned.png") as turned:
        expected = np.asarray(ImageOps.exif_transpose(turned))
    np.testing.assert_array_equal(np.asarray(opened), expected)
    np.testing.assert_array_equal(np.asarray(open_image(opened)), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_ignored(picture, tmp_path):
    picture.save(tmp_path / "odd.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert open_image(str(tmp_path / "odd.jpg")).size == picture.size


def test_arrays():
    array = np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(open_image(array)), array)
    np.testing.assert_array_equal(np.asarray(open_image(array[..., 0]))[..., 2], array[..., 0])
    np.testing.assert_array_equal(np.asarray(open_image(array[:, ::-1])), array[:, ::-1])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((9, 9, 3), np.int64),
        np.zeros((9, 9, 2), np.uint8),
        np.zeros((1, 9, 9, 3), np.uint8),
        np.zeros(9, np.uint8),
        np.zeros((0, 9), np.uint8),
    ],
)
def test_wrong_arrays(array):
    with pytest.raises(InputError, match=r"The array is \[.*; an image must be \[H, W\]"):
        open_image(array)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.png", None, "does not exist"),
        ("text.png", b"not a picture", "not an image in a supported format"),
        ("empty.jpg", b"", r"is empty \(0 bytes\)"),
        ("bomb.png", png_header(20_000, 20_000), "too large.*400000000 pixels.*limit"),
        ("cut.png", png_header(64, 64), "cannot be read .*truncated"),
        ("nul\0.png", None, "does not exist"),
        ("long" * 999, None, "does not exist"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_image(tmp_path / name)
    assert str(tmp_path / name)[:200] in str(caught.value) and "\n" not in str(caught.value)


def test_folder_and_truncated_jpeg(picture, tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        open_image(tmp_path)
    picture.resize((240, 160)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-200])
    with pytest.raises(InputError, match="cannot be read .*truncated"):
        open_image(tmp_path / "cut.jpg")


def test_small_images_and_other_modes():
    with pytest.raises(InputError, match=f"1x1 pixels; each side must have at least {MIN_SIDE}"):
        open_image(Image.new("RGB", (1, 1)))
    with pytest.raises(InputError, match="save it as 8-bit RGB"):
        open_image(Image.new("F", (9, 9)))


def encoded(picture, format="PNG", **how):
    buffer = io.BytesIO()
    picture.save(buffer, format, **how)
    return buffer.getvalue()


def test_bytes_open_files_floats_and_tensors(picture):
    array, content = np.asarray(picture), encoded(picture)
    unit = (array / 255).astype(np.float32)
    tensor = torch.from_numpy(unit).permute(2, 0, 1)
    for given in (
        content,
        bytearray(content),
        io.BytesIO(content),
        array,
        unit,
        tensor,
        (tensor * 255).to(torch.uint8),
    ):
        np.testing.assert_array_equal(np.asarray(open_image(given)), array)
    grey = np.uint8(array[..., 0])
    for given in (grey, grey / 255, torch.from_numpy(grey)[None], grey.astype(np.uint16) * 257):
        np.testing.assert_array_equal(np.asarray(open_image(given))[..., 1], grey)


@pytest.mark.parametrize(
    "given",
    [
        5,
        None,
        {"path": "a.png"},
        io.StringIO("text"),
        np.full((9, 9), np.nan),
        np.full((9, 9, 3), 3.0),
        torch.full((3, 9, 9), -1.0),
        torch.zeros(9, 9),
        b"",
        "http://127.0.0.1:9/nobody.png",
    ],
)
def test_other_values_than_images_raise_an_error(given):
    with pytest.raises(InputError) as caught:
        open_image(given)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_url(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    with serve(tmp_path) as (address, _):
        assert np.array_equal(np.asarray(open_image(f"{address}/a.png")), np.asarray(picture))
        with pytest.raises(InputError, match="b.png cannot be downloaded: the server answers 404"):
            open_image(f"{address}/b.png")


def test_postscript_in_disguise_starts_no_program(picture, tmp_path, monkeypatch):
    picture.save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "holiday.jpg")
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(InputError, match="not an image in a supported format"):
        open_image(tmp_path / "holiday.jpg")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_a_broken_exif_block_counts_as_none(picture, tmp_path, ending):
    picture.save(tmp_path / f"e.{ending}", exif=b"Exif\0\0XX\0*\0\0\0\x08")
    assert open_image(tmp_path / f"e.{ending}").size == picture.size


def test_a_pipe_raises_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="is a device or a pipe"):
        open_image(tmp_path / "pipe.png")


class NoPath:
    def __fspath__(self):
        return 5


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 20, 20, device="meta"),
        torch.zeros(3, 20, 20).to_sparse(),
        NoPath(),
        "http://127.0.0.1:9/" + "a" * 10_000,
    ],
    ids=["meta", "sparse", "no path", "long address"],
)
def test_what_holds_no_pixels_is_one_short_sentence(image):
    with pytest.raises(InputError) as error:
        open_image(image)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


RESPONSES = {  # path -> what a server sends, and the sentence
    "/missing.png": (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "the server answers 404"),
    "/broken.png": (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", "the server answers 500"),
    "/loop.png": (
        b"HTTP/1.1 302 Found\r\nConnection: close\r\nLocation: /loop.png\r\nContent-Length: 0\r\n\r\n",
        "redirect",
    ),
    "/file.png": (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n", "cannot be down"),
    "/noise.png": (b"\0\xff\0\r\n\r\n", "cannot be downloaded"),
    "/nothing.png": (b"", "cannot be downloaded"),
    "/cut.png": (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\nshort", "cannot be downloaded"),
    "/empty.png": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "is empty"),
    "/page.png": (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>", "is not an image"),
    "/gzip.png": (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nno gzip", "cannot be downloaded"),
    "/endless.png": (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(3 * 2**20), "has more than 1 MB"),
    "/slow.png": (b"HTTP/1.1 200 OK\r\n\r\n", "takes more than 1 s"),
    "/silent.png": (None, "cannot be downloaded"),
}


@pytest.fixture(scope="module")
def strange_server():
    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            path = self.request.recv(10_000).split()[1].decode()
            answer, _ = RESPONSES[path]
            with contextlib.suppress(OSError):
                self.request.sendall(answer or b"")
                for _ in range(40 if path == "/slow.png" else 0):
                    time.sleep(0.1)
                    self.request.sendall(b"x")
                if answer is None:
                    time.sleep(2)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("path", RESPONSES)
def test_what_a_server_may_answer(strange_server, monkeypatch, path):
    monkeypatch.setattr(images, "MAX_DOWNLOAD", 2**20)
    monkeypatch.setattr(images, "DOWNLOAD_SECONDS", 1.0)
    monkeypatch.setattr(images, "DOWNLOAD_AT_MOST", 1.0)
    with pytest.raises(InputError, match=RESPONSES[path][1]) as error:
        open_image(strange_server + path)
    assert "\n" not in str(error.value)
