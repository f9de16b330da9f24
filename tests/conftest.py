"""Fixtures of the whole session, and the markers that follow from them.

Behaviour is tested on tiny random models (`common.py`). A test that asks for the shipped checkpoint takes the fixture
`ovsam_tiny`, which loads it once, and is marked `weights` by that.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; threads cost tiny models more than they save

import functools  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

pytest.register_assert_rewrite("testers", "common")

import common  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from transformers.utils import logging  # noqa: E402

import ovsam  # noqa: E402

logging.disable_progress_bar()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if not {"ovsam_tiny", "page"}.isdisjoint(item.fixturenames):  # `page` is the demo, served with it
            item.add_marker("weights")


@pytest.fixture(scope="session")
def ovsam_tiny() -> ovsam.Segmenter:
    """The shipped checkpoint on the CPU. Tests leave it as it is."""
    return ovsam.load("ovsam-tiny", device="cpu")


@pytest.fixture(scope="session")
def val() -> COCO:
    """The annotations of the frozen EmojiScenes; their images lie in the folder `common.VAL`."""
    return COCO(str(common.VAL / "annotations.json"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny random model with both adapters and its processor, saved. Tests copy the folder before they change it."""
    folder = tmp_path_factory.mktemp("tiny")
    model = common.tiny_model(proposal_threshold=0.3, mask_nms_threshold=1.0)  # masks of random models overlap
    model.save_pretrained(folder)
    common.tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sam_folder(tmp_path_factory):
    """A function: kind of SAM -> folder of a tiny random one, as its authors publish it."""
    return functools.cache(lambda kind: str(common.save_sam(tmp_path_factory.mktemp("sam") / kind, kind)))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A function: kind of CLIP -> folder of a tiny random one, as its authors publish it."""
    return functools.cache(lambda kind: str(common.save_clip(tmp_path_factory.mktemp("clip") / kind, kind)))
