"""Imports of the library go down only: from a room to the rooms below it, and never in a circle."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("training", "evaluation", "inference", "data", "checkpoints", "results", "processing", "modeling", "ops")


def read_imports(package: Path) -> dict[str, set[str]]:
    """Return the modules of the package that each of its modules imports, lazily or for types only too."""
    files = {
        ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): file
        for file in package.rglob("*.py")
    }
    imports = {}
    for module, file in files.items():
        found = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file}:{node.lineno} has a relative import, which this test does not follow"
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in files else node.module for name in names}
        imports[module] = found & files.keys() - {module}
    return imports


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def upward(imports: dict[str, set[str]]) -> list[str]:
    rank = {name: i for i, name in enumerate(ROOMS)} | {"": -1, "errors": len(ROOMS)}
    return [
        f"{module} -> {imported}"
        for module, found in imports.items()
        for imported in found
        if rank[room(imported)] < rank[room(module)]
    ]


def circles(imports: dict[str, set[str]]) -> set[str]:
    """Return the modules that are left when those without imports are taken away, again and again."""
    left = {module: set(found) for module, found in imports.items()}
    while leaves := {module for module, found in left.items() if not found}:
        left = {module: found - leaves for module, found in left.items() if module not in leaves}
    return set(left)


def test_no_upward_import():
    assert upward(read_imports(ROOT / "ovsam")) == []


def test_no_circle():
    assert circles(read_imports(ROOT / "ovsam")) == set()


def test_faults_are_found(tmp_path):
    package = tmp_path / "ovsam"
    for file, text in {
        "ops/boxes.py": "def area():\n    from ovsam.results.instance import Instance\n",
        "results/instance.py": "from ovsam.results import results",
        "results/results.py": "if TYPE_CHECKING:\n    import ovsam.results.instance\n",
    }.items():
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(text)
    imports = read_imports(package)
    assert upward(imports) == ["ovsam.ops.boxes -> ovsam.results.instance"]
    assert {"ovsam.results.instance", "ovsam.results.results"} <= circles(imports)
