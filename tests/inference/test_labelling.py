"""`ovsam label` with a stub of the model: sources, journal, kills, shards and errors."""

import errno
import importlib.util
import json
import os
import random
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import fsspec
import numpy as np
import pytest
from label_stub import FakeSegmenter
from PIL import Image
from web import serve

import ovsam
import ovsam_cli
from ovsam.data.coco import Coco
from ovsam.errors import InputError
from ovsam.inference.labelling.job import Question, target_of
from ovsam.inference.labelling.journal import Journals
from ovsam.inference.labelling.sources import Item, list_items
from ovsam.ops import rle
from ovsam.ops.files import remove_leftovers
from ovsam.results.results import Results
from ovsam_cli.label import _Load

EVERY = "coco,yolo,labelme,cvat,label-studio,geojson,masks"


@pytest.fixture
def segmenter(monkeypatch):
    fake = FakeSegmenter()
    monkeypatch.setattr(ovsam, "load", lambda model, device=None: fake)
    return fake


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_photos(Path("photos"), 18)


def make_photos(folder, count, size=(48, 40)):
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number % 3}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (*size[::-1], 3), np.uint8)).save(path)
    return folder


def label(*command, out="out", text="dog cat"):
    words = ["--text", *text.split()] if text else []
    try:
        return ovsam_cli.main(["label", *map(str, command), *words, "--model", "ovsam-tiny", "-o", str(out)])
    except SystemExit as stop:
        return stop.code


