"""Checks before a run, and a summary of its parameters, data and memory."""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ovsam.errors import InputError

LOOKED_AT = 32  # maximum number of samples that are searched for one with an object


@dataclass
class Memory:
    """Bytes: `weights`, `gradients`, `optimiser` (Adam's two moments), and measured `activations` of one sample."""

    weights: int
    gradients: int
    optimiser: int
    activations: int

    def total(self, batch_size: int) -> int:
        return self.weights + self.gradients + self.optimiser + batch_size * self.activations


def check_workers(workers: int) -> None:
    processors = os.cpu_count() or 1
    if workers > processors:
        raise InputError(f"The recipe asks for {workers} workers on {processors} processors; use {processors} at most.")


def check_trainable(stage: nn.Module, name: str) -> None:
    if not any(parameter.requires_grad for parameter in stage.parameters()):
        raise InputError(f"The stage {name} has no trainable parameters with this recipe; unfreeze a part.")


def recompute_activations(stage: nn.Module) -> None:
    """Enable gradient checkpointing of all layers that support it, of transformers and timm."""
    found = False
    again = partial(checkpoint, use_reentrant=False)
    for module in stage.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._gradient_checkpointing_func, module.gradient_checkpointing, found = again, True, True
        elif callable(getattr(module, "set_grad_checkpointing", None)):
            module.set_grad_checkpointing(True)
            found = True
    if not found:
        raise InputError("gradient_checkpointing = true, but no layer of this stage supports it; set it to false.")


def first_sample(data) -> dict[str, Tensor]:
    """Return the first sample with an object."""
    for index in range(min(len(data), LOOKED_AT)):
        sample = data[index]
        if sample["masks"].any():
            return sample
    raise InputError(f"None of the first {LOOKED_AT} samples has an object with pixels in it: check the annotations.")


def measure_memory(stage: nn.Module, batch: dict[str, Tensor], autocast=contextlib.nullcontext) -> Memory:
    """Measure the memory of one forward and backward pass of a sample. Stage and random state are restored.

    Activations are the tensors that autograd saves, each storage once, without the weights.
    """
    device = next(stage.parameters()).device
    # Batch statistics are part of the saved tensors; the dry run must not change them.
    buffers = [(buffer, buffer.clone()) for buffer in stage.buffers()]
    known = {tensor.untyped_storage().data_ptr() for tensor in (*stage.parameters(), *stage.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    devices = [device] if device.type == "cuda" else []
    training = stage.training
    with torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with autocast():
            loss = stage.train()(**{name: tensor.to(device) for name, tensor in batch.items()})["loss"]
        if not loss.requires_grad:
            raise InputError(
                "The loss of this stage does not depend on a trainable parameter; unfreeze the part that it trains."
            )
        loss.backward()
    stage.train(training)
    stage.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    if not torch.isfinite(loss):
        raise InputError(
            f"The loss of the first sample is {loss.item()}; it must be finite: check the data and the weights."
        )
    trained = [p for p in stage.parameters() if p.requires_grad]
    return Memory(
        weights=_nbytes(stage.parameters()) + _nbytes(stage.buffers()),
        gradients=_nbytes(trained),
        optimiser=2 * _nbytes(trained),
        activations=sum(saved.values()),
    )


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def describe(recipe: dict, stage: nn.Module, data, memory: Memory, processes: int) -> str:
    """Return the lines that are printed before a run starts."""
    optim, share = recipe["optim"], recipe.get("rehearsal", {}).get("share", 0.0)
    batch, samples = optim["batch_size"], optim["batch_size"] * optim["accumulate"] * processes
    each = f"{batch} at a time" + (f" on each of {processes} processes" if processes > 1 else "")
    lines = [f"stage {recipe['stage']}: {optim['steps']:,} steps of {samples} images ({each})"]
    parts = [*_parts(stage), ("together", stage)]
    width = max(len(name) for name, _ in parts)
    lines += [f"  {name:<{width}}  {_parameters(module)}" for name, module in parts]
    lines.append(data.describe())
    if data.instances is not None:  # scenes are not repeated
        lines.append(f"  each image is used {optim['steps'] * samples * (1 - share) / data.pictures:.3g} times")
    if share:
        lines.append(f"rehearsal: {share:.0%} of the samples are scenes of EmojiScenes' pictograms")
    lines.append(
        f"memory of a process, about {_size(memory.total(batch))}: weights {_size(memory.weights)}, gradients "
        f"{_size(memory.gradients)}, Adam {_size(memory.optimiser)} (counted), activations {batch} x "
        f"{_size(memory.activations)} (measured on one sample)"
    )
    return "\n".join(lines)


def _parts(stage: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the children of the stage with weights; a whole model is replaced by its own children."""
    parts = []
    for name, module in stage.named_children():
        if not any(True for _ in module.parameters()):
            continue
        inner = [(f"{name}.{n}", m) for n, m in module.named_children() if any(True for _ in m.parameters())]
        own = any(True for _ in module.parameters(recurse=False))
        parts += [(name, module)] if own or name != "model" or not inner else inner
    return parts or [("all of it", stage)]


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def _parameters(module: nn.Module) -> str:
    size = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    share = f"{trained:,} of them trained ({trained / size:.1%})" if 0 < trained < size else None
    return f"{size:>13,} parameters, {share or ('trained' if trained else 'frozen')}"
