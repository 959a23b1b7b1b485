"""The tutorial runs as it is written, in the interpreter that runs the tests."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.helpers.blocks import difference

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs/get-started/tutorial.ipynb"


def page_of(cells):
    """The page that docs/make_tutorial.py makes of cells, its lines and pictures."""
    spec = importlib.util.spec_from_file_location("make_tutorial", ROOT / "docs/make_tutorial.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text, pictures = script.page(cells)
    return text.splitlines(), pictures


def test_the_tutorial_is_kept_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) == 6
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_the_page_has_the_notebooks_cells():
    nbformat = pytest.importorskip("nbformat")
    page = NOTEBOOK.with_suffix(".md").read_text("utf-8")
    sources = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells]
    places = [page.find(source) for source in sources]
    assert -1 not in places and places == sorted(places)
    pictures = list((ROOT / "docs/images/tutorial").iterdir())
    assert sum(picture.stat().st_size for picture in pictures) < 300_000


@pytest.mark.slow
def test_the_tutorial_runs_and_ends_each_step_in_a_picture():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("import sys\nprint(sys.executable)"))
    where = {"metadata": {"path": NOTEBOOK.parent}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    *steps, last = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    page, pictures = page_of(notebook.cells[:-1])
    stored = NOTEBOOK.with_suffix(".md").read_text("utf-8").splitlines()
    assert difference(stored, page) is None
    assert len(pictures) == len(list((ROOT / "docs/images/tutorial").iterdir()))
    assert last[0].text.strip() == sys.executable
    said = [out.text for step in steps for out in step if out.get("name") == "stderr"]
    assert not [text for text in said if "IProgress" not in text]  # tqdm's, without ipywidgets
    shown = [step[-1].data for step in steps]
    pictures = ["image/png" in d or "<img" in d.get("text/html", "") for d in shown]
    assert pictures == [True] * 6
    assert "RPI" in shown[2]["text/html"] and "RPI" not in shown[0]["text/html"]
    assert "not Egyptian cat" in shown[4]["text/html"]
