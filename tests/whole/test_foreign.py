"""Names of strangers, through every command and format: none is obeyed, all can be read."""

import ast
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import aftcli
from aftcli.core.classes import Classes, Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.evaluation.tables import Table3Row, Table4Row
from aftcli.models.checkpoint import read_card, restore
from aftcli.pages import printed as tables
from aftcli.pages.grids import Shown, Tables
from aftcli.report import terminal as foreign
from tests.helpers.command import aft, usage_error
from tests.whole.test_trust import sealed_again

# What a name holds: the name, and what of it must not be printed as it is.
ODD = {
    "clear the screen": "\x1b[2J",
    "window title": "\x1b]0;mine\x07",
    "forged line": "fine\nforged: all is well",
    "carriage return": "fine\rover",
    "bidi override": "\u202egnp.exe",
    "opening markup": "[bold red]a",
    "closing markup": "[/]",
    "formula": "=HYPERLINK(1)",
    "table": "a|b`c`",
    "script": "<script>x</script>",
    "TeX": r"&%_#\input{x}$~^",
    "an emoji's name": ":smile:",
}
# As a part of a file's name, which has no slash.
NAMES = tuple(name.replace("/", "!") for name in ODD.values())
# Never printed: they have no meaning but to a terminal.
OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]|^forged", re.M)
FRUIT = "".join(NAMES)