def files_of(folder):
    """The label files, without the files of the journal."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and not path.name.startswith(("journal", "errors"))
    }


def keys(*inputs):
    return [item.key for item in list_items([str(one) for one in inputs]).items]


def test_a_folder_becomes_label_files(photos, segmenter, capsys):
    assert label(photos, "--format", EVERY) == 0
    assert segmenter.batches == [4, 4, 4, 4, 2] and segmenter.embedded == [{"dog": "dog", "cat": "cat"}]
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("out: 18 images (0 of them before), 36 new objects, 0 errors, ")
    assert out[1:] == [
        "coco: out/coco.json", "yolo: out/yolo", "labelme: out/labelme", "cvat: out/cvat.xml",
        "label-studio: out/label-studio.json", "geojson: out/geojson", "masks: out/masks",
    ]  # fmt: skip
    found = Results.from_coco("out/coco.json")
    assert [one.file_name for one in found] == sorted(f"{i % 3}/{i:03}.png" for i in range(18))
    assert found[0].labels == ["dog", "cat"] and found[0].model == "fake"
    for path, name in (("cvat.xml", None), ("label-studio.json", None), ("labelme", None), ("yolo", "photos")):
        again = Results.read(Path("out") / path, images=name)
        assert {one.file_name: one.labels for one in again} == {one.file_name: one.labels for one in found}
        assert (again[3].masks == found[3].masks).all()
    labelme = json.loads(Path("out/labelme/0/000.json").read_text())
    assert (Path("out/labelme/0") / labelme["imagePath"]).resolve() == (photos / "0/000.png").resolve()
    assert not Path("out/errors.jsonl").exists()


def test_a_finished_job_is_not_repeated(photos, segmenter, capsys):
    assert label(photos) == 0
    before = files_of("out")
    segmenter.batches.clear()
    assert label(photos, "--format", "coco,yolo") == 0  # other formats need no model
    assert segmenter.batches == [] and before.items() <= files_of("out").items()
    assert "18 images (18 of them before), 0 new objects" in capsys.readouterr().out
    make_photos(photos / "more", 3)
    assert label(photos) == 0 and sum(segmenter.batches) < 10
    assert len(Results.from_coco("out/coco.json")) == 21


@pytest.mark.slow
def test_killed_again_and_again_it_ends_in_the_same_bytes(photos):
    times = 20
    make_photos(photos, 40 + 10 * times)
    (photos / "bad.png").write_text("no picture")
    command = [sys.executable, str(Path(__file__).parents[1] / "label_stub.py"), str(photos), "--text", "dog", "cat"]
    command += ["--format", EVERY, "--model", "ovsam-tiny", "-o"]
    assert subprocess.run([*command, "whole"], capture_output=True).returncode == 1
    whole, journal = Path("whole/journal.jsonl").stat().st_size, Path("killed/journal.jsonl")
    random.seed(times)
    killed = 0
    for number in range(times):
        job = subprocess.Popen([*command, "killed"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        job.stdout.readline()  # the model was loaded
        if number < times - times // 3:  # in the model and the journal
            aim = journal.stat().st_size + random.uniform(0, 0.5) * whole / times
            while journal.stat().st_size < aim and job.poll() is None:
                time.sleep(0.001)
        else:  # at any moment, and in the label files
            time.sleep(random.uniform(0, 1))
        if job.poll() is None:
            job.kill()
            killed += 1
        job.wait()
        if random.random() < 0.5:  # as after a power cut: half a record
            journal.write_bytes(journal.read_bytes()[: -random.randrange(1, 60)])
    assert killed > times * 0.6
    done = subprocess.run([*command, "killed"], capture_output=True, text=True)
    assert done.returncode == 1 and " (0 of them before)" not in done.stdout, done.stderr
    assert files_of("killed") == files_of("whole")
    assert Path("killed/errors.jsonl").read_bytes() == Path("whole/errors.jsonl").read_bytes()
    assert not list(Path("killed").rglob(".*"))  # no temporary file is left


def test_shards_are_merged_into_the_same_bytes(photos, segmenter, capsys):
    (photos / "bad.png").write_text("no picture")
    assert label(photos, "--format", EVERY, out="whole") == 1
    assert label(photos, "--shard", "1/2") == 1
    assert label(photos, "--shard", "2/2", out="other") == 0
    assert not Path("out/coco.json").exists() and "ovsam label --merge" in capsys.readouterr().out
    assert label("--merge", "out", "other", "--format", EVERY, out="merged", text="") == 1
    assert files_of("merged") == files_of("whole")
    assert Path("merged/errors.jsonl").read_bytes() == Path("whole/errors.jsonl").read_bytes()
    assert label("--merge", "out", out="merged", text="") == 2
    assert "The journals of shard 2 of 2 are missing" in capsys.readouterr().err
    assert label("--merge", "whole", "--format", "cvat", out="again", text="") == 1
    assert Path("again/cvat.xml").read_bytes() == Path("whole/cvat.xml").read_bytes()
    assert label(photos, "--shard", "1/2", out="third", text="horse") == 1
    assert label("--merge", "third", "other", out="merged", text="") == 2
    assert "belongs to another command than third/journal-1of2.jsonl (its words is" in capsys.readouterr().err


def test_errors_are_listed_and_the_rest_goes_on(photos, segmenter, capsys, monkeypatch):
    (photos / "0/000.png").write_bytes((photos / "0/000.png").read_bytes()[:-40])  # cut short
    pixels = np.array(Image.open(photos / "1/001.png"))
    pixels[0, 0] = [1, 2, 3]  # breaks the model
    Image.fromarray(pixels).save(photos / "1/001.png")
    opened = Item.open

    def open_and_delete(item):
        if item.key == "2/005.png":
            os.unlink(item.location)
        return opened(item)

    monkeypatch.setattr(Item, "open", open_and_delete)
    assert label(photos) == 1
    errors = [json.loads(line) for line in Path("out/errors.jsonl").read_text().splitlines()]
    assert [one["image"] for one in errors] == ["0/000.png", "1/001.png", "2/005.png"]
    assert "cannot be read" in errors[0]["error"] and "ZeroDivisionError: this picture" in errors[1]["error"]
    assert "does not exist" in errors[2]["error"]
    assert len(Results.from_coco("out/coco.json")) == 15
    streams = capsys.readouterr()
    assert "15 images (0 of them before), 30 new objects, 3 errors" in streams.out
    assert "1/001.png: ZeroDivisionError" in streams.err and "all of them: out/errors.jsonl" in streams.err
    monkeypatch.setattr(Item, "open", opened)
    segmenter.batches.clear()
    assert label(photos) == 1 and segmenter.batches == [4, 1, 1, 1, 1]  # not where images cannot even be opened
    make_photos(photos, 18)  # mended: only these are missing
    segmenter.batches.clear()
    assert label(photos) == 0 and not Path("out/errors.jsonl").exists()
    assert len(Results.from_coco("out/coco.json")) == 18


def test_images_that_do_not_fit_the_memory(photos, segmenter, caplog):
    segmenter.largest = 2 * 48 * 40
    assert label(photos) == 0
    assert segmenter.batches[:3] == [4, 2, 2] and set(segmenter.batches[3:]) == {2}  # it does not try again
    assert "4 images do not fit into memory; continuing with 2 at a time" in caplog.text
    segmenter.largest = 600 * 600
    segmenter.batches.clear()
    Image.new("RGB", (1300, 1200)).save(photos / "large.png")
    assert label(photos) == 0
    assert segmenter.batches[-3:] == [1, "tile 1024", "tile 512"]
    segmenter.largest = 10
    Image.new("RGB", (1400, 1200)).save(photos / "larger.png")
    assert label(photos) == 1
    assert "1400x1200 pixels do not fit into memory, not even in tiles" in Path("out/errors.jsonl").read_text()


def test_a_full_disk_keeps_the_records(photos, segmenter, monkeypatch, capsys):
    written, write = [], os.write

    def write_until_full(file, content):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(content)
        return write(file, content)

    monkeypatch.setattr(os, "write", write_until_full)
    assert label(photos) == 2
    assert "journal.jsonl cannot be written (No space left on device); its records of 8 images are kept" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr(os, "write", write)
    segmenter.batches.clear()
    assert label(photos) == 0 and sum(segmenter.batches) == 10
    assert len(Results.from_coco("out/coco.json")) == 18


def test_a_format_that_cannot_be_written(photos, segmenter, capsys):
    Path("out/coco.json").mkdir(parents=True)
    assert label(photos, "--format", "coco,cvat") == 1
    out = capsys.readouterr().out
    assert "coco was not written: out/coco.json cannot be written: it is a folder" in out
    assert "cvat: out/cvat.xml" in out


def test_errors_are_raised_before_the_model_is_loaded(photos, monkeypatch, capsys):
    monkeypatch.setattr(ovsam, "load", None)
    Path("file").touch()
    Path("empty").mkdir()
    Image.new("RGB", (48, 40)).save(photos / "0/000.jpg")
    for command, message in (
        (["no"], "There is no no;"),
        (["empty"], "There is no image in empty"),
        ([photos, "--vocabulary", "coco"], "exclude each other"),
        ([photos, "--everything", "--not", "cow"], "--not needs --text"),
        ([photos, "--objectness", "0.5"], "--objectness needs --everything"),
        ([photos, "--format", "coco,voc"], "There is no label format 'voc'"),
        ([photos, "--format", "yolo"], "0/000.jpg and 0/000.png would both have the label file '0/000'"),
        ([photos, "--shard", "3/2"], "'3/2' is not I/N"),
        (["--merge", "empty"], "--merge takes output folders"),
    ):
        assert label(*command) == 2, command
        assert message in capsys.readouterr().err
    assert label(photos, text="") == 2 and "There is nothing to search for" in capsys.readouterr().err
    assert label("--merge", "empty", text="") == 2 and "There is no journal in empty" in capsys.readouterr().err
    assert label(photos, out="s3://bucket/out") == 2 and "-o s3://bucket/out is an address" in capsys.readouterr().err
    assert label(photos, out="file") == 2 and "-o file is a file" in capsys.readouterr().err
    for out in ("file/out", "/proc/out"):  # which no user can write into
        assert label(photos, out=out) == 2 and f"{out} cannot be written: " in capsys.readouterr().err


def test_ray_is_asked_for_before_the_model(photos, monkeypatch, capsys):
    monkeypatch.setattr(ovsam, "load", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert label(photos, "--engine", "ray") == 2 and "--engine ray needs Ray" in capsys.readouterr().err


def test_an_actor_finds_a_model_by_its_relative_path(segmenter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load, found = _Load("model", None, Question({"dog": "dog"})), []
    monkeypatch.chdir("/")
    monkeypatch.setattr(ovsam, "load", lambda model, device: found.append(os.path.abspath(model)) or segmenter)
    load()
    assert found == [str(tmp_path / "model")]


def test_words_that_the_model_cannot_read(photos, segmenter, capsys):
    assert label(photos, text="dog ?") == 2 and "is too long" in capsys.readouterr().err


def test_a_report_and_the_images_most_worth_correcting(photos, segmenter, capsys):
    (photos / "0/000.png").rename(photos / "0/<b>.png")
    assert label(photos, "--report", "report.html", "--pick", "3") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-2:] == ["report: report.html", "3 images most worth correcting: out/pick.txt"]
    page = Path("report.html").read_text()
    lines = [line for line in page.splitlines() if line.startswith(("add(", "label("))]
    assert lines[:2] == ['label(0, "dog");', 'label(1, "cat");'] and len(lines) == 20 and "<b>" not in page
    name, width, height, picture, objects = json.loads(lines[2].removeprefix("add(").removesuffix(");"))
    assert (name, width, height) == ("0/003.png", 48, 40) and picture.startswith("data:image/jpeg;base64,")
    found = {one.file_name: one for one in Results.from_coco("out/coco.json")}
    assert [(number, score) for number, score, _ in objects] == [
        (0, pytest.approx(found[name][0].score, abs=1e-4)), (1, pytest.approx(found[name][1].score, abs=1e-4)),
    ]  # fmt: skip
    x = int(found[name][0].bbox[0])
    assert objects[0][2].startswith(f"M{x} 2L{x + 12} 2L{x + 12} 20")
    wrong = {key: sum(1 - one.score for one in result) for key, result in found.items()}
    chosen = Path("out/pick.txt").read_text().split()
    assert chosen == [str(photos.absolute() / key) for key in sorted(wrong, key=lambda key: (-wrong[key], key))[:3]]
    assert len(keys("out/pick.txt")) == 3


@pytest.mark.parametrize("name", ["coco", "yolo", "labelme", "cvat", "label-studio"])
def test_corrections_come_back_as_training_data(photos, segmenter, name):
    """What a person corrects in the file of a tool becomes, with one command, what `ovsam train --data` reads."""
    assert label(photos, "--format", name) == 0
    path = target_of(Path("out"), name)
    if name == "label-studio":  # its export has an annotation in place of the prediction
        tasks = json.loads(path.read_text())
        for task in tasks:
            task["annotations"] = [{"result": task.pop("predictions")[0]["result"]}]
        del tasks[0]["annotations"][0]["result"][0]
        path.write_text(json.dumps(tasks))
    elif name == "cvat":
        tree = ElementTree.parse(path)
        first = tree.find("image")
        first.remove(first.find("mask"))
        tree.write(path)
    elif name == "coco":
        content = json.loads(path.read_text())
        del content["annotations"][0]
        path.write_text(json.dumps(content))
    elif name == "labelme":
        content = json.loads((path / "0/000.json").read_text())
        del content["shapes"][0]
        (path / "0/000.json").write_text(json.dumps(content))
    else:
        lines = (path / "labels/0/000.txt").read_text().splitlines(keepends=True)
        (path / "labels/0/000.txt").write_text(lines[1])
    command = ["convert-labels", str(path), "corrected.json", "--format", "coco", "--images", str(photos)]
    assert ovsam_cli.main(command) == 0
    data = Coco("corrected.json", images=photos)
    assert (data.pictures, data.instances, len(data.words)) == (18, 35, 2)
    record = data.record(0)
    assert Path(record.picture) == photos / "0/000.png"
    assert [data.words[number].name for number in record.word_ids] == ["cat"]
    expected = next(iter(Journals([Path("out/journal.jsonl")]))).instances[1]
    np.testing.assert_array_equal(rle.decode(record.outlines[0]), expected.mask)


def test_a_journal_of_another_command_raises_an_error(photos, segmenter, capsys):
    assert label(photos) == 0
    for command, text, difference in (
        ([photos], "dog cow", 'its words is {"dog": "dog", "cat": "cat"}, not {"dog": "dog", "cow": "cow"}'),
        ([photos, "--threshold", "0.25"], "dog cat", "its options is"),
        ([photos / "0"], "dog cat", 'its inputs is ["photos"], not ["photos/0"]'),
    ):
        assert label(*command, text=text) == 2
        assert f"out/journal.jsonl is the journal of another command ({difference}" in capsys.readouterr().err
    Path("out/journal.jsonl").write_text("something else\n")
    assert label(photos) == 2 and "out/journal.jsonl is not a journal" in capsys.readouterr().err


def test_a_damaged_record_is_done_again(photos, segmenter):
    assert label(photos) == 0
    before, lines = files_of("out"), Path("out/journal.jsonl").read_bytes().splitlines(keepends=True)
    lines[7] = lines[7].replace(b'"score":', b'"skore":', 1)
    Path("out/journal.jsonl").write_bytes(b"".join(lines))
    assert len(Journals([Path("out/journal.jsonl")])) == 17
    segmenter.batches.clear()
    assert label(photos) == 0 and segmenter.batches == [4] and files_of("out") == before


def test_two_processes_do_not_write_one_journal(photos, segmenter, capsys):
    from filelock import FileLock

    Path("out").mkdir()
    with FileLock("out/journal.jsonl.lock"):
        assert label(photos) == 2
    assert "Another process is writing out/journal.jsonl" in capsys.readouterr().err


def test_an_output_inside_the_input_is_skipped(photos, segmenter):
    assert label(photos, "--format", "masks", out=photos / "labels") == 0
    assert label(photos, "--format", "masks", out=photos / "labels") == 0
    assert len(list((photos / "labels").rglob("*.png"))) == 18


def test_everything(photos, segmenter):
    assert label(photos, "--everything", "--vocabulary", "coco", "--objectness", "0.5", text="") == 0
    assert len(Results.from_coco("out/coco.json")[0]) == 80


def test_sources(photos, tmp_path):
    (photos / ".hidden").mkdir()
    (photos / "0/000.png").rename(photos / ".hidden/000.png")
    (photos / "notes.md").touch()
    assert len(keys(photos)) == 17 and keys(photos)[0] == "0/003.png" and keys(photos / "0") == keys("photos/0/*.png")
    assert keys("photos/**/*1*.png") == ["0/012.png", "0/015.png", "1/001.png", "1/010.png", "1/013.png", "1/016.png",
                                         "2/011.png", "2/014.png", "2/017.png"]  # fmt: skip
    assert keys(photos / "1/001.png", photos / "2/002.png") == ["1/001.png", "2/002.png"]
    assert keys(photos / "1/001.png", photos / "1") == keys(photos / "1")
    (photos / "list.txt").write_text("# two\n1/001.png\n\nhttp://a.org/b/c.jpg?x=1\n../far.png\n")
    assert keys(photos / "list.txt") == ["1/001.png", "a.org/b/c.jpg_x=1", f"{tmp_path}/far.png"[1:]]
    (photos / "list.csv").write_text('id,File_Name\n7,1/001.png\n8,"2/002.png"\n')
    (photos / "bare.csv").write_text("1/001.png,cat\n2/002.png,dog\n")
    (photos / "coco.json").write_text(json.dumps({"images": [{"file_name": f"{i}/00{i}.png"} for i in (2, 1)]}))
    for name in ("list.csv", "bare.csv", "coco.json"):
        assert keys(photos / name) == ["1/001.png", "2/002.png"]
    listing = list_items([str(photos / "coco.json")])
    assert listing.root == photos.absolute() and listing.items[0].open().size == (48, 40)
    (photos / "coco.json").write_text("{}")
    with pytest.raises(InputError, match="is not a COCO JSON file"):
        keys(photos / "coco.json")
    with pytest.raises(InputError, match="No file matches"):
        keys("photos/*.gif")


def test_archives(photos):
    with zipfile.ZipFile("some.zip", "w") as archive, tarfile.open("some.tar", "w") as tar:
        for number in (1, 4):
            path = photos / f"1/00{number}.png"
            archive.write(path, f"in/{path.name}")
            tar.add(path, f"in/{path.name}")
        tar.add("photos/1/001.png", "in/._001.png")
        archive.writestr("in/text.png", "no picture")
        archive.writestr("in/001.json", "{}")
    listing = list_items(["some.zip", "some.tar"])
    assert [item.key for item in listing.items] == [
        "some.tar/in/001.png", "some.tar/in/004.png", "some.zip/in/001.png", "some.zip/in/004.png",
        "some.zip/in/text.png",
    ]  # fmt: skip
    assert listing.root is None
    with Image.open(photos / "1/004.png") as expected:
        for place in (1, 3):
            assert (np.asarray(listing.items[place].open()) == np.asarray(expected)).all()
    with pytest.raises(InputError, match="in/text.png in .*some.zip is not an image"):
        listing.items[4].open()
    with tarfile.open("some.tar.gz", "w:gz") as tar:
        tar.add("photos/1/001.png")
    Path("broken.zip").write_text("no")
    for name, message in (("some.tar.gz", "compressed as a whole"), ("broken.zip", "is not a readable .zip archive")):
        with pytest.raises(InputError, match=message):
            list_items([name])


def test_addresses(photos):
    with serve("photos") as (address, _):
        (item,) = list_items([f"{address}/1/001.png"]).items
        assert item.key == f"{address.removeprefix('http://')}/1/001.png" and item.open().size == (48, 40)
        with pytest.raises(InputError, match="no.png"):
            list_items([f"{address}/no.png"]).items[0].open()


def test_inputs_on_other_file_systems(photos, segmenter):
    bucket = fsspec.filesystem("memory")
    bucket.store.clear()
    upload(bucket, "/bucket", photos)
    check_file_system("memory://bucket")
    with pytest.raises(InputError, match="There is no image at memory://bucket/no; check the address"):
        list_items(["memory://bucket/no"])
    with pytest.raises(InputError, match="memory://bucket/a/some.tar.gz is compressed as a whole"):
        list_items(["memory://bucket/a/some.tar.gz"])
    (item,) = list_items(["memory://bucket/a/001.png"]).items
    bucket.rm("/bucket/a/001.png")  # deleted meanwhile
    with pytest.raises(InputError, match="memory://.*bucket/a/001.png cannot be read"):
        item.open()
    assert label("memory://bucket/a", "--format", "coco,labelme") == 0
    assert sorted(one.file_name for one in Results.from_coco("out/coco.json")) == [
        "bucket/a/#b.png",
        "bucket/a/004.png",
    ]
    assert label("memory://bucket/a", out="memory://bucket/out") == 2


def test_inputs_on_s3(photos, monkeypatch):
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        for name, value in (("ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port())),
                            ("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret")):  # fmt: skip
            monkeypatch.setenv(f"AWS_{name}", value)
        bucket = fsspec.filesystem("s3", skip_instance_cache=True)
        bucket.mkdir("bucket")
        upload(bucket, "bucket", photos)
        check_file_system("s3://bucket")
    finally:
        server.stop()


def upload(bucket, root, photos):
    """Two images, a list and two archives of them, and what is no image."""
    first, second = (photos / f"1/00{number}.png" for number in (1, 4))
    with zipfile.ZipFile("some.zip", "w") as archive, tarfile.open("some.tar", "w") as tar:
        for path in (first, second):
            archive.write(path, f"in/{path.name}")
            tar.add(path, f"in/{path.name}")
    files = {"a/001.png": first.read_bytes(), "a/004.png": second.read_bytes(), "a/#b.png": second.read_bytes()}
    files |= {"a/notes.md": b"", "a/.hidden.png": b"", "a/some.tar.gz": b"", "list.txt": b"# one\na/004.png\n"}
    files |= {name: Path(name).read_bytes() for name in ("some.zip", "some.tar")}
    for name, content in files.items():
        bucket.pipe(f"{root}/{name}", content)


def check_file_system(address):
    with Image.open("photos/1/004.png") as image:
        expected = np.asarray(image)
    for given, names in (
        ("a", ["a/#b.png", "a/001.png", "a/004.png"]),
        ("a/00*.png", ["a/001.png", "a/004.png"]),
        ("a/004.png", ["a/004.png"]),
        ("list.txt", ["a/004.png"]),
        ("some.zip", ["some.zip/in/001.png", "some.zip/in/004.png"]),
        ("*.tar", ["some.tar/in/001.png", "some.tar/in/004.png"]),
    ):
        items = list_items([f"{address}/{given}"]).items
        assert [item.key for item in items] == [f"bucket/{name}" for name in names], given
        np.testing.assert_array_equal(np.asarray(items[-1].open()), expected)


def test_a_file_system_without_its_package(monkeypatch, capsys):
    monkeypatch.setattr(ovsam, "load", None)
    for module in ("gcsfs", "smbclient"):
        monkeypatch.setitem(sys.modules, module, None)
    for address, message in (
        ("gs://bucket/a", "gs://bucket/a needs a further package: Please install gcsfs to access Google Storage."),
        ("smb://bucket/a", "needs a further package"),
        ("no-such://bucket/a", "no-such://bucket/a cannot be listed (Protocol not known: no-such)."),
    ):
        assert label(address) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_leftovers_are_removed(tmp_path):
    left, gone = [".coco.json", ".0123.json", "coco.json", ".0123456789abcdef.xml"], [".0123456789abcdef.json"]
    left, gone = [*left, "masks/a.png"], [*gone, "masks/.0123456789abcdef", "masks/b/.0123456789abcdef.png"]
    for name in (*left, *gone):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "coco.json")
    remove_leftovers(tmp_path / "masks")
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(left)
