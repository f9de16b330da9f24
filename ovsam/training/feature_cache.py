"""Features of frozen towers, computed once for each sample and stored on disk."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ovsam.ops.files import write_whole


def state_hash(module: nn.Module) -> str:
    """Return a hash of the weights of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


class FeatureCache(Dataset):
    """A data set with additional tensors for each sample, one safetensors file a sample, in half precision.

    Args:
        data: the data set.
        folder: folder of the files.
        prefix: prefix of the names of the tensors.
    """

    def __init__(self, data: Dataset, folder: Path, prefix: str):
        self.data, self.folder, self.prefix = data, folder, prefix

    @classmethod
    def of(
        cls,
        data: Dataset,
        folder: Path,
        data_key: str,
        tower: nn.Module,
        compute: Callable[[Tensor], dict[str, Tensor]],
        prefix: str,
    ) -> "FeatureCache":
        """Return the cache of a data set, after computing missing files.

        Args:
            data: the data set.
            folder: parent of the folder of the cache.
            data_key: a string that identifies the data set and its seed.
            tower: module whose features are stored; other weights have another cache.
            compute: function from images [B, 3, S, S] to tensors [B, ...] by name.
            prefix: prefix of these names.
        """
        tower.to(PartialState().device).eval()
        key = f"{state_hash(tower)}-{hashlib.sha256(data_key.encode()).hexdigest()[:12]}"
        cached = cls(data, Path(folder) / key, prefix)
        cached.build(compute)
        return cached

    def __getattr__(self, name: str):  # attributes of the data set
        if name == "data":
            raise AttributeError(name)
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.data[index] | load_file(self.path(index))

    def path(self, index: int) -> Path:
        return self.folder / f"{index:08d}.safetensors"

    def whole(self, index: int) -> bool:
        """Whether the file exists and can be read; broken ones are computed again."""
        try:
            return all(name.startswith(self.prefix) for name in load_file(self.path(index)))
        except (OSError, SafetensorError):
            return False

    def build(self, compute: Callable[[Tensor], dict[str, Tensor]]) -> None:
        """Compute missing or broken files, each process its share."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = PartialState()
        mine = range(state.process_index, len(self), state.num_processes)
        lacking = [index for index in mine if not self.whole(index)]
        for index in tqdm(lacking, desc="features", disable=not lacking or not state.is_main_process):
            found = compute(self.data[index]["image"][None])
            tensors = {name: tensor[0].half().cpu().contiguous() for name, tensor in found.items()}
            write_whole(self.path(index), partial(save_file, tensors))
        state.wait_for_everyone()
