"""How much faster our pass over SAM's mask decoder is than transformers' own, at the same weights and prompts.

`python benchmarks/decode_speed.py [--family sam2] [--prompts 64] [--threads 2] [--repeats 5]`: random weights at the
released shapes (C = 256, a 64 x 64 embedding of a 1024 px picture: what SAM 2-tiny gives). Three ways are timed in one
process and in turns, so that the machine's load falls on all: ours; one call of transformers' decoder for all prompts;
and transformers' decoder in chunks of the size that is fastest for it, found first.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import EdgeTamConfig, Sam2Config, SamConfig

from ovsam.modeling.sam import SAM_SIDES, SamFeatures
from ovsam.modeling.sam.decode import prompts_per_chunk

CONFIGS = {"sam": SamConfig, "sam2": Sam2Config, "edgetam": EdgeTamConfig}
CHUNKS = (1, 2, 4, 8, 16)


def seconds(run: Callable[[], object]) -> float:
    """CPU seconds of this process, which other work on the machine changes little."""
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=CONFIGS, default="sam2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    with torch.device("meta"):
        side = SAM_SIDES[arguments.family](CONFIGS[arguments.family](), part="decoder").eval()
    side.to_empty(device="cpu")
    for parameter in side.parameters():  # fan-in, so that nothing over- or underflows
        torch.nn.init.normal_(parameter, std=max(parameter[0].numel(), 1) ** -0.5 if parameter.dim() > 1 else 1.0)
    side.model.prompt_encoder.shared_embedding.positional_embedding.normal_()
    width, grid = side.width, side.grid
    fine = (torch.randn(1, width // 8, 4 * grid, 4 * grid), torch.randn(1, width // 4, 2 * grid, 2 * grid))
    high_res = fine if hasattr(side.model.mask_decoder, "conv_s0") else ()
    features = SamFeatures(embedding=torch.randn(1, width, grid, grid), high_res=high_res)
    corner = torch.rand(1, arguments.prompts, 2) * 800
    boxes = torch.cat([corner, corner + 20 + torch.rand(1, arguments.prompts, 2) * 200], -1)
    sparse, dense = side.model.prompt_encoder(None, None, boxes, None)
    position = side.model.get_image_wide_positional_embeddings()
    more = {"high_resolution_features": list(high_res)} if high_res else {}

    def ours() -> Tensor:
        return side.select_masks(side.decode(features, input_boxes=boxes), False, by_stability=False).masks

    def stock(chunk: int, prompts: int = arguments.prompts) -> Tensor:
        decoder, chunks = side.model.mask_decoder, sparse[:, :prompts].split(chunk, dim=1)
        return torch.cat(
            [decoder(features.embedding, position, some, dense, False, **more)[0] for some in chunks], dim=1
        )

    side.model.mask_decoder.dynamic_multimask_via_stability = False  # which mask is chosen costs the same
    chunks = [chunk for chunk in CHUNKS if chunk < arguments.prompts]
    best = min(chunks, key=lambda chunk: min(seconds(lambda: stock(chunk, 16)) for _ in range(3)))
    error = (ours() - stock(arguments.prompts)).abs().max().item()
    runs = {"ours": ours, "one call": lambda: stock(arguments.prompts), "best chunks": lambda: stock(best)}
    times = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))

    median = {name: statistics.median(taken) for name, taken in times.items()}
    ratios = {name: [theirs / own for theirs, own in zip(times[name], times["ours"], strict=True)] for name in times}
    if arguments.json:
        print(json.dumps(vars(arguments) | {"best_chunk": best, "error": error, "seconds": times, "ratios": ratios}))
        return
    print(f"{arguments.family}, {arguments.prompts} boxes, {arguments.threads} threads, {arguments.repeats} repeats")
    print(f"{'':28}{'median':>10}{'least':>10}{'most':>10}{'ours is':>22}")
    labels = {
        "ours": f"ours, {prompts_per_chunk(features.embedding)} at once",
        "one call": f"transformers, {arguments.prompts} at once",
        "best chunks": f"transformers, {best} at once",
    }
    for name, taken in times.items():
        ratio = ratios[name]
        faster = (
            f"{median[name] / median['ours']:.2f} x faster ({min(ratio):.2f}-{max(ratio):.2f})"
            if name != "ours"
            else ""
        )
        print(f"{labels[name]:28}{median[name]:8.2f} s{min(taken):8.2f} s{max(taken):8.2f} s{faster:>32}")
    print(f"largest difference of a mask logit: {error:.1e}")


if __name__ == "__main__":
    main()
