"""Bad input: one line that says what and what to do, exit code 1, nothing half-written."""

import os
import pickle
import re
from fractions import Fraction
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.command import aft, leftovers, usage_error, without_chance

IMAGES = Path(__file__).parents[2] / "docs/images"
CHELSEA = str(IMAGES / "chelsea.jpg")
BLOB = np.exp(-((np.mgrid[:32, :32] - 14.0) ** 2).sum(0) / 50)


pytestmark = pytest.mark.usefixtures("folder")


class Evil:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("EXECUTED",)


def complaint(*arguments):
    """Return what a failing command says: one line, and nothing else anywhere."""
    before = leftovers(Path())
    result = aft(*arguments)
    assert result.code == 1, result
    assert not result.out or result.out == "[]\n"
    line, end = result.err[:-1], result.err[-1:]
    assert line.startswith("aft: ")
    assert end == "\n"
    assert line.isprintable()
    assert "fault of aft" not in line
    assert len(line) < 600
    assert leftovers(Path()) == before
    assert not Path("EXECUTED").exists()
    return line.removeprefix("aft: ")


def cut(share, data):
    return data[: int(len(data) * share)]


def make(name, data):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(data)


JPEG = Path(CHELSEA).read_bytes()

# Arguments: what makes the file, what the message says.
PICTURES = {
    "gone.jpg": (lambda: None, "gone.jpg: there is no such file or folder"),
    "gone/*.jpg": (lambda: None, "gone/*.jpg: there is no such file or folder"),
    "": (lambda: None, "'': there is no such file or folder"),
    "n" * 300: (lambda: None, "there is no such file or folder"),
    "empty": (lambda: Path("empty").mkdir(), "empty: there is no image in this folder"),
    "texts": (lambda: make("texts/a.txt", b"x"), "texts: there is no image in this folder"),
    "zero.jpg": (lambda: make("zero.jpg", b""), "zero.jpg: the file is empty"),
    "text.jpg": (lambda: make("text.jpg", b"text\n" * 99), "text.jpg: is not a picture"),
    "cut1.jpg": (lambda: make("cut1.jpg", cut(0.01, JPEG)), "cut1.jpg: can't be read as a picture"),
    "cut50.jpg": (lambda: make("cut50.jpg", cut(0.5, JPEG)), "it may be damaged"),
    "cut99.jpg": (lambda: make("cut99.jpg", cut(0.99, JPEG)), "it may be damaged"),
    "end.jpg": (lambda: make("end.jpg", JPEG[:-2]), "it may be damaged"),
    "new\nline.jpg": (lambda: make("new\nline.jpg", b"x"), r"new\nline.jpg: is not a picture"),
    "\x1b[2J.jpg": (lambda: make("\x1b[2J.jpg", b""), r"\x1b[2J.jpg: the file is empty"),
    "[red]x.jpg": (lambda: make("[red]x.jpg", b""), "[red]x.jpg: the file is empty"),
    "link.jpg": (lambda: os.symlink("nowhere", "link.jpg"), "link.jpg: can't be read"),
    "nan.tif": (
        lambda: Image.fromarray(np.full((9, 9), np.nan, np.float32)).save("nan.tif"),
        "nan.tif: can't be read as a picture (it holds values that are not finite)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("command", ["explain", "tft"])
def test_pictures(f, command, name):
    create, message = PICTURES[name]
    create()
    assert message in complaint(command, name)
    assert message in complaint(command, "--json", "--", name)


def truncated(kind):
    save = np.savez if kind == "npz" else np.save
    save(f"whole.{kind}", BLOB)
    make(f"cut.{kind}", cut(0.5, Path(f"whole.{kind}").read_bytes()))


def coloured():
    with Image.open(CHELSEA) as image:
        image.resize((32, 32)).save("colour.png")


def bomb():
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    make("bomb.npy", b"\x93NUMPY\x01\x00v\x00" + header.ljust(117).encode() + b"\n")


def dump(name, thing):
    make(name, pickle.dumps(thing))


def with_one(value):
    return np.where(BLOB == 1, value, BLOB)


TWO = "a map has two dimensions (height, width), this has shape"
MAPS = {
    "gone.npy": (lambda: None, "gone.npy: there is no such map file"),
    "": (lambda: None, "there is no such map file"),
    "folder.npy": (lambda: Path("folder.npy").mkdir(), "there is no such map file"),
    "nan.npy": (lambda: np.save("nan.npy", with_one(np.nan)), "NaN or infinite"),
    "inf.npy": (lambda: np.save("inf.npy", with_one(-np.inf)), "NaN or infinite"),
    "three.npy": (lambda: np.save("three.npy", BLOB[None]), f"{TWO} (1, 32, 32); save the map of"),
    "one.npy": (lambda: np.save("one.npy", BLOB[0]), f"{TWO} (32,)"),
    "number.npy": (lambda: np.save("number.npy", 1.0), f"{TWO} ()"),
    "none.npy": (lambda: np.save("none.npy", BLOB[:0]), f"{TWO} (0, 32)"),
    "object.npy": (
        lambda: np.save("object.npy", np.array([[Evil()]], dtype=object), allow_pickle=True),
        "object.npy: can't be read as a map (it holds no plain array of numbers)",
    ),
    "pickle.npy": (lambda: dump("pickle.npy", Evil()), "it holds no plain array of numbers"),
    "string.npy": (lambda: np.save("string.npy", BLOB.astype("U9")), "this holds <U9"),
    "complex.npy": (lambda: np.save("complex.npy", BLOB + 1j), "this holds complex128"),
    "date.npy": (lambda: np.save("date.npy", BLOB.astype("M8[s]")), "this holds datetime64"),
    "zero.npy": (lambda: make("zero.npy", b""), "can't be read as a map"),
    "zero.npz": (lambda: make("zero.npz", b""), "can't be read as a map"),
    "zero.png": (lambda: make("zero.png", b""), "zero.png: the file is empty"),
    "text.npy": (lambda: make("text.npy", b"text"), "can't be read as a map"),
    "cut.npy": (lambda: truncated("npy"), "can't be read as a map"),
    "cut.npz": (lambda: truncated("npz"), "can't be read as a map"),
    "two.npz": (lambda: np.savez("two.npz", a=BLOB, b=BLOB), "holds one array, this has 2: a, b"),
    "no.npz": (lambda: np.savez("no.npz"), "holds one array, this has 0; save one map"),
    "bomb.npy": (bomb, "bomb.npy: is too large (1000000 x 1000000 values"),
    "colour.png": (coloured, "colour.png: is a coloured picture; a map's picture is grey"),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps(f, name):
    create, message = MAPS[name]
    create()
    assert message in complaint("tft", CHELSEA, "--map", name)


OPTIONS = {
    "--target plumm": "unknown class 'plumm'; nearest: plum",
    "--target 3": "class 3 is out of range: the classes are 0..2",
    "--target -1": "class -1 is out of range",
    "--target": "unknown class ''",
    "--top-k 4": "--top-k 4: small has 3 classes",
    "--device cuda:99": "device 'cuda:99' can't be used here",
    "--classes gone.txt": "gone.txt: can't be read as class names",
    "--out file": "file: can't write there (File exists); give another --out",
    "--out file/below": "file/below: can't write there (Not a directory); give another --out",
    "--out /proc/below": "/proc/below: can't write there",
}
# Wrong words are wrong usage: exit code 2.
WORDS = {
    "--cam grad-kam": "unknown method 'grad-kam'; nearest: gradcam, xgradcam",
    "--cam": "unknown method ''; nearest: ",
    "--save nonsense": "unknown output 'nonsense' in --save; there are overlay, figure, map, mask",
    "--save overlay,nonsense": "unknown output 'nonsense'",
    "--masking hard": "'hard' is not one of 'binary', 'soft'",
    "--fill white": "'white' is not one of 'mean', 'black', 'blur'",
    "--threshold-mode rank": "'rank' is not one of 'value', 'percentile'",
    "--device nonsense": "unknown device 'nonsense'; there are auto, cpu, cuda, cuda:N and mps",
    "--device meta": "unknown device 'meta'",
    "--device": "unknown device ''",
    "--search slow": "'slow' is not one of 'exact', 'fast'",
    "--engine torsh": "'torsh' is not one of 'auto', 'torch', 'compile', 'onnxruntime'",
    "--precision fp8": "'fp8' is not one of 'no', 'bf16', 'fp16'",
    "--save": "no output in --save; there are overlay, figure, map, mask, or none alone",
    "--save ,": "no output in --save",
    "--save none,map": "unknown output 'none'",
    "--layer": "a layer has a name; leave --layer out for the default one",
}
# So are options that exclude each other.
TOGETHER = {
    "--top-k 2 --target plum": "--target, --target-fn and --top-k exclude each other",
    "--top-k 2 --target-fn f.py:f": "--target, --target-fn and --top-k exclude each other",
    "--threshold 0.5 --tft": "--threshold, --mute and --tft exclude each other",
    "--threshold 0.5 --mute 50": "--threshold, --mute and --tft exclude each other",
    "--contrast plum --target-fn f.py:f": "--contrast and --target-fn exclude each other",
    "--precision bf16 --target-fn f.py:f": "--target-fn runs in full precision",
    "--fuse max": "--fuse max takes the maps of two layers or more: repeat --layer",
}
# So are numbers out of range.
NUMBERS = {
    "explain a.png --mute 101": "'--mute': the share must lie in [0, 100] percent, got 101",
    "explain a.png --mute -1": "'--mute': the share must lie in [0, 100] percent, got -1",
    "explain a.png --mute nan": "'--mute': the share must lie in [0, 100] percent, got nan",
    "explain a.png --threshold 1.5": "'--threshold': the threshold must lie in [0, 1], got 1.5",
    "explain a.png --threshold nan": "'--threshold': the threshold must lie in [0, 1], got nan",
    "explain a.png --top-k 0": "'--top-k': the number of classes must be 1 or more, got 0",
    "gen-masks . --limit 0": "'--limit': the number of images must be 1 or more, got 0",
    "gen-masks . --workers -1": "'--workers': the number of workers must be 0 or more, got -1",
    "evaluate --batch-size 0": "'--batch-size': the batch size must be 1 or more, got 0",
    "finetune --lam -1": "'--lam': lambda must be 0 or more, got -1",
    "finetune --consistency inf": "'--consistency': consistency must be 0 or more, got inf",
    "finetune --lr -1": "'--lr': the learning rate must be above 0, got -1",
    "finetune --lr 0": "'--lr': the learning rate must be above 0, got 0",
    "finetune --held-out 2": "'--held-out': the held-out share must lie in [0, 1), got 2",
    "finetune --held-out 1": "'--held-out': the held-out share must lie in [0, 1), got 1",
    "finetune --blend 0": "'--blend': the blend must lie in (0, 1], got 0",
    "finetune --epochs 0": "'--epochs': the number of epochs must be 1 or more, got 0",
    "finetune --batch-size 0": "'--batch-size': the batch size must be 1 or more, got 0",
    "finetune --patience -1": "'--patience': the patience must be 0 or more, got -1",
    "finetune --seed -1": "'--seed': the seed must be 0 or more, got -1",
    "finetune --layer x --layer=": "'--layer': a layer has a name",
}
WRITE = "write 0:1:0.1 or 0,0.2,0.5"
THRESHOLDS = {
    "": "can't be read",
    "a": "can't be read",
    "0:1": "can't be read",
    "0:1:0.1:2": "can't be read",
    "0,,1": "can't be read",
    "0;1": "can't be read",
    "nan": "must lie in [0, 1]",
    "inf": "must lie in [0, 1]",
    "0,2": "must lie in [0, 1]",
    "-0.1,0.5": "must lie in [0, 1]",
    "0,nan": "must lie in [0, 1]",
    "0.5,0.2": "must increase",
    "0,0": "must increase",
    "0:1:0": "must increase within [0, 1]",
    "0:1:-0.1": "must increase within [0, 1]",
    "0:1:nan": "must increase within [0, 1]",
    "1:0:0.1": "must increase within [0, 1]",
    "0:2:0.1": "must increase within [0, 1]",
    "nan:1:0.1": "must increase within [0, 1]",
    "0:1:1e-9": "the step is below 0.0001",
}


@pytest.mark.parametrize("options", WORDS)
def test_wrong_words_are_usage_errors(f, options):
    before = leftovers(Path())
    arguments = options.split() if " " in options else [options, ""]
    said = usage_error(aft("explain", CHELSEA, *arguments))
    assert said.startswith("Error Invalid value for '--") and WORDS[options] in said
    assert leftovers(Path()) == before


@pytest.mark.parametrize("options", TOGETHER)
def test_options_that_exclude_each_other_are_usage_errors(f, options):
    before = leftovers(Path())
    said = usage_error(aft("explain", CHELSEA, *options.split()))
    assert said.startswith(f"Error {TOGETHER[options]}")
    assert leftovers(Path()) == before


@pytest.mark.parametrize("command", NUMBERS)
def test_numbers_out_of_range_are_usage_errors_that_name_the_range(command):
    before = leftovers(Path())
    said = usage_error(aft(*command.split()))
    assert said.startswith(f"Error Invalid value for {NUMBERS[command]}")
    assert leftovers(Path()) == before


@pytest.mark.parametrize("options", OPTIONS)
def test_options(f, options):
    make("file", b"not a folder")
    # An option without a value here gets an empty one.
    arguments = options.split() if " " in options else [options, ""]
    if options.startswith("--out /proc") and not Path("/proc").is_dir():
        pytest.skip("needs /proc")
    if options == "--device cuda:99" and torch.cuda.device_count() > 99:
        pytest.skip("has too many of them")
    assert OPTIONS[options] in complaint("explain", CHELSEA, *arguments)
    assert Path("file").read_bytes() == b"not a folder"


@pytest.mark.parametrize("text", THRESHOLDS)
@pytest.mark.parametrize("command", ["explain", "tft"])
def test_thresholds(f, command, text):
    message = usage_error(aft(command, CHELSEA, f"--thresholds={text}"))
    assert message.startswith(f"Error Invalid value for '--thresholds': thresholds {text!r}")
    assert THRESHOLDS[text] in message
    assert WRITE in message


MODELS = {
    "resnet5": ["resnet50, ", "timm:resnet50"],
    "efficientnet_lite": ["nearest: efficientnet_lite0"],
    "timm:resnet5": ["nearest: timm:resnet50"],
    "timm:": ["unknown model 'timm:'; nearest: timm:"],
    "": ["unknown model ''; nearest: efficientnet_lite0"],
    "fcn_resnet50": ["unknown model 'fcn_resnet50'"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    message = complaint("explain", CHELSEA, "--model", name)
    assert all(part in message for part in MODELS[name])


def test_weights_that_can_not_be_had(monkeypatch):
    def unreachable(url, *_, progress, **__):
        print(f'Downloading: "{url}"')
        assert not progress
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    result = aft("explain", CHELSEA, "--model", "squeezenet1_1", "--json")
    assert (result.code, result.out) == (1, "")
    _, line = result.err.splitlines()
    assert line.startswith(
        "aft: the published weights of squeezenet1_1 can't be loaded (<urlopen error no network>); "
        "works offline: --model efficientnet_lite0"
    )


LAYERS = {
    "conv_hea": "unknown layer 'conv_hea'; nearest: conv_head",
    "classifier": "layer 'classifier' can't be used: its output has shape (N, 1000)",
    "conv_head+": "unknown layer ''",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    assert LAYERS[name] in complaint("explain", CHELSEA, "--layer", name)


def test_a_method_that_does_not_fit():
    message = complaint("explain", CHELSEA, "--cam", "cam", "--layer", "blocks.5")
    assert "cam needs a head of global average pooling" in message
    assert "use gradcam or layercam" in message


def test_an_ambiguous_class_names_the_indices(monkeypatch, lite0):
    monkeypatch.setattr("aftcli.models.load.load_classifier", lambda *_, **__: lite0)
    message = complaint("explain", CHELSEA, "--target", "crane")
    assert "class 'crane' is ambiguous, give the index: 134: crane; 517: crane" in message
    message = complaint("explain", CHELSEA, "--target", "egyptien cat")
    assert "nearest: Egyptian cat" in message


@pytest.fixture(scope="module")
def weights(lite0):
    """A state dict of the embedded model's architecture."""
    import timm

    return timm.create_model("tf_efficientnet_lite0", num_classes=4).state_dict()


def save(name):
    return lambda weights: torch.save(weights, name)


def changed(name, key, change):
    return lambda weights: torch.save({**weights, key: change(weights[key])}, name)


def wrapped(name, thing):
    return lambda weights: torch.save({"state_dict": weights, "other": thing}, name)


def halved(name):
    def create(weights):
        torch.save(weights, name)
        make(name, cut(0.5, Path(name).read_bytes()))

    return create


def other_model(weights):
    from torchvision.models import squeezenet1_1

    torch.save(squeezenet1_1().state_dict(), "other.pth")


def halved_safetensors(weights):
    from safetensors.torch import save_file

    save_file(weights, "whole.safetensors")
    make("cut.safetensors", cut(0.5, Path("whole.safetensors").read_bytes()))


UNREADABLE = "can't be read as a checkpoint (it is damaged, or holds more than tensors); give a"
MORE = "can't be read as a checkpoint (it holds more than tensors: {}); give a"
CODE = MORE.format(f"{os.mkdir.__module__}.mkdir")
NO_STATE = "holds no state dict; save model.state_dict()"
CHECKPOINTS = {
    "gone.pth": (lambda _: None, "gone.pth: there is no such checkpoint file"),
    "folder.pth": (lambda _: Path("folder.pth").mkdir(), "there is no such checkpoint file"),
    "": (lambda _: None, "there is no such checkpoint file"),
    "zero.pth": (lambda _: make("zero.pth", b""), f"zero.pth: {UNREADABLE}"),
    "zero.safetensors": (lambda _: make("zero.safetensors", b""), UNREADABLE),
    "text.pth": (lambda _: make("text.pth", b"text"), UNREADABLE),
    "text.safetensors": (lambda _: make("text.safetensors", b"text" * 9), UNREADABLE),
    "cut.pth": (halved("cut.pth"), UNREADABLE),
    "cut.safetensors": (halved_safetensors, UNREADABLE),
    "evil.pth": (lambda _: torch.save(Evil(), "evil.pth"), CODE),
    "pickle.pth": (lambda _: dump("pickle.pth", Evil()), UNREADABLE),
    "pickle.safetensors": (lambda _: dump("pickle.safetensors", Evil()), UNREADABLE),
    "inside.pth": (wrapped("inside.pth", Evil()), CODE),
    "arguments.pth": (
        wrapped("arguments.pth", Fraction(1, 2)),
        MORE.format("fractions.Fraction"),
    ),
    "model.pth": (
        lambda _: torch.save(torch.nn.Linear(2, 2), "model.pth"),
        MORE.format("torch.nn.modules.linear.Linear"),
    ),
    "list.pth": (lambda _: torch.save([torch.ones(2)], "list.pth"), NO_STATE),
    "none.pth": (lambda _: torch.save({}, "none.pth"), NO_STATE),
    "numbers.pth": (
        lambda _: torch.save({"a": 1}, "numbers.pth"),
        "entries that are not dense tensor",
    ),
    "sparse.pth": (
        changed("sparse.pth", "classifier.weight", torch.Tensor.to_sparse),
        "entries that are not dense tensors",
    ),
    "nan.pth": (
        changed(
            "nan.pth", "bn1.bias", lambda value: value.index_fill(0, torch.tensor([3]), np.nan)
        ),
        "nan.pth: bn1.bias holds NaN or infinite weights",
    ),
    "large.pth": (
        changed("large.pth", "bn2.bias", lambda value: value.double() + 1e300),
        "large.pth: bn2.bias holds NaN or infinite weights",
    ),
    "other.pth": (other_model, "is not a checkpoint of efficientnet_lite0: 247 weights missing"),
    "scalar.pth": (
        changed("scalar.pth", "classifier.bias", lambda value: value[0]),
        "2 of another shape (first: classifier.weight); pass the --model",
    ),
    "no-class.pth": (
        changed("no-class.pth", "classifier.bias", lambda value: value[:0]),
        "2 of another shape (first: classifier.weight)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(weights, name):
    create, message = CHECKPOINTS[name]
    create(weights)
    assert message in complaint("explain", CHELSEA, "--checkpoint", name)


CLASS_FILES = {
    "three.txt": ("a\nb\nc\n", "3 class names for a model with 4 classes"),
    "five.txt": ("a\nb\nc\nd\ne\n", "5 class names for a model with 4 classes"),
    "empty.txt": ("", "empty.txt: holds no class names; write one class name a line"),
    "blank.txt": (" \n\n", "blank.txt: holds no class names"),
    "gap.txt": ("a\n\nb\nc\n", "gap.txt: holds an empty line, number 2"),
    "latin.txt": ("b\xe4r\n", "latin.txt: can't be read as class names, one a line in UTF-8"),
}


@pytest.mark.parametrize("name", CLASS_FILES)
def test_class_files(weights, name):
    text, message = CLASS_FILES[name]
    make(name, text.encode("latin-1"))
    torch.save(weights, "four.pth")
    complained = complaint("explain", CHELSEA, "--checkpoint", "four.pth", "--classes", name)
    assert message in complained


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
def test_a_checkpoint_with_classes_of_its_own_works(weights, wrapper):
    """The counterpart of the above: they fail for what is wrong with them alone."""
    saved = {f"module.{key}": value.half() for key, value in weights.items()}
    torch.save({wrapper: saved, "epoch": 3} if wrapper else saved, "four.pth")
    make("four.txt", "\ufeffa\r\nb\r\nc\r\nd\r\n".encode())
    options = ("--checkpoint", "four.pth", "--classes", "four.txt", "--target", "A")
    result = aft("explain", CHELSEA, *options)
    said = "aft: four.pth: took module. off the names of its weights\n"
    assert (result.code, without_chance(result.err)) == (0, said)
    [written] = leftovers(Path("aft-out"))
    assert re.fullmatch(r"chelsea-a-layercam-four-four-[0-9a-f]{6}-overlay\.png", written)
