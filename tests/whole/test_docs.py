"""The documentation says what the code does."""

import importlib
import importlib.util
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from aftcli import METHODS, Search, explain, open_data_set, read_image
from aftcli.core.methods import CAMS
from tests.helpers.blocks import Reader, blocks, commands

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Whose blocks are run. Those of one row are run one after the other, in one folder.
CHAIN = (
    "docs/get-started/fine-tune.md",
    "docs/get-started/evaluate.md",
    "docs/guides/serving.md",
    "docs/guides/clusters.md",
)
GUIDES = [
    str(page.relative_to(ROOT))
    for folder in ("get-started", "guides")
    for page in sorted((ROOT / "docs" / folder).glob("*.md"))
]
READ = [("README.md",), CHAIN, *((page,) for page in GUIDES if page not in CHAIN)]


def test_command_line_reference_is_fresh():
    path = ROOT / "docs" / "make_cli_reference.py"
    spec = importlib.util.spec_from_file_location("make_cli_reference", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    stored = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    command = "python docs/make_cli_reference.py > docs/reference/cli.md"
    assert stored == script.reference(), f"run {command}"


def test_method_table_is_the_registry():
    page = (ROOT / "docs/get-started/explain.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w+]+)` \| (.+?) \| (.+?) \|$", page, re.M)
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


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Somebody in a clone of the repository, as far as the pages name its files."""
    for folder in ("images", "demo"):
        shutil.copytree(ROOT / "docs" / folder, tmp_path / "docs" / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    return Reader(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("pages", READ, ids=" ".join)
def test_blocks_do_what_pages_show(pages, reader):
    for page in pages:
        reader.read((ROOT / page).read_text("utf-8"))


@pytest.mark.parametrize("page", [page for pages in READ for page in pages])
def test_blocks_that_are_not_run_say_why(page):
    """And are listed: `pytest -rP` shows what this prints."""
    for block in blocks((ROOT / page).read_text("utf-8")):
        if block.reason is not None:
            print(f"{block.reason}: {block.lines[0]}")
            assert block.reason.startswith(("needs ", "takes ", "part of ")), block


def test_commands_named_in_tables_are_run():
    """A command of the README's tables is one that a page's block runs."""
    texts = [(ROOT / page).read_text("utf-8") for pages in READ for page in pages]
    found = [block for text in texts for block in blocks(text) if block.kind == "console"]
    run = {command.line for block in found if not block.reason for command in commands(block)}
    named = re.findall(r"^\|.*?`(aft [^`]+)`", README.read_text("utf-8"), re.M)
    assert len(named) >= 5 and not set(named) - run


@pytest.mark.parametrize("split, count", [("train", 6), ("val", 3)])
def test_demo_has_pictures_of_four_classes_of_imagenet(split, count, lite0):
    data = open_data_set(ROOT / "docs/demo", split, lite0.classes)
    names = [lite0.classes.name(sample.label) for sample in data.samples]
    assert Counter(names) == dict.fromkeys(("tiger cat", "missile", "tripod", "espresso"), count)
    pictures = [read_image(data.root / sample.name) for sample in data.samples]
    assert {picture.size for picture in pictures} == {(224, 224)}
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_demo_is_small():
    assert sum(f.stat().st_size for f in (ROOT / "docs/demo").rglob("*") if f.is_file()) < 4e5


PAGE = """
Text.

```console
$ aft explain docs/images/chelsea.jpg --save none
image        cam       class             prob.
chelsea.jpg  layercam  tiger cat (282)  0.3708
$ ls docs
...
images
```

<!-- not run: needs a network -->

```console
$ aft explain nothing
```

```python
x = 2
print("seven", x * 3.5)
```

```text
seven 7.0
```
"""


@pytest.mark.parametrize(
    "old, new",
    [
        ("0.3708", "0.3908"),
        ("0.3708", "0.3708  more"),
        ("(282)", "(283)"),
        ("layercam", "gradcam"),
        ("tiger cat", "tiger  cats"),
        ("image        cam", "an image        cam"),
        ("image        cam       class             prob.\n", ""),
        ("chelsea.jpg  layercam  tiger cat (282)  0.3708\n", ""),
        ("0.3708\n", "0.3708\nwrote cat.png\n"),
        ("images\n", "image\n"),
        ("...\n", ""),
        ("x * 3.5", "x * 3.6"),
        ("seven 7.0", "eight 7.0"),
        ("seven 7.0\n", ""),
        ("<!-- not run: needs a network -->\n", ""),
        ("--save none", "--save nothing"),
    ],
)
def test_a_changed_line_is_found(reader, old, new):
    assert PAGE.count(old) >= 1
    with pytest.raises(AssertionError):
        reader.read(PAGE.replace(old, new, 1))


def test_rounding_is_no_change(reader):
    reader.read(PAGE.replace("0.3708", "0.3711").replace("7.0", "7.1"))


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
    """Write headings as GitHub's anchors: small letters, no punctuation, hyphens for spaces."""
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
