"""benchmarks/race.py stores rows one by one, goes on where it was stopped, and divides in rounds."""

import json
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def race(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import race

    yield race
    for name in ("race", "speed"):
        sys.modules.pop(name, None)


def test_a_stopped_race_goes_on(race, tmp_path, monkeypatch, capsys):
    clock, built = [0.0], []
    monkeypatch.setattr(time, "process_time", lambda: clock[0])

    def takes(seconds):
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    def pair(name, peer):
        def build():
            built.append(name)
            if peer is None:
                raise ImportError("no such package")
            return takes(2.0), takes(peer)

        return "16 words", "ours", name, build

    def words():
        yield from (pair("one", 6.0), pair("missing", None), pair("slow", 100.0))

    monkeypatch.setattr(race, "PARTS", {"words": words})
    path = tmp_path / "race.json"
    stored = race.run(["words"], path, rounds=3)
    assert built == ["one", "missing", "slow"] and json.loads(path.read_text()) == stored
    assert "left out: words | 16 words | missing" in capsys.readouterr().out
    first, slow = stored["rows"].values()
    assert race.ratios(first) == pytest.approx([3, 3, 3])  # the call that warms up is not counted
    assert race.ratios(slow) == pytest.approx([50])  # one round of a slow peer is enough
    assert "| 2.00 | one | 6.00 | **3.00** | 3.00-3.00 | 3 |" in race.table(stored)

    race.run(["words"], path, rounds=3)
    assert built[3:] == ["missing"]
    race.picture(stored, tmp_path / "race.svg")
    assert (tmp_path / "race.svg").read_text().count("one") >= 1
    assert (tmp_path / "race.svg").stat().st_size < 60_000
