"""How long visitors of the demo wait while one of them asks for ImageNet-21k: `python benchmarks/visitors.py`.

Starts the demo on this machine with an empty cache of embeddings. Each visitor has an image of their own, which is
encoded beforehand. Then all ask at the same moment, twice in turn: once the first one asks for everything with the 80
names of COCO, and once with the 21,841 of ImageNet-21k, whose embeddings nobody has made yet. Prints the waits of the
others.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = sorted((ROOT / "tests" / "data" / "photos-val" / "images").glob("*.jpg"))


def serve(port: int) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "demo")]
    import app
    import engine

    engine.AT_START = ()  # the worst case: the embeddings are made when the visitor asks
    app.main("ovsam-tiny", "127.0.0.1", port)


def connect(url: str):
    from gradio_client import Client

    for _ in range(600):
        try:
            return Client(url, verbose=False, httpx_kwargs={"timeout": 600.0})
        except Exception:  # the server has not started yet
            time.sleep(0.5)
    raise SystemExit("The demo did not start.")


def ask_together(clients: list, vocabulary: str, wait_for_first: bool = True) -> list[float]:
    """Seconds that each visitor but the first one waits for an answer about words; the first one asks for everything
    with the vocabulary."""
    from gradio_client import handle_file

    together = threading.Barrier(len(clients))
    pictures = [handle_file(str(IMAGES[number % len(IMAGES)])) for number in range(len(clients))]

    def visit(number: int) -> float:
        together.wait()
        start = time.perf_counter()
        clients[number].predict(pictures[number], words=["person", "car", "dog"], api_name="/where")
        return time.perf_counter() - start

    with ThreadPoolExecutor(len(clients)) as pool:
        others = [pool.submit(visit, number) for number in range(1, len(clients))]
        together.wait()
        first = clients[0].submit(pictures[0], vocabulary=vocabulary, api_name="/everything")
        waits = [one.result() for one in others]
    if wait_for_first:
        first.result()
    return waits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"OVSAM_CACHE": cache, "GRADIO_TEMP_DIR": cache, "GRADIO_ANALYTICS_ENABLED": "False"}
        server = subprocess.Popen([sys.executable, __file__, "--serve", str(port)], env=environment)
        try:
            measure(f"http://127.0.0.1:{port}", arguments.visitors)
        finally:
            server.terminate()
            server.wait()


def measure(url: str, visitors: int) -> None:
    clients = [connect(url) for _ in range(visitors)]
    ask_together(clients, "coco")  # encodes the images
    waits = {}
    for name, vocabulary in (("without", "coco"), ("with", "imagenet21k")):
        waits[name] = others = sorted(ask_together(clients, vocabulary, vocabulary == "coco"))
        print(
            f"{name} ImageNet-21k: the {len(others)} others wait {statistics.median(others):.2f} s (median), "
            f"{max(others):.2f} s at most",
            flush=True,
        )
    more = [late - early for late, early in zip(waits["with"], waits["without"], strict=True)]
    print(f"the others wait {statistics.mean(more):.2f} s more on average, {max(more):.2f} s at most (place by place)")


if __name__ == "__main__":
    main()
