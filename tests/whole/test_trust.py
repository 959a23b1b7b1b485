"""Files of strangers: nothing in them runs, reads or writes elsewhere, or asks for the world."""

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import tarfile
import zipfile

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from aftcli import AftError, MaskStore, load_classifier
from aftcli.aft.jobs import mask_job
from aftcli.cli.images import find_images
from aftcli.data.objects import Objects
from aftcli.data.sets import open_data_set
from aftcli.files import durable, inside, tensors_hash
from aftcli.locks import locked
from aftcli.masks.hdf5 import SEAL, Rows, fold_rows, read_settings, seal_of
from aftcli.networks.weights import read_state_dict
from tests.helpers.command import aft
from tests.helpers.stored import generate, make_images, small_float
from tests.helpers.trained import make_colours, masks_of


class Evil:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("EXECUTED",)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to be in; no code has made a folder in it at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AFT_FOLLOW_LINKS", raising=False)
    yield tmp_path
    assert not (tmp_path / "EXECUTED").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a store, and the folder that it was made in."""
    root = tmp_path_factory.mktemp("whole")
    make_images(root / "fruit")
    generate(root / "fruit", root / "run", ("gradcam",))
    return root


@pytest.fixture
def store(whole, tmp_path):
    """A copy of the store that may be spoiled."""
    path = tmp_path / "copy.h5"
    path.write_bytes((whole / "run/masks/small-gradcam.h5").read_bytes())
    return path


def sealed_again(path):
    """Seal a file as a stranger who knows the format would after a change."""
    with h5py.File(path, "r+") as file:
        rows = Rows(*(file[name][:] for name in Rows._fields))
        running = hashlib.sha256()
        fold_rows(running, rows)
        file.attrs["digest"] = running.hexdigest()
        file.attrs[SEAL] = seal_of(read_settings(file))


def replaced(name, **made):
    def change(file):
        del file[name]
        file.create_dataset(name, **made)

    return change


def linked(name, link):
    def change(file):
        del file[name]
        file[name] = link

    return change


def virtual(file):
    layout = h5py.VirtualLayout(shape=(15,), dtype="f4")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "tau", shape=(15,))
    del file["tau"]
    file.create_virtual_dataset("tau", layout)


def packed(file):
    del file["tau"]
    file.create_dataset("tau", data=np.zeros(15, np.float32), chunks=(15,), compression="lzf")


def cell(name, value):
    def change(file):
        file[name][3] = value

    return change


def setting(name, value):
    def change(file):
        del file.attrs[name]
        file.attrs[name] = value

    return change


def prepared(**values):
    def change(file):
        old = json.loads(file.attrs["preprocessing"])
        file.attrs["preprocessing"] = json.dumps({**old, **values})

    return change


HOSTILE = {
    "a link to another file": linked("tau", h5py.ExternalLink("/elsewhere.h5", "tau")),
    "a link within": linked("tau", h5py.SoftLink("/rpi")),
    "a virtual dataset": virtual,
    "numbers in another file": replaced(
        "tau", shape=(15,), dtype="f4", external=[("/etc/hostname", 0, 60)]
    ),
    "a filter that is loaded": packed,
    "objects": replaced("tau", shape=(15,), dtype=h5py.special_dtype(vlen=np.float32)),
    "references": replaced("tau", shape=(15,), dtype=h5py.ref_dtype),
    "a group": lambda file: (file.__delitem__("tau"), file.create_group("tau")),
    "terabytes": replaced("attribution", shape=(15, 10**6, 10**6), dtype="f2", chunks=(1, 64, 64)),
    "too few": replaced("tau", data=np.zeros(14, np.float32)),
    "another type": replaced("tau", data=np.zeros(15)),
    "something more": lambda file: file.create_dataset("more", data=[1]),
    "a list of settings": setting("model", ["small", "other"]),
    "no text": setting("layer", 3),
    "a label that is no class": cell("label", 2**30),
    "a negative class": cell("class_index", -1),
    "tau that is no number": cell("tau", np.nan),
    "tau beyond 1": cell("tau", 1.5),
    "a map that is no number": cell("attribution", np.nan),
    "thresholds beyond 1": setting("thresholds", "[2.0, 3.0]"),
    "thresholds that are no numbers": setting("thresholds", '["a", "b"]'),
    "deep settings": setting("classes", "[" * 10000),
    "a masking that is unknown": setting("masking", "hard"),
    "inputs of gigabytes": prepared(size=[10**6, 10**6]),
    "inputs of no size": prepared(size=[0, 0]),
    "no mean": prepared(mean=[]),
    "no spread": prepared(std=[0.0, 1.0, 1.0]),
    "an unknown interpolation": prepared(interpolation="magic"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_store_is_refused_in_one_line(store, what):
    np.zeros(15, np.float32).tofile("elsewhere.bin")
    with h5py.File("elsewhere.h5", "w") as file:
        file["tau"] = np.zeros(15, np.float32)
    with h5py.File(store, "r+") as file:
        HOSTILE[what](file)
    try:
        sealed_again(store)
    except Exception:  # noqa: BLE001 - what can't be read can't be sealed
        pass
    result = aft("gen-masks", "--show", store)
    assert (result.code, result.out) == (1, ""), result
    (line,) = result.err.splitlines()
    assert line.startswith(f"aft: {store}: ") and "fault of aft" not in line


def test_the_copy_itself_is_read(store):
    sealed_again(store)
    with MaskStore(store) as found:
        found.verify()
    assert aft("gen-masks", "--show", store).code in (0, None)


@pytest.mark.parametrize("name", ["masking", "thresholds", "data_set"])
def test_a_setting_that_was_changed_is_noticed(store, name):
    with h5py.File(store, "r+") as file:
        file.attrs[name] = {"masking": "soft", "thresholds": "[0.5]", "data_set": "/tmp"}[name]
    with pytest.raises(AftError, match="its attributes are not what was written"):
        MaskStore(store)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "apple/../../secret.png"])
def test_names_in_a_store_do_not_leave_the_data_set(tmp_path, name):
    images = make_colours(tmp_path / "colours")
    masks_of(images, tmp_path / "run").close()
    Image.new("RGB", (40, 52)).save(images / "secret.png")
    path = tmp_path / "run/masks/small-gradcam.h5"
    with h5py.File(path, "r+") as file:
        old = file["path"][:]
        del file["path"]
        names = [name.encode(), *old[1:]]
        file["path"] = np.array(names, f"S{max(map(len, names))}")
    sealed_again(path)
    job = mask_job(MaskStore(path), small_float())
    with pytest.raises(AftError, match="leads out of"):
        job.data_set.picture(0)
    job.data_set.picture(1)


def test_links_out_of_a_data_set_are_not_followed(tmp_path, monkeypatch):
    images = make_images(tmp_path / "fruit")
    Image.new("RGB", (40, 52)).save("secret.png")
    (images / "apple/within.png").symlink_to("0.png")
    (images / "apple/out.png").symlink_to(tmp_path / "secret.png")
    shutil.rmtree(images / "plum")
    (images / "plum").symlink_to(tmp_path / "elsewhere")
    make_images(tmp_path / "elsewhere", each=1)
    (tmp_path / "elsewhere/apple/0.png").rename(tmp_path / "elsewhere/0.png")
    generate(images, "run", ("gradcam",))
    with MaskStore("run/masks/small-gradcam.h5") as store:
        broken = {b.path: b.reason for b in store.broken}
        assert set(broken) == {"apple/out.png", "plum/0.png", *under(tmp_path / "elsewhere")}
        assert "set AFT_FOLLOW_LINKS=1 if you trust the links" in broken["apple/out.png"]
        assert "apple/within.png" in {record.path for record in store}
    monkeypatch.setenv("AFT_FOLLOW_LINKS", "1")
    generate(images, "followed", ("gradcam",))
    with MaskStore("followed/masks/small-gradcam.h5") as store:
        assert not store.broken


def under(folder):
    return {f"plum/{p.relative_to(folder)}" for p in folder.rglob("*.png")}


def test_a_split_that_is_a_link_out_is_not_followed(tmp_path, monkeypatch):
    make_colours(tmp_path / "elsewhere")
    (tmp_path / "named").mkdir()
    (tmp_path / "named/train").symlink_to(tmp_path / "elsewhere/train")
    data = open_data_set(tmp_path / "named", None, small_float().classes)
    with pytest.raises(AftError, match=r"leads out of .*named; set AFT_FOLLOW_LINKS=1"):
        data.picture(0)
    monkeypatch.setenv("AFT_FOLLOW_LINKS", "1")
    assert data.picture(0).path.is_file()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.delenv("AFT_FOLLOW_LINKS")
    # What the user names may be a link itself.
    assert open_data_set(tmp_path / "link", None, small_float().classes).picture(0).path.is_file()


def test_annotations_that_are_links_out_are_not_read(tmp_path, lite0):
    root = tmp_path / "VOC2012"
    for below in ("ImageSets/Segmentation", "JPEGImages", "Annotations", "SegmentationClass"):
        (root / below).mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("a\n")
    Image.new("RGB", (40, 52)).save(root / "JPEGImages/a.jpg")
    Image.new("L", (40, 52), 3).save(tmp_path / "secret.png")
    (root / "SegmentationClass/a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(AftError, match=r"a\.png: is a link that leads out of"):
        open_data_set(tmp_path / "VOC2012", None, lite0.classes)
    # Named by the folder above, the link stays within.
    data = open_data_set(tmp_path, None, lite0.classes)
    assert data.areas(0)[2] == 1
    boxed = make_colours(tmp_path / "boxed")
    (tmp_path / "boxes.csv").write_text("file,x1,y1,x2,y2\n")
    (boxed / "val_boxes.csv").symlink_to(tmp_path / "boxes.csv")
    with pytest.raises(AftError, match=r"val_boxes\.csv: is a link that leads out of"):
        Objects(open_data_set(boxed, "val", small_float().classes), lite0.preprocessing)


def test_a_folder_to_explain_gives_no_link_out(tmp_path):
    make_images(tmp_path / "fruit", each=1)
    Image.new("RGB", (40, 52)).save(tmp_path / "secret.png")
    (tmp_path / "fruit/apple/out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "fruit/apple/in.png").symlink_to("0.png")
    found, problems = find_images([str(tmp_path / "fruit")])
    names = {path.relative_to(tmp_path / "fruit").as_posix() for path in found}
    assert names == {"apple/0.png", "apple/in.png", "pear/0.png", "plum/0.png"}
    assert len(problems) == 1 and "out.png: is a link that leads out of" in problems[0]
    # What the user names is read, link or not.
    link = str(tmp_path / "fruit/apple/out.png")
    assert find_images([link]) == ([tmp_path / "fruit/apple/out.png"], [])


@pytest.mark.parametrize("name", ["/etc/hostname", "..", "a/../../b", "../fruit/a"])
def test_names_that_lead_out_are_refused_even_where_links_are_trusted(tmp_path, monkeypatch, name):
    monkeypatch.setenv("AFT_FOLLOW_LINKS", "1")
    with pytest.raises(AftError, match="leads out"):
        inside(tmp_path / "fruit", name)
    assert inside(tmp_path, "..a/b..") == tmp_path / "..a/b.."


def test_no_link_is_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    (tmp_path / f".{os.getpid()}-new").symlink_to(victim)
    with durable(tmp_path / "new") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "new").read_text() == "new"
    (tmp_path / "final").symlink_to(victim)
    with durable(tmp_path / "final") as temporary:
        temporary.write_text("new")
    assert not (tmp_path / "final").is_symlink()
    (tmp_path / ".locked.lock").symlink_to(tmp_path / "made")
    with pytest.raises((AftError, OSError)), locked(tmp_path / "locked.h5"):
        pass
    assert victim.read_text() == "as it was" and not (tmp_path / "made").exists()


def legacy_tar(path):
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(Evil(), protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


class Scripted(torch.nn.Module):
    """A program of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def bomb(path):
    torch.save({"weight": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data if "data/" not in name else bytes(2**28))


def member(name):
    def make(path):
        torch.save({"weight": torch.zeros(4)}, path)
        with zipfile.ZipFile(path) as archive:
            entries = {n: archive.read(n) for n in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for n, data in entries.items():
                archive.writestr(n, pickle.dumps(Evil()) if n.endswith(name) else data)

    return make


CHECKPOINTS = {
    "a pickle": lambda p: p.write_bytes(pickle.dumps(Evil())),
    "a pickle of torch's": lambda p: torch.save(Evil(), p),
    "of the old form": lambda p: torch.save(Evil(), p, _use_new_zipfile_serialization=False),
    "of the oldest form": legacy_tar,
    "below tensors": lambda p: torch.save({"state_dict": {"a": torch.ones(1)}, "x": [Evil()]}, p),
    "in the archive": member("data.pkl"),
    "a program": lambda p: torch.jit.script(Scripted()).save(str(p)),
    "a module": lambda p: torch.save(torch.nn.Linear(2, 2), p),
    "packed": bomb,
    "stretched": lambda p: torch.save({"a": torch.ones(1).expand(2**40)}, p),
    "nowhere": lambda p: torch.save({"a": torch.ones(2, device="meta")}, p),
    "sparse": lambda p: torch.save({"a": torch.ones(2, 2).to_sparse()}, p),
    "quantised": lambda p: torch.save(
        {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, p
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("what", CHECKPOINTS)
def test_no_checkpoint_runs_code_or_fills_the_memory(tmp_path, what, suffix):
    path = tmp_path / f"evil.{suffix}"
    CHECKPOINTS[what](path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AftError, match="evil"):
        read_state_dict(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_an_ordinary_checkpoint_is_read(tmp_path):
    saved = {"a": torch.arange(4.0), "b": torch.ones(2, 3).T}
    for form in (True, False):
        torch.save({"state_dict": saved}, tmp_path / "a.pth", _use_new_zipfile_serialization=form)
        read = read_state_dict(tmp_path / "a.pth")
        assert all(torch.equal(read[name], saved[name]) for name in saved)


@pytest.mark.parametrize("count", [10**5, 10**6])
def test_a_state_dict_of_very_many_classes_is_not_built(tmp_path, lite0, count):
    import timm

    weights = timm.create_model("tf_efficientnet_lite0", num_classes=4).state_dict()
    torch.save({**weights, "classifier.bias": torch.zeros(count)}, tmp_path / "many.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AftError, match="is not a checkpoint of efficientnet_lite0"):
        load_classifier(checkpoint=tmp_path / "many.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def carded(tuned, path, change, tensors=None):
    """A tuned checkpoint whose card says something else, with its seal."""
    from safetensors import safe_open

    with safe_open(tuned, "pt") as file:
        card = json.loads(file.metadata()["aft"])["card"]
    change(card)
    text = json.dumps(card, sort_keys=True)
    sealed = {"card": card, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    save_file(tensors or load_file(tuned), path, {"aft": json.dumps(sealed, sort_keys=True)})


CARDS = {
    "a huge model": lambda card: card.update(model="timm:convnext_xxlarge", layer="stages.3"),
    "very many classes": lambda card: card["classes"].update(names=["a"] * 10**6),
    "no classes": lambda card: card["classes"].update(names=[]),
    "classes that are no names": lambda card: card["classes"].update(names=[1, 2]),
    "no layer": lambda card: card.pop("layer"),
    "a model that is no text": lambda card: card.update(model=["lite0"]),
    "a model of a hub": lambda card: card.update(model="timm:hf-hub:someone/model"),
    "a model of the other hub": lambda card: card.update(model="hf:someone/model"),
    "code": lambda card: card.update(model="os:system"),
    "a file of code": lambda card: card.update(model="/tmp/net.py:make"),
    "a model in a folder": lambda card: card.update(model="timm:local-dir:/etc"),
    "an unknown method": lambda card: card.update(cam="magic"),
    "an unknown tuner": lambda card: card.update(tuner="magic"),
    "huge inputs": lambda card: card["preprocessing"].update(size=[10**5, 10**5]),
    "inputs of no kind": lambda card: card["preprocessing"].update(more=1),
    "no preprocessing": lambda card: card.update(preprocessing=None),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", CARDS)
def test_a_hostile_card_is_refused(tuned, tmp_path, what, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError(f"asked the network for {arguments}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    path = tmp_path / "card.safetensors"
    carded(tuned, path, CARDS[what])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AftError):
        load_classifier(checkpoint=path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


@pytest.mark.slow
def test_a_card_with_its_seal_is_read(tuned, tmp_path):
    carded(tuned, tmp_path / "card.safetensors", lambda card: card.update(more="text"))
    load_classifier(checkpoint=tmp_path / "card.safetensors")


@pytest.mark.slow
def test_a_tuned_network_with_weights_that_are_no_numbers(tuned, tmp_path):

    tensors = load_file(tuned)
    name = next(n for n, v in tensors.items() if v.dim() == 4)
    tensors[name][0, 0, 0, 0] = np.nan
    path = tmp_path / "nan.safetensors"
    carded(tuned, path, lambda card: card.update(digest=tensors_hash(tensors)), tensors)
    with pytest.raises(AftError, match="NaN or infinite weights"):
        load_classifier(checkpoint=path)


def test_downloads_are_checked_by_their_hash(monkeypatch):
    asked = {}

    def download(url, *_, check_hash=False, **__):
        asked[url] = check_hash
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    with pytest.raises(AftError, match="published weights"):
        load_classifier("squeezenet1_1")
    import timm.models._builder as builder

    monkeypatch.setattr(builder, "load_state_dict_from_url", download)
    monkeypatch.setattr(builder, "load_state_dict_from_hf", download)
    monkeypatch.setattr("aftcli.networks.sources._go_offline_if_unreachable", lambda: None)
    with pytest.raises(AftError, match="published weights"):
        load_classifier("timm:resnet18")
    assert builder._CHECK_HASH
    (url,) = (url for url in asked if "squeezenet" in str(url))
    assert asked[url]
