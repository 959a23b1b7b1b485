"""torchvision's own data sets, of which small ones are written as it keeps them."""

import inspect
import os
import shutil
import socket
import struct
import urllib.request
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from aftcli import AftError, MaskStore, read_image
from aftcli.core.classes import Classes
from aftcli.data.parts import Reading
from aftcli.data.sets import data_name, open_data_set, validation_of
from aftcli.formats import builtin as module
from aftcli.formats.builtin import SETS
from aftcli.networks.sources import imagenet_classes
from tests.helpers.command import aft, usage_error
from tests.helpers.stored import generate

DIGITS = Classes(("0 - zero", "1 - one", "2 - two"))


def opened(path, split=None, classes=DIGITS, **options):
    return open_data_set(module.Path(path), split, classes, **options)


@pytest.fixture(autouse=True)
def forgotten():
    module._load.cache_clear()
    module._last_change.cache_clear()


@pytest.fixture
def mnist(tmp_path):
    """MNIST as it lies after its download, with few digits."""
    raw, rng = tmp_path / "data/MNIST/raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for stem, labels in (("train", [2, 0, 1, 2, 0, 1]), ("t10k", [1, 0, 2])):
        pixels = rng.integers(0, 256, (len(labels), 28, 28), np.uint8)
        head = struct.pack(">IIII", 0x803, *pixels.shape)
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = struct.pack(">II", 0x801, len(labels))
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(head + bytes(labels))
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def few_names(monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "classes", list(DIGITS.names))


def test_pictures_are_those_of_torchvision(mnist):
    data = opened(f"torchvision:MNIST={mnist}")
    whole = datasets.MNIST(mnist, train=True)
    assert (data.kind, data.split, data.mapped) == ("torchvision", "train", True)
    assert [s.name for s in data.samples] == [f"train/{i}" for i in range(6)]
    assert [s.label for s in data.samples] == whole.targets.tolist()
    for i, picture in enumerate(data.pictures()):
        image, _ = whole[i]
        assert read_image(picture).tobytes() == image.convert("RGB").tobytes()
    assert data_name(data.root, data.kind, data.split) == "MNIST"


def test_without_a_val_split_the_one_to_test_on_is_taken_and_said(mnist):
    data = opened(f"torchvision:MNIST={mnist}")
    val = validation_of(data, DIGITS).data_set
    assert (val.split, len(val.samples)) == ("test", 3)
    assert val.notes == ("torchvision:MNIST: has no split val; took test",)
    assert opened(f"torchvision:MNIST={mnist}", "test").notes == ()
    with pytest.raises(AftError, match="has no split 'fold'; there are train, test"):
        opened(f"torchvision:MNIST={mnist}", "fold")


def test_a_store_finds_its_pictures_again(mnist, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generate("torchvision:MNIST=data", tmp_path / "run", ("gradcam",), workers=2)
    with MaskStore(tmp_path / "run/masks/small-gradcam.h5") as store:
        made = store.settings
        assert (made["data_set"], made["data_kind"]) == (str(mnist / "MNIST"), "torchvision")
        again = opened(made["data_set"], "train", reading=Reading("torchvision"))
        assert store.changed(again, range(6)) == []
        images = mnist / "MNIST/raw/train-images-idx3-ubyte"
        content = bytearray(images.read_bytes())
        content[16 + 28 * 28] ^= 255
        images.write_bytes(content)
        os.utime(images, ns=(10**18, 2 * 10**18))
        module._load.cache_clear()
        module._last_change.cache_clear()
        assert store.changed(again, range(6)) == ["train/1"]
    assert not again.format.is_there(tmp_path / "gone/MNIST")


@pytest.mark.parametrize("name", SETS)
def test_every_name_and_split_is_one_of_torchvisions(name, tmp_path):
    taken = inspect.signature(getattr(datasets, name).__init__).parameters
    assert "download" in taken
    for split, options in SETS[name].items():
        assert set(options) <= set(taken) and module.split_kind(split) == split
        with pytest.raises(AftError, match=f"{name} of torchvision can't be read there") as error:
            opened(f"torchvision:{name}={tmp_path}", split)
        assert f"datasets.{name}({str(tmp_path)!r}, download=True)" in str(error.value)
        assert "pass --download" in str(error.value)
        assert "Unknown value" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_wnids_are_the_classes_where_there_are_such(tmp_path):
    wnids = ("n01440764", "n02102040")
    for wnid in wnids:
        folder = tmp_path / "imagenette2/train" / wnid
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 30), "grey").save(folder / "0.JPEG")
    data = opened(f"torchvision:Imagenette={tmp_path}", classes=imagenet_classes())
    assert data.mapped and [s.label for s in data.samples] == [0, 217]


