"""Valid content with values of wrong types, nesting and size at any place."""

import copy
from typing import Any

from hypothesis import strategies as st

DEEP: list = []
for _ in range(300):
    DEEP = [DEEP]
NAN, INF = float("nan"), float("inf")
VALUES = [None, True, False, 0, 1, -1, 7, 1.5, -0.5, 1e308, 10**30, 2**31, 2**63, NAN, INF, -INF]
VALUES += ["", " ", "x", "a" * 300, "\ud800", "\0", "1", "nan", "é", "[", "../../etc/passwd", "{}"]
VALUES += [
    [],
    [[]],
    [[[]]],
    [None],
    [1],
    [1, 2],
    [1, 2, 3, 4],
    [[1, 2, 3, 4]],
    [[1, 2, 3, 4, 5, 6]],
    ["a"],
    [NAN, 1],
    DEEP,
]
VALUES += [{}, {"a": 1}, {"id": 1}, {"size": [1, 1], "counts": [1]}, {"size": [32, 48], "counts": "X1"}]
values = st.sampled_from(VALUES) | st.integers(-(10**6), 10**6) | st.floats() | st.text(max_size=8)

# A mutation: a place, counted over all places of the content, what is done there, and a value.
mutations = st.lists(
    st.tuples(st.integers(0, 10_000), st.sampled_from(["set", "set", "set", "drop", "double", "add"]), values),
    min_size=1,
    max_size=3,
)


def mutate(content: Any, changes: list) -> Any:
    content = copy.deepcopy(content)
    for number, action, shared in changes:
        value = copy.deepcopy(shared)
        places = list(_places(content))
        if not places:
            return value
        table, key = places[number % len(places)]
        if action == "drop":
            del table[key]
        elif action == "double" and isinstance(table, list):
            table.insert(key, copy.deepcopy(table[key]))
        elif action == "add" and isinstance(table, dict):
            table[str(value)[:20]] = value
        else:
            table[key] = value
    return content


def _places(content: Any):
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield content, key
            yield from _places(value) if value is not DEEP else ()
