"""The page of `aft explain --html`: rows, links, pictures, order and filters."""

import base64
import io
import json
import os
import re
import resource
import shutil
import tempfile
import tracemalloc
from collections import Counter
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import torch
from PIL import Image

from aftcli.core.methods import CAMS
from aftcli.data.images import view_of
from aftcli.pages.explained import Page
from aftcli.pages.html import flat, histogram, jpeg, of_values, thumb, thumb_size
from aftcli.pictures.colours import LOOK
from aftcli.pictures.overlay import Subject
from aftcli.report.explain import Report
from aftcli.tft.explain import Explanation
from tests.helpers.browser import browse, chromium
from tests.helpers.command import aft, leftovers
from tests.helpers.stored import small_float

pytestmark = pytest.mark.usefixtures("folder", "f")


def draw(name, seed=0, size=(60, 44)):
    path = Path(os.fsdecode(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 200, (*size[::-1], 3), dtype=np.uint8)
    pixels[8:28, seed % 30 : seed % 30 + 20] = (seed * 37 % 256, 250, 255 - seed * 11 % 256)
    Image.fromarray(pixels).save(path, format="PNG")


def page_and_results(*options, out="aft-out"):
    """Run `aft explain --html`; its page and the same results as JSON."""
    result = aft("explain", *options, "--html", "--json", "--out", out)
    assert (result.code, result.err) == (0, f"wrote {out}/index.html\n")
    text = Path(out, "index.html").read_text(encoding="utf-8")
    return Read(text), json.loads(result.out)


VOID = ("meta", "img", "br", "wbr", "input")


class Read(HTMLParser):
    """A page as rows of cells: what each holds in data-value, its text and its links."""

    def __init__(self, text):
        super().__init__()
        self.text, self.open, self.addresses, self.rows = text, [], [], []
        self.heads, self.scripts, self.policy, self.hidden = [], [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "srcset", "action")]
        if tag == "tr" and "tbody" in self.open and "results" in self.open:
            self.rows.append([])
            self.hidden.append("hidden" in given)
        if tag == "td" and "results" in self.open:
            self.rows[-1].append({"value": given.get("data-value"), "text": "", "links": []})
        if tag in ("a", "img") and "results" in self.open:
            self.rows[-1][-1]["links"].append(given.get("href") or given.get("src"))
        if tag == "th" and "data-name" in given:
            self.heads.append(given["data-name"])
        if "http-equiv" in given:
            self.policy = given["content"]
        if tag not in VOID:
            self.open.append("results" if given.get("class") == "results" else tag)

    def handle_endtag(self, tag):
        opened = self.open.pop()
        assert opened == ("results" if opened == "results" and tag == "table" else tag)

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        if self.rows and self.rows[-1] and "td" in self.open and "results" in self.open:
            self.rows[-1][-1]["text"] += data

    def column(self, name):
        at = self.heads.index(name) + 1  # after the picture
        return [row[at]["value"] for row in self.rows]

    def shown(self, name):
        """The column of the rows that are not hidden, in their order."""
        pairs = zip(self.column(name), self.hidden, strict=True)
        return [value for value, hidden in pairs if not hidden]


def expected(result):
    tft, cut = result.get("tft"), result.get("tft") or result.get("fixed") or {}
    return {
        "image": result["image"],
        "class": f"{result['class_name']} ({result['class_index']})",
        "method": result["cam"],
        "probability": result["probability"],
        "tau": cut.get("tau", cut.get("threshold")),
        "rpi": max(tft["rpi"]) if tft else None,
        "masked": cut.get("probability"),
        "kept": cut.get("area"),
    }


