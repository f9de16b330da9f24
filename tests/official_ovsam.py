"""The neck and the mask decoder of the official Open-Vocabulary SAM, written out in plain PyTorch on official names.

Both gave the numbers of the official modules to 2e-6 of their range when they were written. They stand in for the
official weights, which are too large to be kept: with random weights of the same names, the converted model must give
what these functions give.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def written_out_neck(w: dict[str, Tensor], maps: list[Tensor]) -> Tensor:
    """The neck of the official code, from its own weights: maps at strides 4, 8, 16, 32 -> [B, 256, 16, 16]."""
    w = {key.removeprefix("neck_student."): tensor.float() for key, tensor in w.items()}
    steps = (F.conv2d, F.conv2d, F.conv2d, F.conv_transpose2d)
    x = 0
    for i, (step, stride) in enumerate(zip(steps, (4, 2, 1, 2), strict=True)):
        projection = f"patch_embeds.{i}.projection."
        x = x + step(maps[i], w[projection + "weight"], w[projection + "bias"], stride=stride)
        x = x + w["level_encoding.weight"][i][:, None, None]
    x = x.permute(0, 2, 3, 1) + w["pos_embed"]  # [B, C, h, w] -> [B, h, w, C]
    (b, h, _, c), heads = x.shape, 16
    for i in range(5):
        block = {key.removeprefix(f"blocks.{i}."): t for key, t in w.items() if key.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (c,), block["norm1.weight"], block["norm1.bias"], 1e-6)
        side = 14 if i < 4 else h
        pad = -h % side
        y = F.pad(y, (0, 0, 0, pad, 0, pad))  # padded cells take part in attention
        out = torch.zeros_like(y)
        for top in range(0, h, side):
            for left in range(0, h, side):
                window = y[:, top : top + side, left : left + side].reshape(b, side * side, c)
                qkv = F.linear(window, block["attn.qkv.weight"], block["attn.qkv.bias"])
                q, k, v = qkv.view(b, side * side, 3, heads, -1).permute(
                    2, 0, 3, 1, 4
                )  # each [B, heads, cells, C/heads]
                rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
                down = block["attn.rel_pos_h"][rows[:, None] - rows + side - 1]  # [cells, cells, C/heads]
                across = block["attn.rel_pos_w"][columns[:, None] - columns + side - 1]
                logits = q @ k.mT * q.shape[-1] ** -0.5 + torch.einsum("bnqc,qkc->bnqk", q, down + across)
                mixed = (logits.softmax(-1) @ v).transpose(1, 2).reshape(b, side, side, c)
                out[:, top : top + side, left : left + side] = mixed
        x = x + F.linear(out[:, :h, :h], block["attn.proj.weight"], block["attn.proj.bias"])
        y = F.layer_norm(x, (c,), block["norm2.weight"], block["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, block["mlp.lin1.weight"], block["mlp.lin1.bias"]))
        x = x + F.linear(y, block["mlp.lin2.weight"], block["mlp.lin2.bias"])
    x = x.permute(0, 3, 1, 2)
    for i, padding in ((0, 0), (2, 1)):
        x = F.conv2d(x, w[f"neck.{i}.weight"], padding=padding).permute(0, 2, 3, 1)
        x = F.layer_norm(x, (256,), w[f"neck.{i + 1}.weight"], w[f"neck.{i + 1}.bias"], 1e-6).permute(0, 3, 1, 2)
    return x


def written_out_decoder(
    w: dict[str, Tensor], image: Tensor, position: Tensor, sparse: Tensor, dense: Tensor
) -> tuple[Tensor, Tensor]:
    """The mask decoder of the official code, from its own weights: low-resolution masks [P, 64, 64] and what its
    transformer makes of the tokens [P, T, 256]; image and position [1, 256, 16, 16], sparse [P, t, 256], dense
    [256, 1, 1]."""
    w = {key.removeprefix("mask_decoder."): tensor.float() for key, tensor in w.items()}

    def linear(name, x):
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def norm(name, x, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)

    def attention(name, q, k, v):
        q, k, v = (linear(f"{name}.{part}_proj", x) for part, x in (("q", q), ("k", k), ("v", v)))
        q, k, v = (x.unflatten(-1, (8, -1)).transpose(1, 2) for x in (q, k, v))  # [P, n, C] -> [P, 8, n, C/8]
        mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return linear(name + ".out_proj", mixed.transpose(1, 2).flatten(2))

    n = len(sparse)
    tokens = torch.cat([w["label_token.weight"], w["mask_decoder.mask_tokens.weight"]]).expand(n, -1, -1)
    tokens = torch.cat([tokens, sparse], 1)
    cells = (image + dense).flatten(2).mT.expand(n, -1, -1)  # [P, h*w, C]
    code = position.flatten(2).mT.expand(n, -1, -1)
    x = tokens
    for i in range(2):
        layer = f"mask_decoder.transformer.layers.{i}."
        q = x + tokens if i else x
        x = norm(layer + "norm1", attention(layer + "self_attn", q, q, x) + (x if i else 0))
        x = norm(layer + "norm2", x + attention(layer + "cross_attn_token_to_image", x + tokens, cells + code, cells))
        x = norm(layer + "norm3", x + linear(layer + "mlp.lin2", linear(layer + "mlp.lin1", x).relu()))
        read = attention(layer + "cross_attn_image_to_token", cells + code, x + tokens, x)
        cells = norm(layer + "norm4", cells + read)
    name = "mask_decoder.transformer."
    x = x + attention(name + "final_attn_token_to_image", x + tokens, cells + code, cells)
    x = norm(name + "norm_final_attn", x)
    up = cells.mT.unflatten(2, image.shape[-2:])
    up = F.conv_transpose2d(
        up, w["mask_decoder.output_upscaling.0.weight"], w["mask_decoder.output_upscaling.0.bias"], 2
    )
    up = F.gelu(norm("mask_decoder.output_upscaling.1", up.permute(0, 2, 3, 1), 1e-6).permute(0, 3, 1, 2))
    up = F.conv_transpose2d(
        up, w["mask_decoder.output_upscaling.3.weight"], w["mask_decoder.output_upscaling.3.bias"], 2
    )
    weight = x[:, 1]
    for i in range(3):
        weight = linear(f"mask_decoder.output_hypernetworks_mlps.0.layers.{i}", weight.relu() if i else weight)
    return torch.einsum("pc,pchw->phw", weight, F.gelu(up)), x
