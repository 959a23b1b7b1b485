"""Results on stdout: tables, summaries of many images, CSV and JSON as they come."""

import csv
import io
import json
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from aftcli.cli.images import Format
from aftcli.cli.process import open_streams
from aftcli.pages import results as printed
from aftcli.pages.results import COLUMNS, FORMATS, MOST, STREAMED, elided, line_of
from aftcli.report.explain import OUTPUTS
from aftcli.report.summary import Summary, label_of
from tests.helpers.command import aft, leftovers, without_chance

pytestmark = pytest.mark.usefixtures("folder", "f")


def draw(count, start=0):
    """Make pictures in the folder `in`, some of which differ."""
    Path("in").mkdir(exist_ok=True)
    for i in range(start, start + count):
        pixels = np.random.default_rng(i).integers(0, 200, (44, 60, 3), dtype=np.uint8)
        pixels[8:28, i : i + 20] = (i * 37 % 256, 250, 255 - i * 11 % 256)
        Image.fromarray(pixels).save(f"in/{i:02}.png")


def done(result):
    assert (result.code, without_chance(result.err)) == (0, "")
    return result.out


def run(*options):
    return done(aft("explain", "in", "--save", "none", *options))


def test_formats_are_those_of_the_option():
    assert get_args(Format) == tuple(FORMATS)
    assert set(STREAMED) < set(FORMATS) and set(OUTPUTS) | {"grid"} <= set(COLUMNS)


@pytest.mark.parametrize(
    "options",
    [(), ("--tft", "--cam", "gradcam", "--cam", "layercam"), ("--mute", "40", "--top-k", "2")],
    ids=lambda options: " ".join(options),
)
def test_all_formats_have_the_same_numbers(options):
    draw(3)
    found = json.loads(run("--format", "json", *options))
    assert json.loads(run("--json", *options)) == found
    assert [json.loads(line) for line in run("--format", "jsonl", *options).splitlines()] == found
    text = io.StringIO(run("--format", "csv", *options), newline="")
    lines = list(csv.DictReader(text))
    assert len(lines) == len(found) and all(tuple(line) == COLUMNS for line in lines)
    for line, result in zip(lines, found, strict=True):
        assert {k: line[k] for k in ("image", "model", "layer", "cam", "class_name")} == {
            k: result[k] for k in ("image", "model", "layer", "cam", "class_name")
        }
        assert int(line["class_index"]) == result["class_index"]
        assert float(line["probability"]) == result["probability"]
        tft, cut = result.get("tft"), result.get("tft") or result.get("fixed")
        best = tft and max(tft["rpi"])
        for name, value in {
            "tau": tft and tft["tau"],
            "rpi": best,
            "threshold": result["fixed"]["threshold"] if "fixed" in result else None,
            "masked_probability": cut and cut["probability"],
            "area": cut and cut["area"],
        }.items():
            assert (line[name] == "") if value is None else (float(line[name]) == value)
        assert line["masking"] == (cut["masking"] if cut else "")


@pytest.mark.parametrize("form", STREAMED)
def test_results_are_printed_as_they_come(form, monkeypatch):
    """Each image's line is there before the next image is read."""
    draw(3)
    seen, written = [], io.BytesIO()
    stdout = io.TextIOWrapper(written, encoding="utf-8", newline="")  # keeps what is not flushed
    from aftcli.data.images import read_image

    def read(path):
        seen.append(written.getvalue().count(b"\n"))
        return read_image(path)

    monkeypatch.setattr("aftcli.data.images.read_image", read)
    assert aft("explain", "in", "--save", "none", "--format", form, stdout=stdout).code == 0
    head = form == "csv"
    assert seen == [head, head + 1, head + 2]
    assert written.getvalue().count(b"\n") == head + 3


@pytest.mark.parametrize("form", FORMATS)
def test_a_closed_stdout_fails_nothing(form, monkeypatch):
    draw(1)

    def closed():
        sys.stdout = None  # as Python has it then; the helper puts another back
        open_streams()

    monkeypatch.setattr("aftcli.cli.app.open_streams", closed)
    done = aft("explain", "in", "--format", form)
    assert (done.code or 0, done.out, done.err) == (0, "", "")
    assert len(list(Path("aft-out").glob("*.png"))) == 1


@pytest.mark.parametrize("form", FORMATS)
def test_where_nothing_is_written_nothing_needs_a_folder(form):
    draw(1)
    Path("file").write_text("")
    asked = ("explain", "in", "--out", "file/out", "--format", form)
    result = aft(*asked, "--save", "none")
    assert (result.code or 0, without_chance(result.err)) == (0, "")
    for options in ((), ("--save", "none", "--html")):
        result = aft(*asked, *options)
        assert result.code == 1 and "file/out: can't write there (Not a directory)" in result.err