@pytest.mark.parametrize("column", ["targets", "_samples", "labels", "none", "wrong"])
def test_labels_are_those_of_the_pictures(column):
    class Whole:
        own = (2, 0, 1, 1, 0, 2)
        read = 0

        def __len__(self):
            return len(self.own)

        def __getitem__(self, i):
            self.read += 1
            return None, self.own[i]

    whole = Whole()
    if column == "_samples":
        whole._samples = [("path", label) for label in whole.own]
    elif column == "wrong":
        whole.targets = (*whole.own[:2], 0, *whole.own[3:])
    elif column != "none":
        setattr(whole, column, np.array(whole.own))
    assert module._numbers(whole) == list(whole.own)
    assert whole.read == (9 if column in ("none", "wrong") else 3)


def test_a_picture_that_torchvision_can_not_read_is_left_out(mnist, tmp_path, monkeypatch):
    real = datasets.MNIST.__getitem__

    def reading(self, i):
        if i == 3:
            raise ValueError("gone")
        return real(self, i)

    monkeypatch.setattr(datasets.MNIST, "__getitem__", reading)
    generate(f"torchvision:MNIST={mnist}", tmp_path / "run", ("gradcam",))
    with MaskStore(tmp_path / "run/masks/small-gradcam.h5") as store:
        (broken,) = store.broken
        assert broken.path == "train/3" and "torchvision can't read it: gone" in broken.reason


def test_a_name_is_said_with_its_folder(tmp_path):
    for name, said in (
        ("CIFAR11=.", "torchvision has no such data set; nearest: CIFAR10"),
        ("CIFAR10", "say in which folder it lies: torchvision:CIFAR10=DIR"),
        ("MNIST=gone", "gone: there is no such folder"),
    ):
        found = aft("gen-masks", f"torchvision:{name}", "--run", tmp_path / "run", "--quiet")
        assert found.code == 1 and said in found.err


def test_a_download_is_torchvisions_and_of_all_splits(mnist, tmp_path, monkeypatch, capsys):
    asked = []

    def fetched(url, download_root, filename=None, md5=None, **options):
        asked.append(filename)
        assert socket.getdefaulttimeout() == module.PATIENCE
        print("downloading")
        name = filename.removesuffix(".gz")
        shutil.copyfile(mnist / "MNIST/raw" / name, os.path.join(download_root, name))

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fetched)
    place = module.Path(f"torchvision:MNIST={tmp_path / 'new/place'}")
    module.download(place)
    assert {name.split("-")[0] for name in asked} == {"train", "t10k"} and len(asked) == 4
    found = capsys.readouterr()
    assert found.out == "" and "downloading" in found.err
    assert len(opened(str(place)).samples) == 6 and len(opened(str(place), "test").samples) == 3
    assert socket.getdefaulttimeout() is None
    module.download(place, quiet=True)
    assert len(asked) == 4 and capsys.readouterr() == ("", "")


def test_without_a_network_a_download_is_an_error_of_ours(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise URLError(OSError(-3, "Temporary failure in name resolution"))

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    for name in SETS:
        with pytest.raises(AftError, match=f"{name} of torchvision can't be downloaded") as error:
            module.download(module.Path(f"torchvision:{name}={tmp_path / name}"), quiet=True)
        assert "look at the network" in str(error.value)
    with pytest.raises(AftError, match="--download takes torchvision:NAME=DIR"):
        module.download(tmp_path)


def test_commands_download_only_where_that_is_asked_for(mnist, tmp_path, monkeypatch):
    wanted = []

    def refuse(path, quiet=False):
        wanted.append(str(path))
        raise AftError("no network")

    monkeypatch.setattr(module, "download", refuse)
    given = f"torchvision:MNIST={tmp_path / 'new'}"
    for command in ("gen-masks", "finetune", "evaluate"):
        done = aft(command, given, "--run", tmp_path / "run", "--quiet")
        assert (done.code, done.err) == (1, f"aft: {tmp_path / 'new'}: there is no such folder\n")
        assert wanted == []
        done = aft(command, given, "--run", tmp_path / "run", "--download", "--quiet")
        assert (done.code, done.err) == (1, "aft: no network\n")
        assert wanted.pop() == given
        said = usage_error(aft(command, tmp_path, "--download"))
        assert said.endswith("--download has no effect without torchvision:NAME=DIR")