PLAIN = ["image", "class", "method", "probability"]


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        (("--save", "none", "--top-k", "2"), PLAIN),
        (("--tft", "--cam", "gradcam", "--cam", "cam"), [*PLAIN, "tau", "rpi", "masked", "kept"]),
        (("--mute", "30", "--save", "map"), [*PLAIN, "tau", "masked", "kept"]),
    ],
    ids=["plain", "tft", "mute"],
)
def test_rows_are_the_results_of_json(options, heads):
    for seed in range(3):
        draw(f"in/{seed}.png", seed)
    page, results = page_and_results("in", *options)
    assert page.heads == heads and len(page.rows) == len(results)
    for name in heads:
        wanted = [expected(result)[name] for result in results]
        found = page.column(name)
        assert (found if name in PLAIN[:3] else [float(each) for each in found]) == wanted
    for row, result in zip(page.rows, results, strict=True):
        picture = row[0]["links"][-1]
        opened = result["outputs"].get("figure") or result["outputs"].get("overlay")
        assert row[0]["links"][:-1] == ([os.path.basename(opened)] if opened else [])
        outputs = {k: os.path.basename(path) for k, path in result["outputs"].items()}
        overview = outputs.pop("overview", None)
        assert row[1]["links"] == list(outputs.values())
        assert (f'<a href="{overview}">All images' in page.text) == (overview is not None)
        data = base64.b64decode(picture.removeprefix("data:image/jpeg;base64,"))
        assert Image.open(io.BytesIO(data)).size == (60, 44)


def test_the_page_loads_nothing_and_runs_one_script():
    draw("a.png")
    page, _ = page_and_results("a.png", "--tft")
    for address in page.addresses:
        assert address.startswith("data:image/jpeg;base64,") or Path("aft-out", address).is_file()
    written = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.text)
    assert not re.search(r"https?:|url\(|//|@import|<link|<iframe", written)
    [script] = page.scripts
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy
    assert "default-src 'none'" in page.policy and "unsafe" not in page.policy


NAMES = [
    *(b"a#b?c.png", b"100% & <b>x</b>.png", b"\"quoted\" 'too'.png", b"line\nbreak.png"),
    *(b"javascript:alert(1).png", b"bad\xff.png", "猫.png".encode(), b"&amp;.png", b"x+y z.png"),
]


@pytest.mark.parametrize("name", NAMES)
def test_files_of_any_name_are_found_from_a_page_that_was_moved(name, folder):
    draw(b"in/" + name)
    page, [result] = page_and_results("in", "--save", "overlay,map")
    shutil.copytree("aft-out", "else where")
    shutil.rmtree("aft-out")
    overlay, map_ = page.rows[0][1]["links"]
    for link, kind in ((overlay, "overlay"), (map_, "map")):
        assert re.fullmatch(r"[A-Za-z0-9_.~%/-]+", link)
        path = Path("else where", os.fsdecode(unquote_to_bytes(link)))
        assert path.is_file() and path.name == os.path.basename(result["outputs"][kind])
    assert "<b>x" not in page.text and "\nbreak" not in page.text


def test_class_names_are_text(f):
    odd = ("</script><script>alert(1)</script>", '" onload="x', "a & b\u202e")
    object.__setattr__(f.classes, "names", odd)
    draw("a.png")
    page, results = page_and_results("a.png", "--top-k", "3", "--save", "none")
    found = {name.rpartition(" ")[0] for name in page.column("class")}
    assert found == {*odd[:2], "a & b\\u202e"} and len(page.scripts) == 1
    assert {row[2]["text"] for row in page.rows} == set(page.column("class"))


def test_what_could_not_be_explained_is_said_and_without_results_there_is_no_page(folder):
    draw("in/a.png")
    Path("in/<i>.png").touch()
    result = aft("explain", "in", "--html", "--save", "none")
    assert result.code == 1 and result.out.endswith("wrote aft-out/index.html\n")
    text = Path("aft-out/index.html").read_text(encoding="utf-8")
    assert "1 not explained" in text and "in/&lt;i&gt;.png: the file is empty" in text
    Path("aft-out/index.html").unlink()
    assert aft("explain", "in/<i>.png", "--html").code == 1
    assert leftovers(folder / "aft-out") == []


def test_an_interrupted_page_leaves_no_file(folder, monkeypatch):
    draw("a.png")
    draw("b.png", 1)
    from aftcli.data.images import read_image

    def read(path):
        if path.name == "b.png":
            raise KeyboardInterrupt
        return read_image(path)

    monkeypatch.setattr("aftcli.data.images.read_image", read)
    assert aft("explain", "a.png", "b.png", "--html", "--save", "none").code == 130
    assert leftovers(folder / "aft-out") == []


