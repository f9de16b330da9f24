"""Whether a tuned model beats its base."""

import json

import pytest

from ovsam.evaluation import compare
from ovsam.evaluation.datasets import EvalSet


@pytest.mark.parametrize(
    "name, found, better",
    [(0.02, 0.0, True), (0.0, 0.0, False), (0.005, 0.005, False), (0.2, -0.02, False), (-0.005, 0.02, True)],
)
def test_a_tuned_model_is_better_if_no_figure_falls(coco, tmp_path, monkeypatch, capsys, name, found, better):
    """Less than MARGIN is no difference."""
    change = dict(zip(compare.DECISIVE, (name, found), strict=True))
    figures = {model: dict.fromkeys(compare.COMPARED, 0.5) for model in ("base", "tuned")}
    figures["tuned"] |= {key: 0.5 + value for key, value in change.items()}
    monkeypatch.setattr(compare, "load", lambda model, device: model)
    monkeypatch.setattr(compare, "open_set", lambda path, images: EvalSet(coco[0], tmp_path))
    monkeypatch.setattr(compare, "measure", lambda model, *_, **__: figures[model])
    assert compare.run_compare("base", "tuned", data="x.json", json_path=tmp_path / "both.json") is better
    assert ("does not beat" not in capsys.readouterr().out) is better
    assert json.loads((tmp_path / "both.json").read_text())["base"] == figures["base"]
