"""Output goes where the user points: whole or not at all, never in the place of a device, a pipe or a link."""

import contextlib
import os
import stat
import subprocess
import sys
import threading

import pytest

from ovsam.errors import InputError
from ovsam.ops.files import check_output_folder, check_target, only_files, write_text, write_whole


def test_a_new_file_and_its_folders(tmp_path):
    write_text(tmp_path / "a" / "b" / "c.txt", "ä\udcff")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "ä?".encode()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c.txt"]


def test_a_link_is_followed_and_the_mode_stays(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "real.txt").chmod(0o640)
    (tmp_path / "link.txt").symlink_to("real.txt")
    (tmp_path / "dangling.txt").symlink_to("new.txt")
    for name in ("link.txt", "dangling.txt"):
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink() and (tmp_path / name).read_text() == "new"
    assert stat.S_IMODE((tmp_path / "real.txt").stat().st_mode) == 0o640


def test_a_pipe_is_written_into(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "through")
    reader.join(10)
    assert read == ["through"] and stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_device_is_written_into():
    write_text("/dev/null", "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(InputError, match="/dev/full cannot be written: the disk is full"):
        write_text("/dev/full", "text")


def test_stdout(capfdbinary):
    write_text("-", "to stdout")
    assert capfdbinary.readouterr().out == b"to stdout"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n" * 300, "the name is too long"),
        ("folder", "is a folder|it is a folder"),
        ("file/x", "a part of the path is a file"),
    ],
)
def test_invalid_targets_are_found_before_and_at_writing(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for attempt in (check_target, lambda path: write_text(path, "text")):
        with pytest.raises(InputError, match=message):
            attempt(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    for attempt in (check_target, lambda path: write_text(path, "text")):
        with pytest.raises(InputError, match="permission is denied"):
            attempt(tmp_path / "locked" / "a.txt")
    with pytest.raises(InputError, match="permission is denied"):
        check_output_folder(tmp_path / "locked" / "b")


def test_many_threads_may_write_one_path(tmp_path):
    failures = []

    def work(text):
        for _ in range(30):
            try:
                write_text(tmp_path / "x.txt", text)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(letter * 1000,)) for letter in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(set((tmp_path / "x.txt").read_text())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_an_interrupt_leaves_the_old_file(tmp_path):
    (tmp_path / "x.txt").write_text("old")

    def interrupted(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        write_whole(tmp_path / "x.txt", interrupted)
    assert (tmp_path / "x.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_closed_pipe_is_one_sentence():
    program = [sys.executable, "-m", "ovsam_cli", "models"]
    with open(os.devnull) as nothing:
        process = subprocess.Popen(program, stdin=nothing, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert (
        process.wait(60) == 2
        and error
        == "ovsam: error: The output cannot be written: its reader has closed the pipe; keep the reader running.\n"
    )


def test_pipes_and_folders_among_files_are_skipped_with_a_count(tmp_path, caplog):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    (tmp_path / "c.png").touch()
    assert only_files(sorted(tmp_path.iterdir()), tmp_path) == [tmp_path / "c.png"]
    assert "2 skipped, which are not files" in caplog.text
