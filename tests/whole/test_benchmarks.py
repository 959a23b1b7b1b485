"""Benchmarks are one tool: each is listed, each page is what its figures and template give."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import psutil
import pytest

from benchmarks import __main__ as tool
from benchmarks import pages
from benchmarks.quality import grid_tables, results
from benchmarks.speed import memory, peers

ROOT = Path(tool.__file__).parents[1]
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *FILES]


@pytest.mark.parametrize("page", pages.PAGES)
def test_a_page_is_what_its_figures_and_template_give(page):
    stored = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    assert stored == pages.made(page), f"run python -m benchmarks pages {page}"


@pytest.mark.parametrize("page", pages.PAGES)
def test_a_template_names_each_part_of_its_figures_once(page):
    names = re.findall(r"{{(.*?)}}", pages.template(page))
    assert sorted(names) == sorted(pages.figures(page))


@pytest.mark.parametrize("page", pages.PAGES)
def test_no_table_of_figures_is_in_text(page):
    for blocks in pages.figures(page).values():
        assert not [b for b in blocks if isinstance(b, str) and b.startswith("|")]


@pytest.mark.parametrize("page", pages.PAGES)
def test_figures_survive_being_rendered_and_kept(page, tmp_path, monkeypatch):
    before = pages.made(page)
    stored = (ROOT / "benchmarks" / f"{pages.PAGES[page]}.json").read_bytes()
    for path in (f"{pages.PAGES[page]}.json", f"{pages.PAGES[page]}_text.md"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((ROOT / "benchmarks" / path).read_bytes())
    monkeypatch.setattr(pages, "HERE", tmp_path)
    for part, blocks in pages.figures(page).items():
        pages.keep(page, part, pages.rendered(blocks))
    assert pages.made(page) == before
    assert (tmp_path / f"{pages.PAGES[page]}.json").read_bytes() == stored
    pages.keep(page, next(iter(pages.figures(page))), "| a | b |\n|---|---|\n| x \\| y |  |\n")
    assert "\n| a | b |\n|---|---|\n| x \\| y |  |\n" in pages.made(page) != before


def test_each_cell_of_a_table_is_a_value():
    markdown = "one\n| a |  | c |\n| --- | --: | --: |\n| 1 | | 0.10 |\n\n| no | table |"
    text, table, *rest = pages.taken_apart(markdown)
    assert table == {
        "head": ["a", "", "c"],
        "rule": "| --- | --: | --: |",
        "rows": [["1", None, "0.10"]],
    }
    assert (text, rest) == ("one", ["", "| no | table |"])
    assert pages.rendered([text, table, *rest]) == markdown


def test_the_overview_has_the_figures_of_the_tables_below_it():
    parts = pages.figures("results/tables")
    overview, accuracy = (b for b in parts["overview"] if isinstance(b, dict))
    text = pages.rendered(parts["tables"])
    networks = [s.partition("\n") for s in text.split("\n## ")[1:] if "**Table 3" in s]
    rows = iter(overview["rows"])
    for network, _, section in networks:
        for masks in ("binary", "soft"):
            (first, *_) = re.findall(
                rf"^\*\*Table 3 .*: {masks} masks[^#]+?\n\n\|[^#]+", section, re.M
            )
            expected = [network, masks]
            for measure in ("Average Increase", "Average Drop"):
                line = re.search(rf"^\| \S+ \| Grad-CAM \| {measure} \|(.+)\|$", first, re.M)[1]
                values = [re.search(r"\d\.\d+", cell)[0] for cell in line.split("|")]
                del values[1]  # fixed cut-offs
                expected += [*values, *["-"] * (4 - len(values))]
            assert next(rows) == expected
    assert next(rows, None) is None
    assert [row[:2] for row in accuracy["rows"]] == [
        [network, re.search(r"Table 4[^#]+?Grad-CAM \| (\d\.\d+)", section)[1]]
        for network, _, section in networks
    ]
    assert pages.taken_apart("\n".join(results.overview(parts["tables"]))) == parts["overview"]


def test_captions_that_the_head_has_are_left_out():
    lines = ["| 1 |", "", f"{results.FACTORS}9 images.", "", f"{results.INTERVALS}bold.", ""]
    titles = ["**Table 3: soft masks, the authors' code**", "**T: binary masks, the paper's text**"]
    kept = ["| 1 |", "", "9 images.", "", "**Table 3: soft masks**", "**T: binary masks**"]
    assert list(results.captioned([*lines, *titles])) == kept


def test_how_far_maps_of_peers_agree_is_a_table():
    found = {
        "times": {"one image": {"gradcam": {peers.AFT: [1.0], peers.GRAD_CAM: [2.0]}}},
        "memory": {},
        "agreement": {
            "eigencam": {peers.TORCHCAM: []},
            "gradcam": {peers.GRAD_CAM: [0.5, 0.75], peers.TORCHCAM: [1.0]},
        },
    }
    text = "\n".join(peers.section_lines(peers.SECTIONS["cams"], {"resnet50": found}))
    rows = [
        f"| mean correlation with our map | {peers.GRAD_CAM} | {peers.TORCHCAM} |",
        "| --- | --: | --: |",
        "| eigencam | - | - |",
        "| gradcam | 0.625 | 1.000 |",
    ]
    assert "\n".join(rows) in text


def of_grid(gain, low, beyond_shift, accuracy):
    """Figures of a tuned network, as benchmarks grid keeps them, by itself and one judge."""
    judges = ("self", "lite1")
    rows = {
        row: {f"average_{what} {judge}": [value, 0, 1] for judge in judges for what in of}
        | {"area": [0.9, 0, 1]}
        for row, value, of in (
            ("plain map", 0.25, ("increase", "drop")),
            ("tuned", 0.25 + gain, ("increase", "drop")),
        )
    }
    differences = {
        "tuned minus plain map": {f"average_increase {judge}": [gain, low, 1] for judge in judges},
        "tuned minus shift": {
            "average_increase self": [gain, beyond_shift, 1],
            "average_increase lite1": [gain, -0.1, 1],
        },
    }
    accuracies = {"plain map": [0.5, 0, 1], "tuned": [accuracy, 0, 1]}
    found = {"images": 440, "judges": judges, "rows": rows, "differences": differences}
    return {**found, "accuracy": accuracies}


@pytest.mark.parametrize(
    ("lows", "beyond", "marks"),
    [
        ((0.01, 0.02), (0.01, 0.01), ("\\*†", "\\*")),
        ((0.01, 0.0), (0.01, 0.01), ("†", "")),
        ((0.01, 0.02), (0.01, -0.01), ("\\*", "\\*")),
    ],
)
def test_a_gain_of_seeds_is_marked_where_each_shows_it(lows, beyond, marks):
    seeds = {
        str(seed): of_grid(0.25 * (seed + 1), lows[seed], beyond[seed], 0.5 + 0.25 * seed)
        for seed in range(2)
    }
    text = grid_tables.of_objectives({"lite0": {"cam": seeds}})
    title, head, _, plain, tuned = [line for line in text.split("\n") if line]
    assert title == "**lite0**, 440 images: increase / drop"
    assert head == "| objective | seeds | self | lite1 | kept area | accuracy |"
    assert plain == "| plain map | | .250 / .250 | .250 / .250 | .900 | .500 |"
    cells = [f".625 (.500 .. .750){mark} / .625" for mark in marks]
    shown = ["the CAM itself, with consistency", "2", *cells, ".900", ".625 (.500 .. .750)"]
    assert tuned == f"| {' | '.join(shown)} |"


@pytest.mark.parametrize("last", [3200, 3168])  # the last block may not be seen on its own
def test_growth_is_read_while_images_are_worked_on(last):
    rising = [memory.Sample(n, 500 + 3 * n / 1000, 0) for n in range(32, last, 32)]
    start = [memory.Sample(0, 100, 0)] * 9
    joining = [memory.Sample(last, 100, 0)] * 9
    found = memory.growth([*start, *rising, *joining], 3200)
    assert found["slope"] == pytest.approx(3 * 1024)  # KiB for 1,000 images
    for share, mib in found["at"].items():
        done = 3200 * float(share.strip("%")) / 100
        near = [s.own for s in rising if done - 160 <= s.images < done]
        assert mib == pytest.approx(sum(near) / len(near), abs=0.05)
    assert list(found["at"]) == ["10%", "50%", "100%"]
    assert found["samples"][0] == [32, 500.1] and len(found["samples"]) <= memory.PLACES


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux only")
def test_memory_of_a_process_and_its_children_is_sampled(tmp_path):
    held = 64  # MiB
    own = f"held = bytearray({held} << 20); print(flush=True); input()"
    code = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {own!r}])
"""
    command = [sys.executable, "-c", code]
    with psutil.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()  # the child holds its bytes
        found = memory.sample(process, 7)
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert found.images == 7
    assert held < found.own < held + 60
    assert 0 < found.files < 60


