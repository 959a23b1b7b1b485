"""Networks of the user's own code: run because the user named it, and only then."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aftcli.aft.jobs import control_job
from aftcli.data.images import read_image, to_input
from aftcli.data.sets import open_data_set
from aftcli.errors import AftError
from aftcli.files import write_tensors
from aftcli.masks.generate import generate_masks
from aftcli.masks.store import MaskStore
from aftcli.masks.stores import check_made_for, find_stores
from aftcli.models.checkpoint import checkpoint_of
from aftcli.models.load import load_classifier
from aftcli.models.source import Source
from aftcli.settings import Search
from aftcli.tft.judges import load_judges
from tests.helpers.command import aft
from tests.helpers.stored import NAMES, make_images
from tests.helpers.unreadable import refuse_to_read

CHELSEA = Path(__file__).parents[2] / "docs/images/chelsea.jpg"

CODE = """
import torch
from torch import nn
from beside import WIDTH

with open({trace!r}, "a") as file:
    file.write("ran\\n")


def make(num_classes=3):
    model = nn.Sequential(
        nn.Conv2d(3, WIDTH, 5, stride=4, padding=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, num_classes),
    )
    model.preprocessing = {{"size": (32, 32), "resize": 36}}
    return model


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(*make())
        self.preprocessing = {{"size": (32, 32), "resize": 36}}


class Home:
    model = make()


wrapped = nn.DataParallel(make())
needs = lambda x, y: make()
nothing = lambda: {{"net": 1}}
number = 3


def fixed():
    return make()


def wrong():
    raise ValueError("no such file\\nand more")


def leaves():
    raise SystemExit("usage: net.py")


def torn():
    return make().to("meta")


def half():
    return make().bfloat16()


def of_channels(count):
    model = make()
    model[0] = nn.Conv2d(count, WIDTH, 5, stride=4, padding=2)
    model.preprocessing = {{"size": (32, 32), "mean": (0.4,) * count, "std": (0.2,) * count}}
    return model


def grey():
    return of_channels(1)


