"""The documentation says what the code does."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from aftcli import METHODS, Search, explain
from aftcli.core.methods import CAMS

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def test_command_line_reference_is_fresh():
    path = ROOT / "docs" / "make_cli_reference.py"
    spec = importlib.util.spec_from_file_location("make_cli_reference", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    stored = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    command = "python docs/make_cli_reference.py > docs/reference/cli.md"
    assert stored == script.reference(), f"run {command}"


def test_method_table_is_the_registry():
    rows = re.findall(r"^\| `([\w+]+)` \| (.+?) \| (.+?) \|$", README.read_text("utf-8"), re.M)
    assert rows == [(name, entry.title, entry.source) for name, entry in CAMS.items()]


def test_table_of_further_methods_is_the_registry():
    page = (ROOT / "docs/guides/choose-a-method.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z][\w-]+)` \| (.+?) \| (.+?) \|", page, re.M)
    assert rows == [
        (name, entry.title, entry.source) for name, entry in METHODS.items() if name not in CAMS
    ]


def test_set_up_commands_are_as_agreed():
    commands = re.findall(r"^\$ (python3 -m venv.*)$", README.read_text("utf-8"), re.M)
    assert [command.rpartition("&& ")[2] for command in commands] == [
        ".venv/bin/aft explain docs/images/chelsea.jpg --cam layercam --tft",
        ".venv/bin/pytest",
    ]


@pytest.mark.slow
def test_python_example_runs(monkeypatch, capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.M | re.S)
    monkeypatch.chdir(ROOT)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("tiger cat 0.5 0.203")


def test_first_output_is_what_is_computed(lite0, chelsea):
    """The README's table: chelsea.jpg layercam tiger cat (282) 0.3708 0.5 0.204 0.4463 28.8%."""
    row = re.search(
        r"^chelsea\.jpg +layercam +(?P<name>.+?) \((?P<index>\d+)\) +(?P<y>\S+) +(?P<tau>\S+)"
        r" +(?P<rpi>\S+) +(?P<y_hat>\S+) +(?P<kept>\S+)%$",
        README.read_text("utf-8"),
        re.M,
    )
    (found,) = explain(lite0, chelsea, ["layercam"], settings=Search())
    best = int(found.tft.best)
    assert (row["name"], int(row["index"])) == (lite0.classes.name(282), found.class_index)
    assert float(row["tau"]) == pytest.approx(float(found.tft.tau))
    assert float(row["y"]) == pytest.approx(found.probability, abs=1e-3)
    assert float(row["rpi"]) == pytest.approx(float(found.tft.rpi.max()), abs=1e-3)
    assert float(row["y_hat"]) == pytest.approx(float(found.tft.probabilities[0, best]), abs=1e-3)
    assert float(row["kept"]) == pytest.approx(100 * float(found.tft.mask.float().mean()), abs=0.1)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path) if path else page
            assert linked.is_relative_to(ROOT) and linked.exists(), target
            assert not anchor or anchor in anchors(linked.read_text("utf-8")), target


def anchors(text):
    """What GitHub makes of headings: small letters, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_code_that_is_named_exists(page):
    for path, name in re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", page.read_text("utf-8")):
        assert (ROOT / path).is_file(), path
        if name:
            found = importlib.import_module(path.removesuffix(".py").replace("/", "."))
            for part in name.split("."):
                found = getattr(found, part)
