"""On a GPU: SAM 2-large's shapes in bfloat16, compiled, by CUDA events; everything with 1,203 words and 100 objects.

    python benchmarks/race_cuda.py [--rounds 20]

MFU is the counted FLOPs of the encoder, divided by its time and by the rate of a large matrix product in this same run.
Without a GPU it says so and measures nothing. Weights are random.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from race import OBJECTS, SIDE, unit
from speed import random_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Sam2Config

WARM_UP = 3
MATRIX = 8192


def large() -> Sam2Config:
    """hiera-large of SAM 2."""
    config = Sam2Config()
    trunk = config.vision_config.backbone_config
    trunk.hidden_size, trunk.num_attention_heads = 144, 2
    trunk.blocks_per_stage, trunk.global_attention_blocks = [2, 6, 36, 4], [23, 33, 43]
    trunk.embed_dim_per_stage, trunk.num_attention_heads_per_stage = [144, 288, 576, 1152], [2, 4, 8, 16]
    trunk.window_positional_embedding_background_size = [7, 7]
    trunk.window_size_per_stage = [8, 4, 16, 8]
    config.vision_config.backbone_channel_list = [1152, 576, 288, 144]
    return config


def milliseconds(run: Callable[[], object], rounds: int) -> list[float]:
    """Time of each call by CUDA events, after some that warm up and compile."""
    taken = []
    for number in range(WARM_UP + rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if number >= WARM_UP:
            taken.append(start.elapsed_time(end))
    return taken


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    if not torch.cuda.is_available():
        print("There is no GPU: nothing was measured.")
        return
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    model = random_model(large()).to(**kind)
    model.config.max_detections = OBJECTS
    pixels, embeds = torch.randn(1, 3, SIDE, SIDE, **kind), unit(1203, model.clip.embed_dim).to(**kind)
    with FlopCounterMode(display=False) as flops:
        model.sam.encode(pixels)
    square = torch.randn(MATRIX, MATRIX, **kind)
    product = statistics.median(milliseconds(lambda: square @ square, rounds))
    rate = 2 * MATRIX**3 / product  # FLOPs a millisecond
    model.sam.encode = torch.compile(model.sam.encode, mode="max-autotune-no-cudagraphs")
    asked = {"text_embeds": embeds, "everything": True, "proposal_threshold": 0.0}
    runs = {
        "encoder": lambda: model.sam.encode(pixels),
        f"everything, {OBJECTS} objects, 1,203 words": lambda: model(pixel_values=pixels, **asked),
    }
    print(f"{torch.cuda.get_device_name()}, bfloat16, {SIDE} px, hiera-large's shapes, random weights")
    for name, run in runs.items():
        taken = milliseconds(run, rounds)
        print(f"  {name:<40}{statistics.median(taken):8.2f} ms  ({min(taken):.2f}-{max(taken):.2f})")
        if name == "encoder":
            print(f"  {'MFU of the encoder':<40}{flops.get_total_flops() / statistics.median(taken) / rate:8.1%}")


if __name__ == "__main__":
    main()
