"""The README's snippets run as they stand, and its files exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def snippet(name: str, page: str = README) -> str:
    return re.search(rf"<!-- snippet: {name} -->\n```\w*\n(.*?)```", page, re.S).group(1)


def checkout(tmp_path: Path) -> Path:
    """A folder in which the README's relative paths lead to the repository and its outputs do not land in it."""
    for name in ("hub", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.parametrize("names", [["transformers"], ["load", "more"]], ids="+".join)
def test_python_snippet(names, tmp_path):
    code = "\n".join(snippet(name) for name in names)
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "the snippet found nothing"
    if "load" in names:
        assert (tmp_path / "overlay.png").stat().st_size > 1000


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.parametrize("name", ["video", "video_session"])
def test_video_snippet(name, tmp_path):
    code = snippet(name, (ROOT / "docs" / "video.md").read_text(encoding="utf-8"))
    code += "\nassert data['annotations'] if 'data' in dir() else masks.any()"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.weights
@pytest.mark.slow
def test_command_line_snippet(tmp_path, monkeypatch):
    monkeypatch.setenv("OVSAM_MODEL", "ovsam-tiny")  # with a network, `auto` would fetch another
    folder = checkout(tmp_path)
    lines = snippet("cli").strip().splitlines()
    assert len(lines) == 3
    for line in lines:
        command = shlex.split(line)
        assert command[0] == "ovsam"
        done = subprocess.run(
            [sys.executable, "-m", "ovsam_cli", *command[1:]], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert " found (ovsam-tiny)" in done.stderr
    assert (folder / "found.png").exists() and (folder / "found.json").exists()


def test_files_named_in_the_readme_exist():
    named = set(re.findall(r"\]\((?!http)([^)#]+)\)", README))
    named |= set(re.findall(r"`((?:ovsam|adapters|hub)/[\w/.-]+)`", README))
    assert len(named) > 5
    for name in named:
        assert (ROOT / name).exists(), name


def test_links_of_the_documents_exist():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "adapters" / "README.md"]
    for document in documents:
        for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
