"""The same command gives the same bytes: again, on other processes, with other workers."""

import pytest
import torch
from safetensors import safe_open

from aftcli import AftError, MaskStore
from aftcli.cli import setup as cli_setup
from aftcli.data.blocks import Processes
from aftcli.data.sets import open_data_set
from aftcli.evaluation.run import Plan, evaluate_study
from aftcli.masks.generate import generate_masks
from aftcli.settings import Search
from tests.evaluation.test_run import evaluate_as_one_of, run_all, study_of
from tests.helpers import command
from tests.helpers.faulty import COMMANDS, aft, arguments, content
from tests.helpers.stored import generate, generate_as_one_of, small_float
from tests.helpers.trained import make_colours

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_colours(tmp_path_factory.mktemp("data") / "fruit")


def study(processes, data, folder, workers):
    """The three commands; all that they leave and print."""
    folder.mkdir()
    ended = [aft(processes, folder, *arguments(c, data, workers)) for c in COMMANDS]
    assert [(e.code, e.err) for e in ended] == [(0, "")] * 3
    return content(folder / "run"), ended[-1].out.replace(f"--workers {workers}", "--workers N")


def test_stores_checkpoints_results_and_tables_are_the_same_bytes(processes, data, tmp_path):
    first = study(processes, data, tmp_path / "first", 1)
    kinds = {name.rpartition(".")[2] for name in first[0]}
    assert kinds == {"h5", "safetensors", "png"} and len(first[0]) >= 8
    assert study(processes, data, tmp_path / "again", 1) == first
    for workers in (0, 2):
        assert study(processes, data, tmp_path / str(workers), workers) == first
    # safetensors orders several entries anew in each process, which forked ones do not show.
    for path in (tmp_path / "first").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert len(file.metadata()) == 1, path


def together(processes, target, *arguments):
    """Run a target as each of two processes."""
    barrier = processes.Barrier(2)
    both = [processes.Process(target=target, args=(i, 2, barrier, *arguments)) for i in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_write_the_bytes_of_one(processes, data, tmp_path, one_thread):
    generate(data, tmp_path / "one", ("gradcam", "layercam"))
    run_all(study_of(data / "val"), tmp_path / "one")
    together(processes, generate_as_one_of, data, tmp_path / "two")
    together(processes, evaluate_as_one_of, data / "val", tmp_path / "two")
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert len(one) > 10 and one == two


@pytest.mark.parametrize("size", [1, 3, 5])
def test_the_number_of_images_in_a_batch_decides_no_threshold(data, tmp_path, one_thread, size):
    usual, other = (masks(data, tmp_path / str(batch), batch) for batch in (16, size))
    assert (usual.tau == other.tau).all() and (usual.mask == other.mask).all()
    for name in ("probability", "probabilities", "rpi"):
        a, b = (torch.from_numpy(getattr(rows, name)) for rows in (usual, other))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def masks(data, run, batch):
    f = small_float()
    data_set = open_data_set(data, None, f.classes)
    list(generate_masks(f, data_set, ["gradcam"], run, Search(), workers=0, batch=batch))
    with MaskStore(run / "masks/small-gradcam.h5") as store:
        return store.rows(0, len(store))


def test_an_evaluation_chooses_its_engine_by_the_whole_work(data, tmp_path):
    asked = []
    plan = Plan(workers=0, block=2, accelerate=lambda f, passes: asked.append(passes) or f)
    begun = evaluate_study(study_of(data / "val"), tmp_path, plan)
    for _ in range(4):
        next(begun)
    begun.close()
    assert len(asked) == 1 and list(tmp_path.glob("results/.*.parts/0*"))
    run_all(study_of(data / "val"), tmp_path, plan)
    assert len(asked) == 4 and asked[1] == asked[0]


def test_masks_choose_their_engine_by_the_work_of_all_processes(data, tmp_path, monkeypatch):
    asked = []

    def engine(f, passes):
        asked.append(passes)
        raise AftError("enough")

    monkeypatch.setattr(cli_setup, "classifier", lambda *_: small_float())
    monkeypatch.setattr(cli_setup, "engine", lambda *_: engine)
    for count in (1, 2, 3):
        monkeypatch.setattr(cli_setup, "processes", lambda d, n=count: (Processes(0, n), d))
        done = command.aft("gen-masks", data, "--run", tmp_path)
        assert (done.code, done.err) == (1, "aft: enough\n")
    assert asked[0] > 0 and asked == asked[:1] * 3
