"""Cost of video: memory over many frames, time for more objects, and time beside transformers' own tracker.

    python benchmarks/video.py memory [--frames 10000] [--objects 5]
    python benchmarks/video.py speed [--model ovsam-tiny] [--threads 2]
    python benchmarks/video.py transformers [--frames 6] [--objects 5] [--threads 2]

`memory` and `transformers` run on random weights, since their results do not depend on the weights.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from transformers import Sam2VideoConfig, Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ovsam  # noqa: E402
from ovsam.modeling.sam.video import Sam2VideoSide  # noqa: E402
from ovsam.modeling.tracking import OVSamVideoSession, Tracker, VideoPrompt  # noqa: E402
from tests.common import SIZE, tiny_video_model  # noqa: E402

EARLY = 200  # the frame that resident memory is compared with


def resident() -> float:
    """Resident memory of this process in MB."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def squares(count: int, size: int) -> list[torch.Tensor]:
    """Masks [size, size] of squares."""
    side, masks = size // 6, []
    for number in range(count):
        mask = torch.zeros(size, size, dtype=torch.bool)
        x, y = (number * 37 * size // 200) % (size - side), (number * 61 * size // 200) % (size - side)
        mask[y : y + side, x : x + side] = True
        masks.append(mask)
    return masks


def measure_memory(frames: int, objects: int) -> None:
    """Resident memory at frame 200 and at the last frame, with each tracker."""
    for tracker in ("memory", "propagation"):
        model = tiny_video_model(adapters=False)
        session, early = OVSamVideoSession(tracker=tracker), 0.0
        for number, mask in enumerate(squares(objects, SIZE), 1):
            session.add_prompt(number, 0, VideoPrompt(mask=mask))
        generator = torch.Generator().manual_seed(0)
        for frame in range(frames):
            model(session, frame=torch.randn(3, SIZE, SIZE, generator=generator))
            if frame == EARLY:
                early = resident()
        late = resident()
        print(f"{tracker}: {frames:,} frames, {objects} objects, {session.nbytes() / 2**10:.0f} KB in the session")
        print(f"  {early:.0f} MB at frame {EARLY}, {late:.0f} MB at the end: {late / early:.3f}", flush=True)


def measure_speed(model: str, repeats: int) -> None:
    """Frames per second with 3 objects, and a frame with 10 objects against one with 1; encoding included."""
    segmenter = ovsam.load(model, device="cpu")
    size = segmenter.model.sam.image_size
    pixels = np.random.default_rng(0).integers(0, 255, (size // 32, size // 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((size, size))
    tracker, sessions = Tracker(segmenter.model), {}
    for count in (1, 3, 10):
        sessions[count] = OVSamVideoSession()
        for number, mask in enumerate(squares(count, size), 1):
            sessions[count].add_prompt(number, 0, VideoPrompt(mask=mask))
    times, busy = {count: [] for count in sessions}, []
    for frame in range(repeats + 4):
        for count, session in sessions.items():  # in turns, so that load of the machine affects all
            start, used = time.perf_counter(), time.process_time()
            tracker(session, frame, segmenter.encode_frame(image).features)
            if frame >= 4:  # the references are complete
                times[count].append(time.perf_counter() - start)
                if count == 3:
                    busy.append(time.process_time() - used)
    median = {count: statistics.median(each) for count, each in times.items()}
    print(f"{segmenter.name}, {torch.get_num_threads()} threads: {1 / median[3]:.1f} frames/s with 3 objects")
    print(f"processor time of a frame with 3 objects, all threads together: {statistics.median(busy):.3f} s")
    print(f"a frame with 10 objects / with 1: {median[10] / median[1]:.2f} ({median[10]:.3f} s / {median[1]:.3f} s)")


def measure_transformers(frames: int, objects: int) -> None:
    """SAM 2.1-tiny's shapes: seconds a frame of Sam2VideoModel alone, and of the same weights here."""
    torch.manual_seed(0)
    stock = Sam2VideoModel(Sam2VideoConfig()).eval()
    size = stock.config.image_size
    side = Sam2VideoSide(stock.config).eval()
    side.model.load_state_dict(stock.state_dict())
    video = torch.randn(frames, 3, size, size)
    theirs = Sam2VideoInferenceSession(video=video, video_height=size, video_width=size, dtype=torch.float32)
    session = OVSamVideoSession(video, video_height=size, video_width=size)
    masks = squares(objects, size)
    for number, mask in enumerate(masks, 1):
        theirs.add_mask_inputs(theirs.obj_id_to_idx(number), 0, mask[None, None])
        session.add_prompt(number, 0, VideoPrompt(mask=mask))
    theirs.obj_with_new_inputs = list(range(1, objects + 1))
    seconds: dict[str, list[float]] = {"transformers": [], "ours": []}
    busy: dict[str, list[float]] = {"transformers": [], "ours": []}  # processor time; other programs hardly change it
    tracker = Tracker(
        SimpleNamespace(sam=side, device=torch.device("cpu"))
    )  # the tracker reads nothing else of a model
    for frame in range(frames):
        start, used = time.perf_counter(), time.process_time()
        one = stock(theirs, frame_idx=frame)
        seconds["transformers"].append(time.perf_counter() - start)
        busy["transformers"].append(time.process_time() - used)
        start, used = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            features = ovsam.OVSamFeatures(sam=side.encode(video[frame][None]), maps=())
        other = tracker(session, frame, features)
        seconds["ours"].append(time.perf_counter() - start)
        busy["ours"].append(time.process_time() - used)
        difference = (one.pred_masks - other.pred_masks).abs().max()
        now = " / ".join(f"{each[-1]:.2f} s" for each in seconds.values())
        print(f"frame {frame}: {now}, largest difference of masks {difference:.1e}", flush=True)
    for kind, times in (("clock", seconds), ("processor", busy)):
        last = {name: statistics.median(each[frames // 2 :]) for name, each in times.items()}
        ratio = last["transformers"] / last["ours"]
        print(f"{objects} objects, {kind} time: {ratio:.2f} x faster a frame than Sam2VideoModel alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "speed", "transformers"))
    parser.add_argument("--frames", type=int)
    parser.add_argument("--objects", type=int, default=5)
    parser.add_argument("--model", default="ovsam-tiny")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "memory":
        measure_memory(args.frames or 10_000, args.objects)
    elif args.what == "speed":
        measure_speed(args.model, args.repeats)
    else:
        measure_transformers(args.frames or 6, args.objects)


if __name__ == "__main__":
    main()
