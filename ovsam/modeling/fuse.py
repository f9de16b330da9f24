"""A model made faster for inference alone: batch normalisation folded into convolutions, and channels-last weights."""

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ovsam.errors import InputError


@torch.no_grad()
def fuse(model) -> int:
    """Fold every batch normalisation of the towers of an OVSamModel, in place, and store weights channels-last.

    The outputs stay equal to 1e-5 of their largest value. The model is frozen and cannot be saved afterwards, since its
    weights are no longer those of its configuration. One image of zeros is encoded, to find which convolution each
    normalisation follows.

    Returns:
        how many normalisations were folded.
    """
    folded = 0
    for side, encode in ((model.sam, "encode"), (model.clip, "encode_image")):
        encoder = getattr(side, encode, None)
        if encoder is None or not any(isinstance(part, nn.BatchNorm2d) for part in side.modules()):
            continue
        image = torch.zeros(1, 3, side.image_size, side.image_size, device=model.device, dtype=model.dtype)
        for convolution, norm in _pairs(side, lambda encoder=encoder, image=image: encoder(image)):
            _fold(side, convolution, norm)
            folded += 1
    model.requires_grad_(False).to(memory_format=torch.channels_last)
    model.save_pretrained = _refuse_to_save
    return folded


def _pairs(side: nn.Module, run) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """The convolutions whose output is the input of a normalisation, while `run` is called."""
    made: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}  # the tensors are kept, so that no other takes their id
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def convolved(module, _, output):
        made[id(output)] = module, output

    def normalised(module, inputs):
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], module))

    hooks = [part.register_forward_hook(convolved) for part in side.modules() if isinstance(part, nn.Conv2d)]
    norms = [part for part in side.modules() if isinstance(part, nn.BatchNorm2d)]
    hooks += [norm.register_forward_pre_hook(normalised) for norm in norms]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    once = [convolution for convolution, _ in pairs]  # one that is called twice has two normalisations
    return [(convolution, norm) for convolution, norm in pairs if once.count(convolution) == 1]


def _fold(side: nn.Module, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    convolution.weight, convolution.bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
    after = getattr(norm, "act", None) or nn.Identity()  # timm's normalisation applies the activation too
    for parent in side.modules():
        for name, part in parent.named_children():
            if part is norm:
                setattr(parent, name, after)


def _refuse_to_save(*_, **__):
    raise InputError("This model was fused for inference and cannot be saved; load it again without `fuse`.")
