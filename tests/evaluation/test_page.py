"""The page of an evaluation: classes, best and worst images, glossary, settings."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aftcli.data.sets import open_data_set
from aftcli.evaluation.run import Plan, evaluate_study
from aftcli.evaluation.study import Study, Variant
from aftcli.evaluation.tables import Sources, Tables, rows_of
from aftcli.measures.registry import MEASURES, VARIANTS, extras_of
from aftcli.measures.values import Unit
from aftcli.pages.evaluated import EXTREME, MEANINGS, Cut, extremes, write_page
from aftcli.pages.grids import Shown
from aftcli.settings import Search
from tests.helpers.browser import browse, chromium
from tests.helpers.stored import NAMES, make_images, small_float

CAMS = ("gradcam", "layercam")
T = (0.0, 0.2, 0.4, 0.7, 1.0)
METRICS = ("average_increase", "average_drop", "area")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    make_images(folder / "images", each=8)
    (folder / "images/pear/7.png").rename(folder / 'images/pear/<7> & "x".png')
    f = small_float()
    data = open_data_set(folder / "images", None, f.classes)
    own = [Variant(name, f"{name}", CAMS, lambda: f) for name in ("original", "aft")]
    study = Study(f, data, CAMS, tuple(own), Search(T), None)
    plan = Plan(("binary", "soft"), extras_of(METRICS, False), workers=0)
    *_, found = evaluate_study(study, folder / "run", plan)
    return found


SETTINGS = {
    "command": "aft evaluate",
    "studies": [{"model": "small", "dataset": "images", "thresholds": list(T), "fill": "<mean>"}],
    "maskings": ["binary", "soft"],
    "versions": {"torch": "1"},
}


@pytest.fixture(scope="module")
def text(measured, tmp_path_factory):
    sources = Sources(Path("run"), [measured.study], [measured], METRICS, list(VARIANTS))
    tables = Tables(rows_of(["3", "4"], sources), SETTINGS, {}, [measured])
    path = tmp_path_factory.mktemp("written") / "report.html"
    return write_page(path, tables, Shown(ci=True), []).read_text(encoding="utf-8")


class Tables_(HTMLParser):
    """The tables of a page by their titles: rows of cells as text; addresses of pictures."""

    def __init__(self, text):
        super().__init__()
        self.title, self.tables, self.within, self.pictures = "", {}, "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.within = tag
        if tag == "h2":
            self.title = ""
        if tag == "tr":
            self.tables.setdefault(self.title, []).append([])
        if tag in ("td", "th"):
            self.tables[self.title][-1].append("")
        if tag == "img":
            self.pictures.append((self.title, dict(attributes)["src"]))
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag):
        self.within = ""

    def handle_data(self, data):
        if self.within == "h2":
            self.title += data
        if self.within in ("td", "th", "b"):
            self.tables[self.title][-1][-1] += data


@pytest.fixture(scope="module")
def page(text):
    return Tables_(text)


def one_by_one(measured, cam, masking):
    """The numbers of each image, from the columns of the results."""
    columns = measured.results["original", Unit(cam, masking)].columns
    study = measured.study
    for i in range(len(columns["index"])):
        y, curve = float(columns["probability"][i]), columns["curve"][i].tolist()
        y_hat = float(columns["tft/y_hat"][i])
        yield {
            "name": study.data_set.samples[int(columns["index"][i])].name,
            "label": NAMES[int(columns["label"][i])],
            "right": float(columns["label"][i] == columns["class_index"][i]),
            "y": y,
            "masked": y_hat,
            "change": (y_hat - y) / y,
            "rpi": max(max(v - y, 0) / y for v in curve),
            "tau": float(columns["tau"][i]),
            "kept": float(columns["tft/area"][i]),
        }


@pytest.mark.parametrize("masking", ["binary", "soft"])
def test_classes_have_the_means_of_their_images(page, measured, masking):
    [title] = [t for t in page.tables if t.startswith("Classes") and masking in t]
    header, *rows = page.tables[title]
    titles = ["Grad-CAM", "Layer-CAM"]
    own = [f"{t} {n}" for t in titles for n in ("AFT accuracy", "RPI", "tau*", "kept")]
    assert header == ["class", "images", "accuracy", "probability", *own]
    assert [row[0] for row in rows] == list(NAMES) and {row[1] for row in rows} == {"8"}
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        for cam, word in zip(CAMS, titles, strict=True):
            images = [i for i in one_by_one(measured, cam, masking) if i["label"] == row[0]]
            for name, column, digits, scale in (
                ("right", "accuracy", 3, 1),
                ("y", "probability", 3, 1),
                ("right", f"{word} AFT accuracy", 3, 1),  # the same network
                ("rpi", f"{word} RPI", 3, 1),
                ("tau", f"{word} tau*", 2, 1),
                ("kept", f"{word} kept", 1, 100),
            ):
                mean = scale * sum(image[name] for image in images) / 8
                shown = float(cells[column].rstrip("%"))
                assert shown == pytest.approx(mean, abs=0.51 * 10**-digits), column


@pytest.mark.parametrize("masking", ["binary", "soft"])
@pytest.mark.parametrize(("cam", "word"), zip(CAMS, ["Grad-CAM", "Layer-CAM"], strict=True))
def test_the_best_and_worst_images_are_those_of_the_largest_and_least_change(
    page, measured, masking, cam, word
):
    images = sorted(one_by_one(measured, cam, masking), key=lambda image: -image["change"])
    for kind, wanted in (("Best", images[:EXTREME]), ("Worst", images[::-1][:EXTREME])):
        [title] = [t for t in page.tables if t.startswith(f"{kind} images, {word}, {masking}")]
        header, *rows = page.tables[title]
        cells = [dict(zip(header, row, strict=True)) for row in rows]
        assert len(cells) == EXTREME
        found = [float(cell["change"]) for cell in cells]
        assert found == pytest.approx([i["change"] for i in wanted], abs=0.00051)
        by_name = {image["name"]: image for image in images}
        for cell in cells:
            image = by_name[cell["image"]]
            for column, name in (("probability", "y"), ("masked", "masked"), ("tau*", "tau")):
                assert float(cell[column]) == pytest.approx(image[name], abs=0.000051)
            assert float(cell["kept"].rstrip("%")) == pytest.approx(100 * image["kept"], abs=0.051)
            assert (cell["label"] == cell["predicted"]) == bool(image["right"])
        pictures = [source for where, source in page.pictures if where == title]
        assert len(pictures) == EXTREME
        for source in pictures:
            data = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))
            assert Image.open(io.BytesIO(data)).size == (52, 40)


def cut(*changes):
    values = torch.tensor(changes, dtype=torch.double)
    return Cut(*([torch.arange(len(changes))] * 5), values, values, values)


def test_few_images_stand_in_one_list_only():
    best, worst = extremes(cut(0.5, -0.1, 0.5, float("inf"), 0.2))
    assert (best.tolist(), worst.tolist()) == ([0, 2], [1, 4])
    best, worst = extremes(cut(0.5))
    assert (best.tolist(), worst.tolist()) == ([0], [])
    best, worst = extremes(cut(*range(50)))
    assert (best.tolist(), worst.tolist()) == (list(range(49, 39, -1)), list(range(10)))


def test_an_image_that_is_gone_has_no_picture(measured, text, tmp_path):
    study = measured.study
    lost = [study.data_set.picture(i).path for i in range(len(study.data_set.samples))]
    moved = [path.rename(f"{path}.moved") for path in lost]
    try:
        tables = Tables({}, {"maskings": ["binary"]}, {}, [measured])
        again = write_page(tmp_path / "report.html", tables, Shown(), []).read_text("utf-8")
    finally:
        for path, old in zip(moved, lost, strict=True):
            path.rename(old)
    assert "<img" not in again and "<img" in text
    without = [rows for title, rows in Tables_(again).tables.items() if "Best" in title]
    assert [len(rows) for rows in without] == [EXTREME + 1] * len(CAMS)


def test_the_glossary_says_what_each_measure_is(page):
    assert set(MEANINGS) == set(MEASURES)
    _, *rows = page.tables["Measures"]
    assert sorted(row[0] for row in rows) == sorted(MEASURES[name].title for name in METRICS)
    directions = {row[0]: row[2] for row in rows}
    assert directions == {
        "Average Increase": "higher",
        "Average Drop": "lower",
        "Kept area": "neither",
    }


def test_settings_are_a_table(page, text):
    rows = dict(page.tables["Settings"])
    assert rows == {
        "command": "aft evaluate",
        "studies 1: model": "small",
        "studies 1: dataset": "images",
        "studies 1: thresholds": "0, 0.2, 0.4, 0.7, 1",
        "studies 1: fill": "<mean>",
        "maskings": "binary, soft",
        "versions: torch": "1",
    }
    assert "<pre>" not in text and json.dumps("small") not in text
    assert "<7>" not in text and "pear/&lt;7&gt; &amp; &quot;x&quot;.png" in text


@pytest.mark.slow
def test_no_column_is_cut_in_a_browser(text, tmp_path):
    """Each table is as wide as the page at the most, or scrolls inside itself."""
    chromium()
    script = """<script>
    const wide = [...document.querySelectorAll("body *")].filter(each =>
      !each.closest(".wide *") && each.getBoundingClientRect().right > innerWidth);
    document.title = `cut: ${wide.length}, ${document.documentElement.scrollWidth}`;
    </script></body>"""
    assert "</body>" in text
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", script), encoding="utf-8")
    for window in (1200, 600):
        shown = browse(path.as_uri(), tmp_path, f"--window-size={window},900", "--dump-dom")
        [(cut, width)] = re.findall(r"<title>cut: (\d+), (\d+)</title>", shown)
        assert cut == "0" and int(width) <= window
    browse(path.as_uri(), tmp_path, "--window-size=1200,900", f"--screenshot={tmp_path}/a.png")
    with Image.open(tmp_path / "a.png") as shot:
        assert shot.size == (1200, 900) and np.asarray(shot.convert("L")).std() > 10