def test_no_file_has_the_number_of_a_closed_stream(tmp_path):
    code = "import os, pathlib; from aftcli.cli.process import open_streams as o; o(); "
    code += "f = open('a', 'wb'); print(1); [os.write(n, b'native') for n in (1, 2)]; "
    code += "pathlib.Path('b').write_text(f'{f.fileno() > 2} {os.read(0, 1)}')"
    command = f"{shlex.join([sys.executable, '-c', code])} <&- >&- 2>&-"
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "b").read_text() == "True b''"
    assert (tmp_path / "a").read_bytes() == b""


@pytest.mark.parametrize("form", STREAMED)
def test_lines_reach_stdout_beside_a_progress_bar(form, monkeypatch):
    """The bar takes what is printed while it is shown, to stderr."""
    draw(2)
    monkeypatch.setenv("FORCE_COLOR", "1")  # stderr is a terminal to the bar
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    result = aft("explain", "in", "--save", "none", "--format", form)
    assert "explaining" in result.err and ".png" not in result.err
    assert result.out.count(".png") == 2


def test_formats_of_nothing():
    wanted = {"table": "", "json": "[]\n", "jsonl": "", "csv": ",".join(COLUMNS) + "\r\n"}
    for form, out in wanted.items():
        result = aft("explain", "gone.png", "--format", form)
        assert result == (1, out, "aft: gone.png: there is no such file or folder\n")


def test_text_in_csv_is_no_formula(f):
    object.__setattr__(f.classes, "names", ("=1+1", "@x", "-y"))
    draw(1)
    for name in ("'=1+1", "'@x", "'-y"):
        index = "012"[["'=1+1", "'@x", "'-y"].index(name)]
        [line] = csv.DictReader(io.StringIO(run("--format", "csv", "--target", index)))
        assert line["class_name"] == name


def test_twenty_images_are_listed_and_one_more_is_summed_up(folder):
    draw(MOST)
    lines = run("--tft").splitlines()
    assert len(lines) == 1 + MOST and not Path("aft-out/results.csv").exists()
    draw(1, MOST)
    methods = ("--cam", "gradcam", "--cam", "layercam")
    out = done(aft("explain", "in", "--tft", *methods, "--save", "map"))
    found = json.loads(run("--tft", *methods, "--json"))
    assert len(found) == 2 * (MOST + 1)
    words = [line.split() for line in out.splitlines()]
    assert words[0] == ["42", "results", "of", "21", "images"]
    assert words[1] == ["mean", "of", "results", "prob.", "RPI", "masked", "kept"]
    tfts = {cam: [] for cam in ("gradcam", "layercam")}
    for result in found:
        tfts[result["cam"]].append((result["probability"], result["tft"]))

    def mean(values):
        return sum(values) / len(values)

    for line, (cam, own) in zip(words[2:4], tfts.items(), strict=True):
        assert line[:2] == [cam, "21"]
        close = [mean([y for y, _ in own]), mean([max(t["rpi"]) for _, t in own])]
        close += [mean([t["probability"] for _, t in own]), 100 * mean([t["area"] for _, t in own])]
        shown = [float(number.rstrip("%")) for number in line[2:]]
        for number, value, digits in zip(shown, close, (4, 3, 4, 1), strict=True):
            assert number == pytest.approx(value, abs=0.51 * 10**-digits)
    taus = {cam: Counter(t["tau"] for _, t in own) for cam, own in tfts.items()}
    known = found[0]["tft"]["thresholds"]
    assert len(known) == 11
    assert words[4] == ["tau*", *(f"{tau:g}" for tau in known)]
    for line, cam in zip(words[5:7], taus, strict=True):
        assert line == [cam, *(str(taus[cam][tau]) for tau in known)]
    gradcam = [r for r in found if r["cam"] == "gradcam"]
    classes = Counter(f"{r['class_name']} ({r['class_index']})" for r in gradcam).most_common(5)
    listed = ", ".join(f"{name} {count}" for name, count in classes)
    last = [f"most common classes: {listed}", "wrote aft-out/results.csv"]
    assert out.splitlines()[7:] == [*last, "wrote 42 other files in aft-out"]
    lines = list(csv.DictReader(Path("aft-out/results.csv").open(newline="")))
    assert [(line["image"], line["cam"], float(line["rpi"])) for line in lines] == [
        (r["image"], r["cam"], max(r["tft"]["rpi"])) for r in found
    ]
    assert all(Path(line["map"]).is_file() for line in lines)


def test_a_summary_of_broken_images_is_none(folder):
    Path("in").mkdir()
    for i in range(MOST + 1):
        Path(f"in/{i}.png").touch()
    result = aft("explain", "in")
    assert (result.code, result.out) == (1, "")
    assert result.err.count("the file is empty") == MOST + 1
    assert leftovers(folder / "aft-out") == []


def test_an_interrupted_summary_leaves_no_file(folder, monkeypatch):
    draw(MOST + 1)
    from aftcli.data.images import read_image

    def read(path):
        if path.name == "07.png":
            raise KeyboardInterrupt
        return read_image(path)

    monkeypatch.setattr("aftcli.data.images.read_image", read)
    result = aft("explain", "in", "--save", "none")
    assert result == (130, "", "aft: interrupted\n")
    assert leftovers(folder / "aft-out") == []


