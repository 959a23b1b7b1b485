"""Imports that are allowed; no hooks; a command line that starts without torch."""

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import aftcli

PACKAGE = Path(aftcli.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Downwards: each imports only what stands below, and of its own package. What stands on one line
# does not import each other.
ORDER = [
    {"__main__"},
    {"cli"},
    {"options"},
    {"pages"},
    {"report"},
    {"pictures"},
    {"aft", "evaluation"},
    {"masks", "measures"},
    {"tft"},
    {"formats"},
    {"attributions", "engine", "data"},
    {"models"},
    {"networks"},
    {"core"},
    {"cutting"},
    {"settings"},
    {"files", "locks"},
    {"errors"},
    {"version"},
]
PLACES = set().union(*ORDER)
# What stays at the edge.
EDGE = {"typer", "rich", "h5py", "matplotlib", "PIL"}
ENGINE = ("cutting", "core", "attributions", "engine")


def place_of(path):
    """A file's place in ORDER."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    """Every module that a file imports, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "import_module"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found


def own_imports(path):
    """The places in ORDER of what a file imports of aftcli."""
    places = set()
    for name in imports_of(path):
        first, *rest = name.split(".")
        if first == "aftcli" and rest and rest[0] in PLACES:
            places.add(rest[0])
    return places


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda p: str(p.relative_to(PACKAGE)))


def test_the_parser_sees_imports_wherever_they_are(tmp_path):
    source = tmp_path / "source.py"
    source.write_text(
        "import a.b\nfrom c import d\ndef f():\n    import e\n    import_module('g')\n"
    )
    assert imports_of(source) == {"a.b", "c.d", "e", "g"}


@named([path for path in FILES if place_of(path) in ENGINE])
def test_the_engine_imports_nothing_of_the_edge(path):
    packages = {name.split(".")[0] for name in imports_of(path)}
    assert not packages & EDGE


@named([path for path in FILES if path.name != "__init__.py"])
def test_imports_run_downwards_only(path):
    place = place_of(path)
    assert place in PLACES, f"give {place} its place in ORDER"
    (floor,) = (i for i, places in enumerate(ORDER) if place in places)
    assert own_imports(path) <= {place}.union(*ORDER[floor + 1 :])


def test_a_folder_has_three_to_eight_files_of_at_most_400_lines():
    counts = Counter(path.parent for path in FILES if not path.name.startswith("__"))
    assert len(counts) == 19  # eighteen packages and the ground
    assert {folder.name: n for folder, n in counts.items() if not 3 <= n <= 8} == {}
    lines = {str(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_no_module_imports_itself_through_others():
    modules = {".".join(["aftcli", *p.relative_to(PACKAGE).parts])[:-3]: p for p in FILES}
    # A module, or a name of one.
    imported = {m: imports_of(path) for m, path in modules.items()}
    below = {
        module: {n for name in names for n in (name, name.rpartition(".")[0]) if n in modules}
        for module, names in imported.items()
    }
    assert "aftcli.cutting.cut" in below["aftcli.core.classifier"]  # the graph has edges
    while below:
        leaves = {module for module, others in below.items() if not others & set(below)}
        assert leaves, f"a circle among {sorted(below)}"
        below = {module: others for module, others in below.items() if module not in leaves}


@named(FILES)
def test_private_names_stay_in_their_package(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aftcli."):
            if node.module.split(".")[1] != place_of(path):
                assert not [a.name for a in node.names if re.match("_[^_]", a.name)]


def test_the_order_is_that_of_the_files():
    assert {place_of(path) for path in FILES} == {*PLACES, "__init__"}
    # The tests above compare something: the command line does import the engine.
    assert {"report", "tft", "core", "errors"} <= own_imports(PACKAGE / "cli" / "explain.py")
    assert own_imports(PACKAGE / "tft" / "threshold.py") == set()
    assert own_imports(PACKAGE / "tft" / "masking.py") == {"tft", "core"}
    assert own_imports(PACKAGE / "tft" / "search.py") == {
        "tft",
        "core",
        "cutting",
        "settings",
        "errors",
    }


# What torch.fx can't follow is watched in one place, which takes its hooks off again.
@named([path for path in FILES if path.name != "watched.py"])
def test_nothing_hooks_into_networks(path):
    assert "_hook(" not in path.read_text()


@pytest.mark.parametrize(
    "path", sorted((PACKAGE.parent / "benchmarks").rglob("*.py")), ids=lambda path: path.name
)
def test_what_benchmarks_import_is_there(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "aftcli":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("module", ["aftcli", "aftcli.cli.app", "aftcli.core.methods"])
def test_importing_the_command_line_does_not_import_torch(module):
    heavy = ("torch", "torchvision", "timm", "matplotlib", "h5py")
    run = python(f"import {module}, sys; print([m for m in {heavy} if m in sys.modules])")
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr


@pytest.mark.parametrize("command", [[], ["tft"], ["gen-masks"], ["finetune"], ["evaluate"]])
def test_help_works_where_torch_cannot_be_imported(command):
    argv = ["aft", *command, "--help"]
    run = python(
        "import sys; sys.modules.update(torch=None, torchvision=None, timm=None); "
        f"sys.argv = {argv}; from aftcli.cli.app import main; main()"
    )
    assert run.returncode == 0, run.stderr
    assert "Usage: aft" in run.stdout


def test_public_names_exist():
    assert set(aftcli.__all__) == set(aftcli._HOMES)
    for name in aftcli.__all__:
        assert getattr(aftcli, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        aftcli.nothing  # noqa: B018
