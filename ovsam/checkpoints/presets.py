"""Presets: whole compositions by name, and the choice of `auto`."""

import sys
from dataclasses import dataclass

from ovsam.checkpoints.download import cached_folder, hub_has
from ovsam.checkpoints.embedded import EMBEDDED, find_checkpoint
from ovsam.errors import InputError


@dataclass(frozen=True)
class Preset:
    """`parts` are the arguments of `compose`, empty if the preset is a checkpoint of this project; `licences` has one
    entry for each part; `parameters` in millions; `download` in MB of weights (the file of SAM 2 includes its
    tracker)."""

    parts: dict[str, str]
    licences: tuple[str, ...]
    parameters: float
    download: int
    note: str

    @property
    def is_cached(self) -> bool:
        return all(cached_folder(part) for part in self.parts.values())


PRESETS = {
    "photo": Preset(
        {"sam": "facebook/sam2.1-hiera-small", "clip": "google/owlv2-base-patch16-ensemble"},
        ("Apache-2.0", "Apache-2.0"),
        parameters=193.5,
        download=804,
        note="photographs; SAM 2.1 and OWLv2 as they were released",
    ),
    "photo-large": Preset(
        {"sam": "facebook/sam2.1-hiera-large", "clip": "google/owlv2-large-patch14-ensemble"},
        ("Apache-2.0", "Apache-2.0"),
        parameters=654.5,
        download=2650,
        note="the same, larger and slower",
    ),
    EMBEDDED: Preset(
        {},
        ("Apache-2.0",),
        parameters=33.6,
        download=0,
        note="small, comes with the package; photographs, COCO's names best",
    ),
}


def choose_auto() -> str:
    """Return the preset for `auto`: `photo` if it is in the cache or can be downloaded, else the embedded checkpoint,
    with a line on stderr."""
    photo = PRESETS["photo"]
    if photo.is_cached or hub_has(photo.parts["sam"]):  # not hub_answers(): captive portals answer too
        return "photo"
    print(
        f"ovsam: the Hub does not respond and the model photo is not in the cache; using {EMBEDDED}, which is small "
        "and finds COCO's 80 words best",
        file=sys.stderr,
    )
    return EMBEDDED


def announce_download(name: str) -> None:
    """Print one line on stderr before a preset is downloaded, with its size."""
    if not PRESETS[name].is_cached:
        size = PRESETS[name].download
        print(f"ovsam: the model {name} is downloaded once, about {size:,} MB", file=sys.stderr)


def _where(checkpoint: str) -> str:
    """Availability of a checkpoint of this project, whose text tower may be missing."""
    try:
        find_checkpoint(checkpoint)
    except InputError:
        return "no"
    return "embedded"


def offered() -> list[str]:
    """Return the presets that are available here."""
    return [name for name, preset in PRESETS.items() if preset.parts or _where(name) != "no"]


def table() -> str:
    """Return a table of the presets: parts with licences, parameters, download size, and whether it is here already."""
    rows = [("preset", "parameters", "download", "here", "parts")]
    for preset_name, preset in PRESETS.items():
        here = ("cached" if preset.is_cached else "no") if preset.parts else _where(preset_name)
        parts = zip(preset.parts.values() or [preset_name], preset.licences, strict=True)
        listed = " + ".join(f"{part} ({licence})" for part, licence in parts)
        rows.append(
            (preset_name, f"{preset.parameters:.1f} M", f"{preset.download:,} MB", here, f"{listed}: {preset.note}")
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, parameters, download, state, made_of in rows:
        cells = name.ljust(widths[0]), parameters.rjust(widths[1]), download.rjust(widths[2]), state.ljust(widths[3])
        lines.append("  ".join((*cells, made_of)))
    return "\n".join(lines)