def four():
    return of_channels(4)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with net.py, which imports its neighbour, and a trace of each time that it runs."""
    folder = tmp_path / "nets"
    folder.mkdir()
    (folder / "beside.py").write_text("WIDTH = 6\n")
    (folder / "net.py").write_text(CODE.format(trace=str(tmp_path / "trace")))
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield folder
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.startswith(("aft_model_", "beside", "nets")):
            del sys.modules[name]


def runs(home):
    trace = home.parent / "trace"
    return len(trace.read_text().split()) if trace.exists() else 0


# What is named


def test_code_that_can_not_be_read_is_said(home, monkeypatch):
    refuse_to_read(monkeypatch, "nets/net.py")
    with pytest.raises(AftError, match=r"^/.*/net\.py: can't be read \(Permission denied\)"):
        load_classifier("nets/net.py:make")
    assert runs(home) == 0


@pytest.mark.parametrize("name", ["make", "Net", "Home.model", "wrapped", "fixed"])
def test_a_function_a_class_or_a_network_is_cut(home, name):
    f = load_classifier(f"nets/net.py:{name}", note=pytest.fail)
    assert f.name == f"{home}/net.py:{name}"
    assert (f.layer_name, f.preprocessing.size) == ("0+1", (32, 32))
    assert set(f.weights()) == {"0.weight", "0.bias", "4.weight", "4.bias"}


def test_a_module_is_found_below_the_current_folder(home):
    (home / "beside.py").rename(home.parent / "beside.py")
    f = load_classifier("nets.net:make", note=pytest.fail)
    assert f.name == "nets.net:make"
    assert load_classifier("torchvision.models:squeezenet1_1", note=lambda _: None).classes


def test_random_weights_are_the_same_each_time(home):
    torch.manual_seed(5)
    one = load_classifier("nets/net.py:make").weights_hash()
    drawn = torch.rand(1)
    torch.manual_seed(6)
    assert load_classifier("nets/net.py:make").weights_hash() == one
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)  # the caller's own draws stay


def test_a_network_at_hand_is_copied(home):
    f = load_classifier("nets/net.py:Home.model")
    with torch.no_grad():
        next(f.parameters()).zero_()
    assert next(load_classifier("nets/net.py:Home.model").parameters()).any()


def test_changed_code_is_run_again_and_the_same_code_once(home):
    load_classifier("nets/net.py:make")
    load_classifier("nets/net.py:fixed")
    assert runs(home) == 1
    path = home / "net.py"
    path.write_text(path.read_text().replace("stride=4", "stride=2"))
    assert load_classifier("nets/net.py:make").activation_shape == (6, 16, 16)
    assert runs(home) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nets/no.py:make", "no.py: there is no such file; --model takes FILE.py:NAME"),
        ("nets/net.py:", "net.py: say which function of it returns the network: .*net.py:NAME"),
        ("nets/net.py", "net.py: say which function of it returns the network: .*net.py:NAME"),
        ("nets/net.py:mke", "has no 'mke'; nearest: make"),
        ("nets/net.py:Home.no", "has no 'Home.no'; nearest: model"),
        ("nets/net.py:needs", r"needs arguments \(x, y\); give them defaults"),
        ("nets/net.py:nothing", "returns a dict; it must return an nn.Module"),
        ("nets/net.py:number", "is a int; name a function that returns an nn.Module"),
        ("nets/net.py:wrong", r"net.py:wrong: raises ValueError: no such file; run with --debug"),
        ("nets/net.py:leaves", "raises SystemExit: usage: net.py"),
        ("nets/net.py:torn", r"returns a network without weights"),
        ("netz.net:make", "there is no module 'netz', here or installed"),
        ("nets.no:make", "there is no module 'nets.no', here or installed"),
        ("tim:resnet18", "there is no module 'tim'.*timm:NAME"),
    ],
)
def test_mistakes_are_one_line(home, name, message):
    with pytest.raises(AftError, match=message) as caught:
        load_classifier(name)
    assert "\n" not in str(caught.value)


def test_what_the_code_raises_while_it_is_imported(home):
    (home / "net.py").write_text("import torch\nraise RuntimeError('half done')\n")
    for _ in range(2):  # a module that failed is not kept
        with pytest.raises(AftError, match="raises RuntimeError: half done") as caught:
            load_classifier("nets/net.py:make")
        assert isinstance(caught.value.__cause__, RuntimeError)
    (home / "net.py").write_text("import nosuchlibrary\n")
    with pytest.raises(AftError, match="raises ModuleNotFoundError: No module named 'nosuch"):
        load_classifier("nets/net.py:make")
    with pytest.raises(AftError) as caught:  # with --debug the traceback is printed
        aft("explain", CHELSEA, "--model", "nets/net.py:make", "--debug")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    done = aft("explain", CHELSEA, "--model", "nets/net.py:make")
    assert done.code == 1 and "raises ModuleNotFoundError" in done.err
    assert "Traceback" not in done.err and done.err.count("\n") == 1


# Weights and classes


def test_a_state_dict_of_other_classes_is_loaded(home):
    made = load_classifier("nets/net.py:make")
    weights = {f"model.{k}": torch.rand_like(v) for k, v in made.weights().items()}
    weights["model.4.weight"], weights["model.4.bias"] = torch.rand(5, 6), torch.rand(5)
    torch.save({"state_dict": weights}, "own.pth")
    notes = []
    f = load_classifier("nets/net.py:make", "own.pth", note=notes.append)
    assert len(f.classes) == 5 and notes == ["own.pth: took model. off the names of its weights"]
    assert all(torch.equal(v, weights[f"model.{k}"]) for k, v in f.weights().items())
    with pytest.raises(AftError, match=r"2 of another shape \(first: 4.weight\)"):
        load_classifier("nets/net.py:fixed", "own.pth")


def test_a_new_head_needs_an_argument_num_classes(home):
    data = make_images(home.parent / "data", each=2)
    for name, names in (("make", ("a", "b", "c")), ("fixed", None)):
        f = load_classifier(f"nets/net.py:{name}", classes=names)
        (data / "fourth").mkdir(exist_ok=True)
        (data / "fourth/0.png").write_bytes((data / "apple/0.png").read_bytes())
        if name == "make":
            job = control_job(f, data, None, None)
            assert job.new_head and job.f.classes.names == ("apple", "fourth", "pear", "plum")
        else:
            with pytest.raises(AftError, match="can't get 4 outputs: .* argument num_classes"):
                control_job(f, data, None, None)


@pytest.mark.parametrize("name", ["half", "grey"])
def test_masks_of_half_and_grey_networks(home, name):
    make_images(home.parent / "data", each=2)
    options = ("--model", f"nets/net.py:{name}", "--run", "run", "--thresholds", "0.3", "--quiet")
    options += ("--val-share", "0")
    done = aft("gen-masks", "data", *options, "--workers", "0", "--json")
    assert done.code in (0, None), done.err
    (made,) = json.loads(done.out)["stores"]
    assert made["images"] == 6 and made["broken"] == []
    store = MaskStore(Path(made["path"]))
    f = load_classifier(f"nets/net.py:{name}")
    x = to_input(read_image(home.parent / "data" / store[0].path), f.preprocessing)
    with torch.no_grad():
        p = f(x.to(next(f.parameters()))).float().softmax(1)
    assert abs(store[0].probability - float(p.max())) < 1e-2


def test_four_channels_are_refused_before_a_picture_is_read(home):
    make_images(home.parent / "data", each=1)
    for command in (("gen-masks", "data", "--run", "run"), ("explain", "data/apple/0.png")):
        done = aft(*command, "--model", "nets/net.py:four")
        assert done.code == 1 and "takes 4 channels, a picture has 1 or 3; make x" in done.err


# Code runs only if the user names it


@pytest.fixture
def made(home):
    """A mask store and a checkpoint of the code, as if from elsewhere: the trace is empty again."""
    f = load_classifier("nets/net.py:make", classes=NAMES)
    data = open_data_set(make_images(home.parent / "data", each=2), None, f.classes)
    list(generate_masks(f, data, ["gradcam"], Path("run"), Search((0.3,)), workers=0))
    tensors, metadata = checkpoint_of(f, None, {"start": f.weights_hash()})
    write_tensors(Path("own.safetensors"), tensors, metadata)
    (home.parent / "trace").unlink()
    for name in [name for name in sys.modules if name.startswith("aft_model_")]:
        del sys.modules[name]
    return home


@pytest.mark.slow
def test_a_card_or_a_store_never_runs_code_that_it_names(made):
    store = MaskStore(Path("run/masks/net.py_make-gradcam.h5"))
    name = f"{made}/net.py:make"
    assert store.settings["model"] == name
    message = f"the network is code, {name}, and code runs only if you name it .*--model {name}"
    with pytest.raises(AftError, match=f"own.safetensors: {message}"):
        load_classifier(checkpoint="own.safetensors")
    with pytest.raises(AftError, match=f"the masks: {message}"):
        Source().of_masks(store.settings)
    for option in ("--judge", "--tft-judges"):
        again = rf"^{option} own.safetensors: .*\(a judge: {re.escape(name)}=own.safetensors\)$"
        with pytest.raises(AftError, match=again):
            load_judges(["own.safetensors"], option=option)
    np.save("x.npy", np.eye(8))
    commands = [
        ("explain", "data/apple/0.png", "--checkpoint", "own.safetensors"),
        ("tft", "data/apple/0.png", "--map", "x.npy", "--checkpoint", "own.safetensors"),
        ("gen-masks", "data", "--checkpoint", "own.safetensors", "--run", "other"),
        ("finetune", "--run", "run"),
        ("finetune", "--no-masks", "--run", "run"),
        ("evaluate", "--run", "run", "--judge", "none"),
        ("evaluate", "data", "--run", "run", "--judge", "own.safetensors", "--model", name),
    ]
    for command in commands[:-1]:
        done = aft(*command)
        assert done.code == 1 and "code runs only if you name it yourself" in done.err, command
    assert runs(made) == 0
    done = aft(*commands[-1])  # the judge was not named
    assert done.code == 1 and "--judge own.safetensors: " in done.err


@pytest.mark.parametrize("module", ["os:system", "subprocess:run", "nets.net:make"])
def test_a_card_that_names_any_module_is_refused(made, module, monkeypatch):
    f = load_classifier("nets/net.py:make", classes=NAMES)
    f.name = module
    tensors, metadata = checkpoint_of(f, None, {})
    write_tensors(Path("own.safetensors"), tensors, metadata)
    count = runs(made)
    again = rf"add --model {module} \(a judge: {module}=own\.safetensors\)$"
    with pytest.raises(AftError, match=again):
        load_classifier(checkpoint="own.safetensors")
    assert runs(made) == count


def test_what_the_user_names_is_loaded_by_its_card_and_store(made):
    for name in ("nets/net.py:make", "./nets/net.py:make", f"{made}/net.py:make"):
        f = load_classifier(name, "own.safetensors")
        assert f.name == f"{made}/net.py:make" and f.classes.names == NAMES
        (store,) = find_stores(Path("run"), name, [])
        check_made_for(store, Source(model=name).of_masks(store.settings).load())
    with pytest.raises(
        AftError, match="was tuned for --model .*net.py:make, asked for nets/net.py:Ne"
    ):
        load_classifier("nets/net.py:Net", "own.safetensors")
    with pytest.raises(AftError, match="was tuned for --model .*, asked for resnet18"):
        load_classifier("resnet18", "own.safetensors")


def test_moved_code_is_found_where_the_user_says(made):
    moved = made.rename(made.with_name("moved"))
    f = load_classifier("moved/net.py:make", "own.safetensors")
    assert f.name == f"{moved}/net.py:make"
    (store,) = find_stores(Path("run"), "moved/net.py:make", [])
    check_made_for(store, f)


@pytest.mark.slow
def test_all_commands_and_other_processes_take_it(home):
    make_images(home.parent / "data/train", each=4)
    make_images(home.parent / "data/val", each=2, seed=1)
    Path("names.txt").write_text("\n".join(NAMES))
    own = ("--model", "nets/net.py:make", "--classes", "names.txt", "--quiet")

    def read(*command):
        done = aft(*command, *own, "--run", "run", "--json", "--workers", "2")
        assert done.code in (0, None), done.err
        return json.loads(done.out)

    thresholds = ("--thresholds", "0.3,0.6")
    (store,) = read("gen-masks", "data", *thresholds)["stores"]
    (card,) = read("finetune", "--objective", "tuner", "--epochs", "1")
    assert card["model"] == f"{home}/net.py:make"
    tables = read("evaluate", "--judge", "none")
    assert {row["variant"] for row in tables["table3"]} >= {"original", "aft"}
    # Two processes, as torchrun starts them; each has the same random weights.
    (home.parent / "run.py").write_text("from aftcli.cli.app import main\nmain()\n")
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "run.py"]
    line += ["gen-masks", "data", *own, *thresholds, "--workers", "0"]
    paths = os.pathsep.join((str(CHELSEA.parents[2]), os.environ.get("PYTHONPATH", "")))
    where = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(line, capture_output=True, text=True, env=where)
    assert done.returncode == 0, done.stderr
    other = MaskStore(Path("aft-run") / Path(store["path"]).relative_to("run"))
    assert other.settings["digest"] == MaskStore(Path(store["path"])).settings["digest"]