def run(*words):
    command = [sys.executable, "-m", "benchmarks", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_all_benchmarks_are_listed_with_one_line_each():
    named = {
        path.stem for path in FILES if re.search(r"^def main\(", path.read_text("utf-8"), re.M)
    }
    lines = re.findall(r"^  (\w+) +(\S.*\.)$", run().stdout, re.M)
    assert sorted(name for name, _ in lines) == sorted(named - {"__main__"})
    assert all(len(f"  {name}  {line}") <= 120 for name, line in lines)


def test_a_wrong_name_is_told_with_the_names_there_are():
    done = run("peer")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("peer: ") and "\n  peers " in done.stderr


def test_pages_are_written_by_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "pages", "results/speed"])
    assert tool.main() is None
    assert capsys.readouterr().out == "docs/results/speed.md\n"
    (written,) = tmp_path.rglob("*.md")
    assert written.read_bytes() == (ROOT / "docs/results/speed.md").read_bytes()


def test_a_benchmark_gets_the_words_behind_its_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "finetune", "--help"])
    with pytest.raises(SystemExit):
        tool.main()
    usage = " ".join(capsys.readouterr().out.split())
    assert usage.startswith("usage: python -m benchmarks finetune ") and "--limit" in usage


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_benchmarks_that_are_there(path):
    text = path.read_text("utf-8")
    names = re.findall(r"-m\s+benchmarks ([a-z]\w+)", text)
    assert set(names) <= {*tool.benchmarks(), "pages"}
    assert not re.search(r"python\S* benchmarks/", text)


def test_benchmarks_import_each_other_in_no_circle():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
    graph = {}
    for path in FILES:
        found = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[".".join(path.relative_to(ROOT).with_suffix("").parts)] = found & names
    assert graph["benchmarks.trust.fuzz"] == {"benchmarks.trust.fuzz_kinds"}
    TopologicalSorter(graph).prepare()