def test_the_means_and_histograms_are_those_of_the_results():
    for seed in range(12):
        draw(f"in/{seed}.png", seed)
    page, results = page_and_results("in", "--tft", "--save", "none")
    taus = Counter(result["tft"]["tau"] for result in results)
    assert (
        f"Results by tau*: {', '.join(f'{i / 10:g} {taus[i / 10]}' for i in range(11))}"
        in page.text
    )
    tenths = Counter(min(int(result["probability"] * 10), 9) for result in results)
    listed = ", ".join(f"{i / 10:.3g} {tenths[i]}" for i in range(10))
    assert f"Results by the probability of their class: {listed}" in page.text
    mean = sum(result["tft"]["area"] for result in results) / 12
    shown = re.search(r'<td class="text">layercam</td><td>12</td>.*?<td>([\d.]+)%</td>', page.text)
    assert float(shown[1]) == pytest.approx(100 * mean, abs=0.051)


def test_a_histogram_of_scores_spans_them():
    bars = of_values([-3.0, -1.0, 1.9, 2.0, 7.0])
    assert [bar.height for bar in bars] == [1, 0, 1, 0, 1, 1, 0, 0, 0, 1]
    assert [bar.label for bar in bars[:3]] == ["-3", "-2", "-1"]
    assert [bar.height for bar in of_values([2.0, 2.0])] == [2] + [0] * 9
    heights = re.findall(r'height="([\d.]+)"></rect>', histogram("t", bars))
    assert [float(height) for height in heights] == [110 * bar.height for bar in bars]


def test_pictures_in_tables_are_small_and_on_white():
    assert thumb_size((4000, 3000)) == (128, 96) and thumb_size((60, 44)) == (60, 44)
    assert thumb_size((9000, 3)) == (128, 1)
    clear = thumb(Image.new("RGBA", (300, 200), (9, 9, 9, 0)))
    assert clear.size == (128, 85) and clear.getextrema() == ((255, 255),) * 3
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    assert len(jpeg(Image.fromarray(noise))) < 30_000


def test_settings_are_flat():
    nested = {"a_b": [{"c": [0.5, 1.0], "d": []}, {"c": None}], "e": {"f": {"g": False}}, "h": "x"}
    assert list(flat(nested)) == [("a b 1: c", "0.5, 1"), ("e: f: g", "no"), ("h", "x")]


def test_a_page_of_thousands_of_images_holds_none_of_them(f):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8))
    subject = Subject(Path("a.png"), "a", picture, view_of(picture.size, f.preprocessing))
    report = Report(Path("a.png"), Explanation("cam", 0, 0.5, torch.rand(32, 32), None), {})
    result = {"model": "m", "layer": "l", "cam": "cam", "class_index": 0, "outputs": {}}
    result |= {"class_name": "pear", "probability": 0.5}
    with tempfile.TemporaryFile("w+") as spool:
        page = Page(Path("index.html"), spool, LOOK)
        page.add([(subject, report)], [{**result, "image": "first"}])
        tracemalloc.start()
        try:
            for i in range(150):
                page.add([(subject, report)], [{**result, "image": f"{i}.png"}])
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < spool.tell() / 4
        assert [entry["image"] for entry, _ in page.entries()][::50] == ["first", "49.png"] + [
            *("99.png", "149.png")
        ]


@pytest.mark.slow
def test_a_browser_breaks_no_name_of_a_method(folder):
    chromium()
    draw("in/a.png")
    page_and_results("in", "--tft", "--cam", "all")
    script = """<script>
    const broken = [...document.querySelectorAll(".overview td.text")].map(each => {
      const range = document.createRange();
      range.selectNodeContents(each);
      return range.getClientRects().length;
    });
    document.title = `lines: ${broken}`;
    </script></body>"""
    path = Path("aft-out/index.html")
    # The page's policy lets no other script run.
    text = re.sub("<meta http-equiv=.*>", "", path.read_text())
    path.write_text(text.replace("</body>", script))
    shown = browse(path.resolve().as_uri(), folder, "--window-size=1200,900", "--dump-dom")
    assert f"<title>lines: {','.join('1' * len(CAMS))}</title>" in shown


