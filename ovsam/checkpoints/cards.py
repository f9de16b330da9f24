"""Model cards: checks of the Hub's rules for front matter without the Hub, and a card for folders without one."""

import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedModel

from ovsam.errors import InputError

LIBRARY = "ovsam"
TASK = "image-segmentation"  # the name of the task on the Hub
LISTS = ("tags", "datasets", "metrics", "base_model", "language")  # each may also be one string
LINK = re.compile(r"\]\((?![a-z]+:|#|/)([^)\s#]+)")  # a link within the repository
FRONT_MATTER = re.compile(r"---\n(.*?)\n---(\n|$)", re.S)
LANGUAGE = re.compile(r"[a-z]{2,3}(-\w+)?|code|multilingual")

DEFAULT = """\
---
library_name: {library}
pipeline_tag: {task}
tags:
- open-vocabulary
- segment-anything
---

# {name}

{what}

## Use

```python
{use}
```

## Training data, licence, results and limits

Not stated.
"""

USE_WHOLE = """\
import ovsam

segmenter = ovsam.load("{repo}")
found = segmenter.where("photo.jpg", ["dog", "umbrella"])
print(found.table())"""
USE_ADAPTER = """\
import ovsam

adapter = ovsam.{kind}.from_pretrained("{repo}")"""


def check_card(text: str, folder: Path) -> list[str]:
    """Check that the Hub accepts a card, and return the files of the folder that it links to.

    Raises:
        InputError: the front matter is missing or invalid, the model-index is invalid, or a linked file is missing.
    """
    try:
        front_matter = FRONT_MATTER.match(text)
        data = (yaml.safe_load(front_matter.group(1)) if front_matter else None) or {}
        if data:
            ModelCard(text)  # reads the model-index as well
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"The front matter of README.md is not valid: {str(error).splitlines()[0]}.") from error
    problems = [
        *(f"{key} is not text or a list of texts" for key in LISTS if key in data and not _texts(data[key])),
        *(
            f"{key} is not text"
            for key in ("license", "library_name", "pipeline_tag", "license_name")
            if key in data and not isinstance(data[key], str)
        ),
    ]
    if not data:
        problems.append("it is empty; state at least license and library_name")
    if data.get("license") == "other" and not data.get("license_name"):
        problems.append("the license 'other' needs a license_name")
    for base in _texts(data.get("base_model", [])) or ():
        try:
            validate_repo_id(base)
        except HFValidationError:
            problems.append(f"base_model {base!r} is not the name of a repository, ORG/NAME")
    for language in _texts(data.get("language", [])) or ():
        if not LANGUAGE.fullmatch(language):
            problems.append(f"language {language!r} is not an ISO 639 code, such as en")
    if problems:
        raise InputError(f"The front matter of README.md is not valid: {problems[0]}.")

    links = sorted(set(LINK.findall(text)))
    for link in links:
        if not (folder / link).is_file() or not (folder / link).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"README.md links to {link}, which is not in {folder}; add the file or remove the link.")
    return links


def default_card(repo: str, model: PreTrainedModel) -> str:
    """Return a card with the facts that the model itself provides; the rest is marked as not stated."""
    kind, count = type(model).__name__, sum(p.numel() for p in model.parameters())
    return DEFAULT.format(
        library=LIBRARY,
        task=TASK,
        name=repo.partition("/")[2],
        what=f"An `{kind}` of [ovsam](https://pypi.org/project/ovsam), {count / 1e6:.1f} M parameters.",
        use=(USE_WHOLE if kind == "OVSamModel" else USE_ADAPTER).format(repo=repo, kind=kind),
    )


def _texts(value) -> list[str] | None:
    values = [value] if isinstance(value, str) else value
    return values if isinstance(values, list) and all(isinstance(each, str) for each in values) else None
