"""How much faster our pass over SAM 2's mask decoder is than transformers' own, at the same weights and prompts.

`python benchmarks/decode_speed.py [--prompts 32] [--threads 2]`: random weights at the released shapes (C = 256, a
64 x 64 embedding of a 1024 px picture); both are timed in turns, so the machine's load falls on both.
"""

import argparse
import statistics
import time

import torch
from transformers import Sam2Config

from ovsam.sam import SAM_SIDES
from ovsam.sam.base import SamFeatures


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    side = SAM_SIDES["sam2"](Sam2Config(), part="all").eval()
    width, grid = side.width, side.image_size // 16
    high_res = (torch.randn(1, width // 8, 4 * grid, 4 * grid), torch.randn(1, width // 4, 2 * grid, 2 * grid))
    features = SamFeatures(embedding=torch.randn(1, width, grid, grid), high_res=high_res)
    corner = torch.rand(1, arguments.prompts, 2) * 800
    boxes = torch.cat([corner, corner + 20 + torch.rand(1, arguments.prompts, 2) * 200], -1)

    def ours():
        return side.select_masks(side.decode(features, input_boxes=boxes), multimask_output=False).masks

    def stock():
        embeddings = [*features.high_res, features.embedding]
        return side.model(image_embeddings=embeddings, input_boxes=boxes, multimask_output=False).pred_masks

    error = (ours() - stock()).abs().max().item()
    times: dict = {ours: [], stock: []}
    for _ in range(arguments.repeats):
        for run in (stock, ours):
            start = time.perf_counter()
            run()
            times[run].append(time.perf_counter() - start)
    fast, slow = (statistics.median(times[run]) for run in (ours, stock))
    print(f"{arguments.prompts} boxes, {arguments.threads} threads: transformers {slow:.2f} s, ours {fast:.2f} s")
    print(f"ratio {slow / fast:.2f}, largest difference of a mask logit {error:.1e}")


if __name__ == "__main__":
    main()