@pytest.mark.slow
def test_a_browser_sorts_and_filters(folder):
    chromium()
    for seed in range(8):
        draw(f"in/{seed}.png", seed)
    _, results = page_and_results("in", "--tft", "--cam", "gradcam", "--cam", "layercam")
    rows = [expected(result) for result in results]
    median = sorted(row["probability"] for row in rows)[8]
    near = rows[4]["masked"]
    queries = {
        "": rows,
        "sort=-rpi": sorted(rows, key=lambda row: -row["rpi"]),
        "sort=image&method=GRAD": [row for row in rows if row["method"] == "gradcam"],
        f"probability=%3C{median!r}&sort=kept": sorted(
            [row for row in rows if row["probability"] < median], key=lambda row: row["kept"]
        ),
        f"probability=%3E%3D+{median!r}": [row for row in rows if row["probability"] >= median],
        f"masked={near:.3f}": [row for row in rows if f"{row['masked']:.3f}" == f"{near:.3f}"],
        "kept=%3E50%25": [row for row in rows if row["kept"] > 0.5],
        "tau=what": rows,
        "image=in%2F3": [row for row in rows if row["image"] == "in/3.png"],
    }
    for query, wanted in queries.items():
        address = f"file://{folder}/aft-out/index.html#{query}"
        page = Read(browse(address, folder, "--dump-dom"))
        for name in ("image", "method"):
            assert page.shown(name) == [row[name] for row in wanted], query
        assert f"{len(wanted)} of 16 results" in page.text
        assert ('aria-invalid="true"' in page.text) == (query == "tau=what")
    browse(
        f"file://{folder}/aft-out/index.html",
        folder,
        "--window-size=1200,900",
        f"--screenshot={folder}/page.png",
    )
    with Image.open("page.png") as shot:
        assert shot.size == (1200, 900)
        assert np.asarray(shot.convert("L")).std() > 10  # something is there


def test_networks_are_named_where_there_are_several(monkeypatch):
    def load(model, *_, **__):
        f = small_float()
        f.name = model
        return f

    monkeypatch.setattr("aftcli.models.load.load_classifier", load)
    draw("in/a.png")
    draw("in/b.png", 1)
    models = ("--quiet", "--model", "vgg16", "--model", "resnet18")
    page, results = page_and_results("in", *models, "--save", "overlay")
    assert page.heads == ["image", "class", "network", "method", "probability"]
    assert page.column("network") == ["vgg16", "resnet18"] * 2
    assert [float(y) for y in page.column("probability")] == [r["probability"] for r in results]
    assert "<td>2</td>" in page.text and "layercam, vgg16" in page.text
    lines = aft("explain", "in", *models, "--save", "none").out.splitlines()
    assert lines[0].split()[:2] == ["image", "network"]
    assert [line.split()[1] for line in lines[1:]] == ["vgg16", "resnet18"] * 2
    lines = aft("explain", "in", *models, "--save", "none", "--format", "csv").out.splitlines()
    assert [line.split(",")[1] for line in lines] == ["model", *["vgg16", "resnet18"] * 2]


def test_the_manifest_lists_the_page_and_what_it_replaces_is_no_surprise():
    draw("a.png")
    for _ in range(2):  # the second time over the first one's, without a note
        page_and_results("a.png", "--save", "overlay")
    listed = json.loads(Path("aft-out/manifest.json").read_text())["files"]
    assert listed["index.html"]["kind"] == "page"


@pytest.mark.parametrize("images", [1, 21])
def test_a_full_disk_leaves_no_half_page(folder, images):
    for seed in range(images):
        draw(f"in/{seed}.png", seed)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
    try:
        result = aft("explain", "in", "--html", "--save", "none", "--json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.code == 1
    assert re.fullmatch(r"aft: aft-out/index\.html: can't be written \(.+\)\n", result.err)
    assert leftovers(folder / "aft-out") == []