def result(tau, rpi=0.0, y=0.5, image="a.png"):
    found = {"image": image, "model": "m", "layer": "l", "cam": "cam", "outputs": {}}
    found |= {"class_index": 0, "class_name": "pear", "probability": y}
    tft = {"thresholds": [tau], "tau": tau, "rpi": [rpi], "probability": y, "area": 0.5}
    return {**found, "tft": tft}


def test_many_thresholds_are_counted_in_tenths():
    summary = Summary()
    taus = [round(i / 100, 2) for i in range(101)]
    summary.add([result(tau, image=f"{tau}") for tau in taus])
    counts = {tau: sum(found.values()) for tau, found in summary.thresholds()}
    assert summary.in_tenths and counts == {**{i / 10: 10 for i in range(10)}, 1.0: 1}
    assert (summary.images, summary.results) == (101, 101)


def test_an_rpi_of_no_probability_is_in_no_mean():
    summary = Summary()
    summary.add([result(0.1, 3e38, 0.0), result(0.1, 0.5), result(0.2, 0.25)])
    (means,) = summary.means.values()
    assert means.of("rpi") == 0.375 and means.of("probability") == pytest.approx(1 / 3)
    assert (summary.images, means.results) == (1, 3)


@pytest.mark.parametrize("width", [80, 60, 1000])
def test_a_table_breaks_no_word_and_elides_names_in_the_middle(width, monkeypatch, capsys):
    names = ["a.png", f"folder/{'long' * 30}.png", f"猫{'猫' * 60}.png", "n01440764_10026.JPEG"]
    classes = ["pear", "West Highland white terrier", "x" * 90, "tiger cat"]
    found = [
        {**result(0.3, image=image), "class_name": name}
        for image, name in zip(names, classes, strict=True)
    ]
    monkeypatch.setattr(printed, "stdout_console", lambda _: console(width))
    printed.print_table(found)
    lines = capsys.readouterr().out.splitlines()
    from rich.cells import cell_len

    assert max(map(cell_len, lines)) <= width
    words = " ".join(lines).split()
    for word in ("West", "Highland", "white", "terrier", "tiger", "cat", "pear", "a.png"):
        assert word in words
    if width == 1000:
        assert names[1].rpartition("/")[2] in words and "…" not in " ".join(lines)
    else:
        long = next(word for word in words if word.startswith("long"))
        assert "…" in long and long.endswith(".png")
        assert len([line for line in lines if "0.5000" in line]) == 4


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_of_networks_fits(width, monkeypatch, capsys):
    found = [
        {**result(0.3), "model": model, "checkpoint": f"runs/{'x' * 20}/tuned.pth", "image": image}
        for model in ("efficientnet_lite0", "tf_efficientnetv2_b3")
        for image in ("a.png", "ILSVRC2012_val_00000293.JPEG")
    ]
    monkeypatch.setattr(printed, "stdout_console", lambda _: console(width))
    printed.print_table(found)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width and lines[0].split()[:3] == ["image", "network", "cam"]
    assert len([line for line in lines if "0.5000" in line]) == 4
    words = " ".join(lines).split()
    assert words.count("cam") == 5 and words.count("0.3") == 4 and words.count("pear") == 4
    assert ("efficientnet_lite0" in words) == (width == 120)


def console(width):
    from rich.console import Console

    return Console(width=width, emoji=False, highlight=False, markup=False)


def test_what_is_elided_keeps_both_ends():
    text = "n02123159/ILSVRC2012_val_00000293.JPEG"
    for width in range(3, 60):
        found = elided(text, width)
        assert len(found) == min(width, len(text))
        start, _, end = found.partition("…")
        assert text.startswith(start) and text.endswith(end)
    assert elided("猫" * 9, 8) in ("猫…猫", "猫猫…猫")


def test_a_line_holds_no_nothing():
    line = line_of({**result(0.25, 1.5), "layers": ["a", "b"], "fuse": "max", "cells": True})
    assert (line["tau"], line["rpi"], line["layers"], line["cells"]) == (0.25, 1.5, "a;b", True)
    assert set(line) <= set(COLUMNS) and None not in line.values()
    assert torch.finfo(torch.float32).max == line_of(result(0, 3.4028234663852886e38))["rpi"]
    assert sys.getsizeof(line) < 10_000


def test_a_contrast_is_named():
    contrast = {"class_index": 7, "class_name": "plum", "probability": 0.1}
    found = {**result(0.25, 1.5), "contrast": contrast}
    assert label_of(found) == "pear (0), not plum (7)"
    assert line_of(found)["contrast"] == "plum" and line_of(result(0.25))["contrast"] == ""


@pytest.mark.parametrize("form", FORMATS)
def test_a_picture_of_all_images_is_named_once_they_are_done(form):
    draw(2)
    result = aft("explain", "in", "--format", form)
    [overview] = map(str, Path("aft-out").glob("*-overview.png"))
    assert result.code == 0
    if form in STREAMED:  # whose last line was there before
        assert result.err == f"wrote {overview}\n" and overview not in result.out
    else:
        assert result.err == "" and result.out.count(overview) == 1
