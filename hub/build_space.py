"""Builds the folder of a Hugging Face Space: `python hub/build_space.py ORG/NAME --wheel dist/ovsam-….whl -o space`.

It is demo/ with our wheel beside it. A Space installs requirements.txt before it has its other files, so that the line
there is the wheel's address in the Space's own repository, which must be public: upload the folder, and it builds.
"""

import argparse
import shutil
from pathlib import Path

from huggingface_hub import hf_hub_url

DEMO = Path(__file__).resolve().parents[1] / "demo"


def build_space(repo: str, wheel: Path, output: Path) -> None:
    if output.exists() and any(output.iterdir()):
        raise SystemExit(f"{output} is not empty; name a new folder.")
    shutil.copytree(DEMO, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(wheel, output)
    address = hf_hub_url(repo, wheel.name, repo_type="space")
    (output / "requirements.txt").write_text(f"ovsam[demo] @ {address}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", metavar="ORG/NAME", help="the Space")
    parser.add_argument("--wheel", type=Path, required=True, help="the output of `pip wheel . --no-deps`")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder that is new or empty")
    arguments = parser.parse_args()
    build_space(arguments.repo, arguments.wheel, arguments.output)
