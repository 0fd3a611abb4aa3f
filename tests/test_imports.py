"""The rooms of the house and who may enter which: imports run one way."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cactus_ray"
CORE = {
    "bounds",
    "compression",
    "training",
    "verification",
    "models",
    "data",
    "config",
    "errors",
    "interrupts",
    "options",
    "outputs",
    "parsing",
    "texts",
}
CORE_LIBRARIES = {"torch", "numpy", "scipy", "torchvision", "sklearn", "PIL", "safetensors", "cactus_ray"}
OPTIONAL = {"verification/lirpa.py": {"auto_LiRPA"}}
"""Libraries that one file may import, by name when they are asked for, and that nothing else needs."""
FORBIDDEN = {
    **{room: {"interchange", "search", "cluster", "report", "deploy", "commands", "cli"} for room in CORE},
    "interchange": {"search", "cluster", "report", "deploy", "commands", "cli"},
    "search": {"cluster", "report", "deploy", "commands", "cli"},
    "cluster": {"report", "deploy", "commands", "cli"},
    "report": {"cluster", "deploy", "commands", "cli"},
    "deploy": {"cluster", "report", "commands", "cli"},
    "commands": {"cli"},
}


def imports(source: str) -> set[str]:
    """Full names of everything that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def named_imports(source: str) -> set[str]:
    """Top names of what a file imports by ``importlib.import_module("...")``."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {
        str(call.args[0].value).split(".")[0]
        for call in calls
        if ast.unparse(call.func).endswith("import_module") and call.args and isinstance(call.args[0], ast.Constant)
    }


def rooms(names: set[str]) -> set[str]:
    return {parts[1] for name in names if (parts := name.split("."))[0] == "cactus_ray" and len(parts) > 1}


def files(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


def test_an_import_inside_a_function_is_seen() -> None:
    assert rooms(imports("def f():\n    from cactus_ray.report import page\n")) == {"report"}


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_imports_run_one_way(room: str) -> None:
    wrong = {
        f"{path.name}: {bad}" for path in files(room) for bad in rooms(imports(path.read_text())) & FORBIDDEN[room]
    }
    assert files(room), f"no such room: {room}"
    assert not wrong


def test_only_the_adapter_asks_for_an_optional_library() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        asked = named_imports(path.read_text()) | {name.split(".")[0] for name in imports(path.read_text())}
        everywhere = {"auto_LiRPA"} & asked
        assert everywhere <= OPTIONAL.get(place, set()), f"{place}: {sorted(everywhere)}"
        assert place not in OPTIONAL or everywhere == OPTIONAL[place]
        assert place not in OPTIONAL or not OPTIONAL[place] & {n.split(".")[0] for n in imports(path.read_text())}


@pytest.mark.parametrize("room", sorted(CORE))
def test_the_core_needs_only_torch_and_numpy(room: str) -> None:
    import sys

    for path in files(room):
        libraries = {name.split(".")[0] for name in imports(path.read_text())} - set(sys.stdlib_module_names)
        assert libraries <= CORE_LIBRARIES, f"{path}: {sorted(libraries - CORE_LIBRARIES)}"


def test_every_room_has_a_rule() -> None:
    present = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path.is_dir() and path.name[0] != "_")
    }
    assert present - {"__init__", "cli"} == set(FORBIDDEN)