def odd_classifier():
    """A small network of the odd classes, oddly named."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 5, stride=4, padding=2), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2)]
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, len(NAMES))]
    preprocessing = Preprocessing(size=(32, 32), resize=36)
    classes = Classes(NAMES)
    model = nn.Sequential(*layers, *head)
    return cut_classifier(
        model, "2+3", name=FRUIT[:40], preprocessing=preprocessing, classes=classes
    )


def load(name=None, checkpoint=None, *_, **__):
    f = odd_classifier()
    if checkpoint:
        restore(f, Path(checkpoint), read_card(Path(checkpoint)))
    return f


def give_odd(patch):
    """Give every command the odd network."""
    for module in ("models.load", "models.source", "evaluation.study"):
        patch.setattr(f"aftcli.{module}.load_classifier", load)


@pytest.fixture(autouse=True)
def odd(monkeypatch):
    give_odd(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set whose folders and files are named oddly, one of the files no picture."""
    folder = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in NAMES:
            (folder / FRUIT / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 255, (40, 52, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / FRUIT / split / name / f"{i}{name}.png")
        (folder / FRUIT / split / NAMES[0] / f"{FRUIT}.png").touch()
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """Masks and tuned networks of the odd data set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        give_odd(patch)
        made = aft("gen-masks", FRUIT, "--run", "run", "--workers", "0")
        assert made.code in (0, None), made.err
        tune = ("finetune", "--run", "run", "--epochs", "1", "--workers", "0", "--lam", "0.1")
        tuned = aft(*tune)
        assert tuned.code in (0, None), tuned.err
    return made, tuned


def checked(result, code=0):
    """The output of a command, in which nothing is left that a terminal obeys."""
    assert (result.code or 0) == code, result
    assert "fault of aft" not in result.err
    for text in (result.out, result.err):
        assert not OBEYED.search(text), OBEYED.search(text)
    return result


def said(text, names=NAMES):
    """Check that the names are there, to be read."""
    flat = text.replace("\n", "")
    for name in names:
        assert foreign.plain(name) in flat, name


def test_what_makes_masks_prints_no_name_raw(run, folder):
    made, _ = run
    checked(made)
    said(made.out)
    said(made.err)
    assert made.err.startswith("aft: left out ") and made.err.count("\n") == 1


@pytest.mark.parametrize("json_", [False, True])
def test_a_store_of_strangers_is_shown(run, folder, tmp_path, json_):
    (made,) = (folder / "run/masks").glob("*.h5")
    store = tmp_path / f"{FRUIT}.h5"
    store.write_bytes(made.read_bytes())
    with h5py.File(store, "r+") as file:
        file.attrs["cam"] = "a[/]\x1b[2J"
        for i, odd_text in enumerate(ODD.values()):
            file.attrs[f"a{odd_text}"] = f"{i} {odd_text}"
            file.attrs[f"{i}{odd_text}"] = f"{i} {odd_text}"
    sealed_again(store)
    shown = checked(aft("gen-masks", "--show", store, *["--json"] * json_))
    if json_:
        assert json.loads(shown.out)["settings"]["cam"] == "a[/]\x1b[2J"
    else:
        said(shown.out, (*ODD.values(), *NAMES))
    checked(aft("gen-masks", "--show", f"{store}x"), 1)
    (tmp_path / "run/masks").mkdir(parents=True)
    store.rename(tmp_path / "run/masks/strange.h5")
    for command in ("finetune", "evaluate"):
        refused = checked(aft(command, "--run", tmp_path / "run"), 1)
        assert "a method that this aft does not know (a[/]\\x1b[2J)" in refused.err


def test_what_tunes_prints_no_name_raw(run, folder, monkeypatch):
    monkeypatch.chdir(folder)
    _, tuned = run
    checked(tuned)
    said(tuned.err, NAMES[:2])
    again = ("finetune", "--run", "run", "--epochs", "1", "--workers", "0", "--lam", "0.1")
    (card,) = json.loads(checked(aft(*again, "--json")).out)
    assert card["model"] == FRUIT[:40]
    missing = checked(aft("finetune", FRUIT + "x", "--no-masks"), 1)
    assert missing.err.startswith("aft: ")


@pytest.mark.slow
def test_explanations_print_no_name_raw(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    images = folder / FRUIT / "val"
    # A table of some, and of all, which are more than twenty, a summary, a file and a page.
    half = len(NAMES) // 2
    some = checked(aft("explain", *(images / n for n in NAMES[:half]), "--save", "mask"), 1)
    others = checked(aft("explain", *(images / n for n in NAMES[half:]), "--save", "mask"))
    said(some.out + others.out)
    said(some.err)
    explained = checked(aft("explain", images, "--save", "mask", "--html"), 1)
    said(explained.err)
    with Path("aft-out/results.csv").open(encoding="utf-8", newline="") as file:
        lines = [line["image"] for line in csv.DictReader(file)]
    said("".join(lines))
    assert len(lines) == 2 * len(NAMES) and not OBEYED.search("".join(lines))
    text = Path("aft-out/index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert text.count("<script>") == 1 and not OBEYED.search(text)
    said(page.words.replace("\n", ""))
    found = json.loads(
        checked(aft("explain", images, "--save", "mask", "--json", "--debug"), 1).out
    )
    assert len(found) == 2 * len(NAMES)
    image = images / NAMES[2] / f"0{NAMES[2]}.png"
    said(checked(aft("explain", image, "--save", "map", "--top-k", len(NAMES))).out)
    said(checked(aft("tft", image)).out, [NAMES[2]])
    Path(f"{FRUIT}.npy").write_bytes(b"no map")
    assert "can't be read as a map" in checked(aft("tft", image, "--map", f"{FRUIT}.npy"), 1).err
    for wrong in ODD.values():
        unknown = checked(aft("explain", image, "--target", wrong + "x"), 1)
        assert unknown.err.startswith("aft: ")
        for option in ("--cam", "--save"):
            assert "unknown" in usage_error(checked(aft("explain", image, option, wrong), 2))


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)

    def handle_data(self, data):
        self.words += data


@pytest.fixture
def printed(run, folder, monkeypatch):
    monkeypatch.chdir(folder)

    def evaluate(*options):
        common = ("evaluate", "--run", "run", "--workers", "0", "--masking", "binary")
        return checked(aft(*common, "--ci", "--table", "2,3,4", *options)).out

    return evaluate


def test_tables_for_the_terminal_print_no_name_raw(printed):
    said(printed(), [FRUIT, FRUIT[:40]])


def test_json_keeps_the_names(printed):
    assert json.loads(printed("--json"))["table2"][0]["dataset"] == FRUIT


def test_the_page_runs_no_name(printed, folder):
    printed("--figures", "--image", f"0{NAMES[2]}")
    text = (folder / "run/results/report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and not OBEYED.search(text)
    assert foreign.plain(FRUIT) in page.words


def rows_of(dataset):
    """Tables of a data set and a network of that name, with numbers below zero."""
    where = (dataset, dataset, "gradcam", "binary", "original")
    table3 = Table3Row(*where, "adcc", -0.25, (-0.5, 0.5), 12)
    table4 = Table4Row(dataset, dataset, None, "original", 1, None, 9)
    return Tables({"table3": [table3], "table4": [table4]})


def formatted(name, dataset, capsys):
    tables.FORMATS[name](rows_of(dataset), Shown(ci=True))
    text = capsys.readouterr().out
    assert not OBEYED.search(text.replace("\r\n", "\n"))
    return text


@pytest.mark.parametrize("kind", ODD)
def test_each_name_in_each_format(kind, capsys):
    dataset = ODD[kind]
    assert foreign.plain(dataset) in formatted("table", dataset, capsys)
    for line in csv.DictReader(io.StringIO(formatted("csv", dataset, capsys))):
        assert line["dataset"] == foreign.csv_cell(dataset)
        assert line["dataset"].lstrip("'") == foreign.plain(dataset)
        assert not line["dataset"].startswith(("=", "+", "-", "@", "\t", "\r"))
        assert float(line["value"]) in (-0.25, 1)
    for row in rows_of_text(formatted("markdown", dataset, capsys)):
        first = re.split(r"(?<!\\)\|", row.strip("|"))[0].strip()
        assert not re.search(r"[|`*_<]|\]\(", re.sub(r"\\[^a-z0-9\s]", "", first))
        assert re.sub(r"\\([^a-z0-9\s])", r"\1", first) == foreign.plain(dataset)
    for row in rows_of_text(formatted("latex", dataset, capsys)):
        first = re.split(r"(?<!\\) & ", row)[0]
        assert not re.search(r"^[\[*]|[\\&%$#_{}~^<>|]", TEX.sub("", first))
        assert TEX.sub(lambda found: UNTEX.get(found[0], found[0][1:2]), first) == (
            foreign.plain(dataset)
        )


TEX = re.compile(r"\\text[a-z]+\{\}|\\[&%$#_{}]|\{[\[*]\}")
UNTEX = {
    r"\textbackslash{}": "\\",
    r"\textasciitilde{}": "~",
    r"\textasciicircum{}": "^",
    r"\textless{}": "<",
    r"\textgreater{}": ">",
    r"\textbar{}": "|",
}


def rows_of_text(text):
    """The rows of two tables."""
    rows = [line for line in text.split("\n") if "1.000" in line or "-0.250" in line]
    assert len(rows) == 2
    return rows


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", " =", "\uff1d"])
def test_spreadsheets_get_text_not_formulas(start):
    assert foreign.csv_cell(f"{start}1+1") == f"'{foreign.plain(start)}1+1"
    for number in (-1, -0.5, 3):
        assert foreign.csv_cell(number) is number
    assert foreign.csv_cell("fruit=1") == "fruit=1"


@pytest.mark.slow
def test_a_terminal_of_its_own_gets_no_name_raw(run, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORCE_COLOR", "1")
    data = folder / FRUIT
    for command in (
        ("gen-masks", data, "--workers", "0"),
        ("finetune", "--epochs", "1", "--workers", "0", "--lam", "0.1"),
        ("evaluate", "--masking", "binary", "--workers", "0"),
        ("explain", data / "val" / NAMES[2]),
    ):
        result = aft(*command)
        assert (result.code or 0) == 0, result
        for text in (result.out, result.err):
            raw = re.search("\x1b\\[2J|\x1b\\]|\x07|\u202e|\\rover|^forged", text, re.M)
            assert not raw, raw


def test_all_that_is_printed_is_escaped_or_our_own():
    safe = ("json.dumps(", "markdown_lines(", "latex_lines(", "__version__")
    for path in Path(aftcli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "print"):
                continue
            for argument in node.args:
                own = (
                    isinstance(argument, ast.Constant)
                    or path.name == "terminal.py"
                    or any(word in ast.unparse(argument) for word in safe)
                )
                assert own, f"{path.name}: {ast.unparse(node)}; use terminal.say"
