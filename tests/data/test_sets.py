"""Class folders and splits: which folder is what, and which class its name means."""

import json
import shutil

import h5py
import pytest
import torch
from PIL import Image

from aftcli import AftError, MaskStore
from aftcli.core.classes import Classes
from aftcli.data.objects import Objects
from aftcli.data.picture import Listed, Marks
from aftcli.data.sets import (
    FORMATS,
    Annotations,
    DataSet,
    Format,
    Sample,
    data_name,
    format_of,
    open_data_set,
    validation_of,
)
from aftcli.masks.settings import store_settings
from aftcli.networks.sources import imagenet_classes
from aftcli.settings import Search
from tests.helpers.command import aft
from tests.helpers.stored import NAMES, generate, make_images, small_float
from tests.helpers.trained import make_colours
from tests.helpers.unreadable import refuse_to_read
from tests.whole.test_trust import sealed_again

FRUIT = Classes(NAMES)


def folders(root, *names, each=1):
    """Folders with a picture or more in each."""
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (4, 4)).save(root / name / f"{i}.png")
    return root


def layout(root, *splits):
    """Splits, each with a folder a class."""
    return folders(root, *(f"{split}/{name}" for split in splits for name in NAMES))


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "val"),
        ("training", "validation"),
        ("Train", "Val"),
        ("TRAIN", "valid"),
        ("Training", "dev"),
    ],
)
@pytest.mark.parametrize("beside", [(), ("test",), ("Testing",)])
def test_the_usual_names_of_splits_are_known_whatever_the_case(tmp_path, train, val, beside):
    root = layout(tmp_path / "data", train, val, *beside)
    for split, wanted in ((None, train), ("train", train), ("val", val), (val, val)):
        data = open_data_set(root, split, FRUIT)
        assert (data.root, data.split, data.classes) == (root / wanted, wanted, NAMES)
        assert [s.name for s in data.samples] == [f"{name}/0.png" for name in NAMES]
    found = validation_of(open_data_set(root, None, FRUIT), FRUIT)
    assert found.data_set.root == root / val and not found.reason
    assert open_data_set(root, None, FRUIT, default="val").split == val


def test_a_split_that_is_missing_or_there_twice_is_named(tmp_path):
    root = layout(tmp_path / "data", "test", "valid")
    with pytest.raises(AftError, match="no split 'train'; there are test, valid; name one by"):
        open_data_set(root, None, FRUIT)
    layout(root, "dev")
    with pytest.raises(AftError, match="several folders for the split 'val'; there are dev, valid"):
        open_data_set(root, "val", FRUIT)
    assert open_data_set(root, "dev", FRUIT).split == "dev"


@pytest.mark.parametrize(
    "names",
    [
        ("part_a", "part_b"),
        ("train2017", "val2017"),
        ("testset", "trainset"),
        ("fold1",),
        ("images_train", "images_val"),
    ],
)
def test_what_looks_like_splits_under_other_names_is_refused(tmp_path, names):
    with pytest.raises(AftError, match=f"look like splits, not like classes .{names[0]}"):
        open_data_set(layout(tmp_path / "data", *names), None, FRUIT)


def test_words_of_splits_are_refused_where_the_classes_are_not_known(tmp_path):
    root = folders(tmp_path / "data", *(f"images_{s}/{c}" for s in ("train", "val") for c in "ab"))
    with pytest.raises(AftError, match="look like splits, not like classes .images_train"):
        open_data_set(root, None, FRUIT)
    # One picture of its own makes a class of a folder with such a word.
    root = folders(tmp_path / "other", "crash_test", "steam_train")
    assert open_data_set(root, None, FRUIT).classes == ("crash_test", "steam_train")


def test_classes_with_folders_of_their_own_are_classes(tmp_path):
    root = folders(tmp_path / "data", *(f"{c}/{y}" for c in NAMES for y in ("2019", "2020")))
    assert [s.label for s in open_data_set(root, None, FRUIT).samples] == [0, 0, 1, 1, 2, 2]


def test_a_class_called_train_is_a_class(tmp_path):
    root = folders(tmp_path / "data", "aeroplane", "boat", "test", "train")
    data = open_data_set(root, None, imagenet_classes())
    assert data.split == "" and data.classes == ("aeroplane", "boat", "test", "train")
    assert any("took test, train as a class" in note for note in data.notes)
    # With folders in it, it may be either: the larger one counts, and is said.
    shutil.rmtree(root / "test")
    shutil.rmtree(root / "train")
    folders(root, "train/steam")
    assert open_data_set(root, None, imagenet_classes()).classes == ("aeroplane", "boat", "train")
    folders(root, "train/diesel", "train/electric")
    data = open_data_set(root, None, imagenet_classes())
    assert data.split == "train" and "took train as a split; aeroplane, boat" in data.notes[0]


@pytest.mark.slow
@pytest.mark.parametrize("stray", [".ipynb_checkpoints", "__MACOSX", "empty"])
def test_hidden_and_empty_folders_are_skipped_and_said(tmp_path, stray):
    root = layout(tmp_path / "data", "train")
    clean = open_data_set(root, None, FRUIT)
    (root / "train" / stray).mkdir()
    if stray != "empty":
        Image.new("RGB", (4, 4)).save(root / "train" / stray / "0.png")
        folders(root, f"train/{NAMES[0]}/{stray}")
        (root / "train" / NAMES[0] / "._0.png").touch()
    for classes in (FRUIT, imagenet_classes()):
        data = open_data_set(root, None, classes)
        assert [s.name for s in data.samples] == [s.name for s in clean.samples]
        assert data.mapped == (classes is FRUIT) and len(set(s.label for s in data.samples)) == 3
        assert stray in " ".join(data.notes)
    assert data.classes == NAMES
    done = aft("gen-masks", root, "--run", tmp_path / "run", "--thresholds", "0.5")
    assert done.code in (0, None) and f"{stray}\n" in done.err


@pytest.mark.parametrize("folder", [".", "train", "train/pear", "train/pear/deep"])
def test_a_folder_that_can_not_be_read_is_refused_by_name(tmp_path, monkeypatch, folder):
    """Without its pictures others would be taken for the data set."""
    make_images(tmp_path / "train", each=2)
    for hidden in ("lost+found", "train/.cache", "train/pear/.thumbs"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "a.png").write_bytes(b"")
        refuse_to_read(monkeypatch, tmp_path / hidden)
    (tmp_path / "train/pear/deep").mkdir()
    assert len(open_data_set(tmp_path, None, Classes(NAMES)).samples) == 6
    refuse_to_read(monkeypatch, tmp_path / folder)
    said = f"^{tmp_path / folder}: can't be read \\(Permission denied\\); make it readable$"
    with pytest.raises(AftError, match=said):
        open_data_set(tmp_path, None, Classes(NAMES))


def test_a_class_folder_that_the_model_does_not_know_is_refused_by_name(tmp_path):
    known = ("n01440764", "n01443537")
    for names, classes in ((NAMES[:2], FRUIT), (known, imagenet_classes())):
        for strange in ("quince", "n99999999"):
            root = folders(tmp_path / f"{names[0]}-{strange}", *names, strange)
            with pytest.raises(AftError, match=f"1 of 3 .* no class of the model: {strange}; to"):
                open_data_set(root, None, classes)
            # As the message says.
            (root / strange).rename(root / f".{strange}")
            data = open_data_set(root, None, classes)
            assert data.mapped and [s.name[:-6] for s in data.samples] == list(names)


def test_a_data_set_of_other_classes_keeps_its_own(tmp_path):
    root = folders(tmp_path / "data", "fig", "lime", "tench")
    for classes in (FRUIT, imagenet_classes()):
        data = open_data_set(root, None, classes)
        assert not data.mapped and data.classes == ("fig", "lime", "tench") and not data.notes


ODD = ["Pepper,_bell___x", "Pepper,_bell___y", "Cat", "cat", " edge ", "a_b", "a b", "2", "10"]


def test_a_network_made_on_a_folder_recognises_that_folder(tmp_path):
    root = folders(tmp_path / "data", *ODD)
    own = open_data_set(root, None, imagenet_classes())
    assert not own.mapped
    classes = Classes(own.classes)
    again = open_data_set(root, None, classes)
    assert again.mapped and again.samples == own.samples
    for index, name in enumerate(own.classes):
        assert classes.name(index) == name and classes.index(name) == index
    for name in ODD[::2]:
        shutil.rmtree(root / name)
    part = open_data_set(root, None, classes)
    assert {s.name.partition("/")[0]: s.label for s in part.samples} == {
        name: own.classes.index(name) for name in ODD[1::2]
    }


def test_other_spellings_of_one_class_are_known_and_of_two_refused(tmp_path):
    root = folders(tmp_path / "data", "APPLE", "blood_orange", "Pear ")
    classes = Classes(("pear", "Blood Orange", "apple"))
    assert [s.label for s in open_data_set(root, None, classes).samples] == [2, 0, 1]
    folders(root, "apple")
    with pytest.raises(AftError, match="no class of the model: APPLE"):
        open_data_set(root, None, classes)


def test_a_number_that_is_a_name_means_the_class_of_this_name():
    classes = Classes(("1", "10", "2"))
    assert [classes.index(name) for name in ("1", "10", "2")] == [0, 1, 2]
    assert classes.index("0") == 0
    with pytest.raises(AftError, match="class 3 is out of range"):
        classes.index("3")


def test_an_unknown_class_names_those_that_contain_the_word_first():
    cats = ("tiger cat", "Persian cat", "Siamese cat", "Egyptian cat")
    with pytest.raises(AftError, match="unknown class 'cat'; nearest: ") as error:
        imagenet_classes().index("cat")
    named = str(error.value).partition("nearest: ")[2].split(", ")
    assert {*cats} <= {*named} and all("cat" in name.split() for name in named)
    with pytest.raises(AftError, match="nearest: plum"):
        FRUIT.index("plumm")


def test_a_store_names_its_own_classes(tmp_path):
    root = make_images(tmp_path / "fruit", each=1)
    generate(root, tmp_path / "run", ("gradcam",), Search((0.5,)))
    path = tmp_path / "run/masks/small-gradcam.h5"
    with MaskStore(path) as store:
        assert store.settings["class_names"] == list(NAMES)

    def shown():
        done = aft("gen-masks", "--show", path, "--json")
        assert done.code in (0, None), done.err
        return json.loads(done.out)["labels"]

    assert shown() == dict.fromkeys(NAMES, 1)
    assert "classes: apple 1, pear 1, plum 1" in aft("gen-masks", "--show", path).out
    # As stores were made before: their folders name the classes.
    with h5py.File(path, "r+") as file:
        del file.attrs["class_names"]
    sealed_again(path)
    assert shown() == dict.fromkeys(NAMES, 1)
    # The same command still finds it.
    generate(root, tmp_path / "run", ("gradcam",), Search((0.5,)))


def test_a_store_of_imagenets_classes_has_no_names_of_its_own(lite0, tmp_path):
    root = folders(tmp_path / "data", "n01440764", "n01443537")
    settings = store_settings(lite0, open_data_set(root, None, lite0.classes), Search())
    assert "class_names" not in settings
    f = small_float()
    f.classes = Classes.numbered(3)
    data = open_data_set(make_images(tmp_path / "fruit", each=1), None, f.classes)
    assert "class_names" not in store_settings(f, data, Search())


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A folder with a network of three classes, their names and images of them."""
    from torchvision.models import squeezenet1_1

    folder = tmp_path_factory.mktemp("network")
    torch.manual_seed(0)
    torch.save(squeezenet1_1(num_classes=3).state_dict(), folder / "own.pth")
    (folder / "names.txt").write_text("\n".join(NAMES))
    make_colours(folder / "data", each=2)
    return folder


def made(network, run, *options):
    """gen-masks of the network."""
    given = ("--model", "squeezenet1_1", "--checkpoint", network / "own.pth", *options)
    done = aft("gen-masks", network / "data", "--run", run, "--thresholds", "0.3", *given)
    assert done.code in (0, None), done.err
    return run


ONE_EPOCH = ("--objective", "tuner", "--epochs", "1")


def evaluated(run, *options):
    return aft("evaluate", "--run", run, "--table", "4", *options)


@pytest.mark.slow
def test_names_of_a_users_network_are_given_once(network, tmp_path):
    run = made(network, tmp_path / "run", "--classes", network / "names.txt")
    done = aft("finetune", "--run", run, *ONE_EPOCH, "--json")
    assert done.code in (0, None), done.err
    (card,) = json.loads(done.out)
    assert card["classes"]["names"] == list(NAMES)
    assert card["metrics"]["after"]["val"]["images"] == 6
    assert evaluated(run).code in (0, None)


@pytest.mark.slow
def test_names_of_a_users_network_may_be_given_later(network, tmp_path):
    run = made(network, tmp_path / "run")
    names = ("--classes", network / "names.txt")
    for refused in (aft("finetune", "--run", run), evaluated(run)):
        assert refused.code == 1 and "classes have no names: name them by" in refused.err
        assert "--no-masks" not in refused.err
    done = aft("finetune", "--run", run, *ONE_EPOCH, *names, "--json")
    assert done.code in (0, None), done.err
    assert json.loads(done.out)[0]["metrics"]["after"]["val"]["images"] == 6
    assert evaluated(run, *names).code in (0, None)
    assert evaluated(run).code in (0, None)


@pytest.mark.slow
def test_names_given_to_masks_without_are_refused_with_what_to_do(network, tmp_path):
    run = made(network, tmp_path / "run")
    (path,) = (run / "masks").glob("*.h5")
    before = path.read_bytes()
    given = ("--model", "squeezenet1_1", "--checkpoint", network / "own.pth")
    asked = ("gen-masks", network / "data", "--run", run, "--thresholds", "0.3", *given)
    done = aft(*asked, "--classes", network / "names.txt")
    assert done.code == 1 and path.read_bytes() == before
    assert "leave --classes out here and pass it to aft finetune and aft evaluate" in done.err
    assert "asked for" not in done.err
    # Other settings are still named.
    done = aft(*asked[:-6], *given, "--classes", network / "names.txt")
    assert done.code == 1 and "thresholds is [0.3], asked for" in done.err


def test_classes_of_one_name_are_blamed_instead_of_the_folder(network, tmp_path):
    (tmp_path / "twice.txt").write_text("\n".join([NAMES[0], NAMES[0], NAMES[1]]))
    given = ("--model", "squeezenet1_1", "--checkpoint", network / "own.pth")
    options = (*given, "--classes", tmp_path / "twice.txt", "--run", tmp_path / "run")
    done = aft("gen-masks", network / "data", *options)
    assert done.code == 1 and f"classes 0 and 1 of the model are all named {NAMES[0]!r}" in done.err
    assert "--classes FILE" in done.err and "class folder" not in done.err
    # Where no folder has that name, nothing is ambiguous.
    data = folders(tmp_path / "data", NAMES[1])
    assert open_data_set(data, None, Classes(("a", "a", NAMES[1]))).samples[0].label == 2


@pytest.mark.slow
def test_a_class_of_val_alone_is_no_reason_for_another_new_layer(lite0, tmp_path):
    """The advice of a run with --no-masks does not lead back to it."""
    data = folders(tmp_path / "data", "train/a", "train/b", "val/a", "val/c", each=2)
    options = ("--no-masks", "--epochs", "1", "--workers", "0", "--run", tmp_path / "run")
    done = aft("finetune", data, *options)
    assert done.code in (0, None), done.err
    (said,) = [line for line in done.err.splitlines() if "val is not measured" in line]
    assert "is no class of the model: c" in said and "--no-masks" not in said
    assert said.endswith("or move their folders out of the val split")


def test_one_class_alone_is_refused_as_such(lite0, tmp_path):
    data = folders(tmp_path / "data", "a", each=2)
    options = ("--run", tmp_path / "run")
    for command in (
        ("finetune", data, "--no-masks"),
        ("evaluate", data, "--cam", "gradcam"),
    ):
        done = aft(*command, *options)
        assert done.code == 1 and "has one class folder, a, and one class alone" in done.err
        assert "output" not in done.err


@pytest.mark.slow
def test_a_val_split_that_can_not_be_measured_is_said(network, tmp_path):
    run = made(network, tmp_path / "run", "--classes", network / "names.txt")
    folders(network / "data/val", "quince")
    try:
        done = aft("finetune", "--run", run, *ONE_EPOCH)
    finally:
        shutil.rmtree(network / "data/val/quince")
    assert done.code in (0, None), done.err
    assert "val is not measured: " in done.err and "no class of the model: quince" in done.err


def test_settings_of_a_store_may_name_classes_only_by_text(tmp_path):
    generate(make_images(tmp_path / "fruit", each=1), tmp_path / "run", ("gradcam",))
    path = tmp_path / "run/masks/small-gradcam.h5"
    with h5py.File(path, "r+") as file:
        file.attrs["class_names"] = "[1]"
    sealed_again(path)
    with pytest.raises(AftError, match="its classes are not names"):
        MaskStore(path)


class Lines(Format):
    """A format from outside: SPLIT.tsv with a picture, its class and a box on each line."""

    paper = "VOC"

    def open(self, path, split, classes, default):
        split = split or default
        lists = path / f"{split}.tsv"
        if not lists.is_file():
            return None
        samples = [Sample(name, classes.index(label)) for name, label, *_ in self.rows(lists)]
        return DataSet("lines", path, split, classes.names, True, samples)

    def has_split(self, root, split):
        return (root / f"{split}.tsv").is_file()

    def areas(self, data_set, index):
        return [0.25 if c == data_set.samples[index].label else 0.0 for c in range(3)]

    def annotations(self, data_set):
        return Boxes(data_set)

    @staticmethod
    def rows(path):
        return [line.split("\t") for line in path.read_text().splitlines()]


class Boxes(Annotations):
    """The boxes of the lines."""

    kinds = frozenset({"boxes"})

    def files(self):
        yield self.data_set.beside(f"{self.data_set.split}.tsv")

    def marks(self, index, class_index):
        (path,) = self.files()
        _, label, *edges = Lines.rows(path)[index]
        if NAMES[class_index] != label:
            return None
        return Marks([Listed.read(edges, (None, None), first=0)], path)


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """A data set of a format that a line of FORMATS adds."""
    monkeypatch.setitem(FORMATS, "lines", f"{__name__}:Lines")
    root = tmp_path / "lines"
    root.mkdir()
    for split in ("train", "val"):
        for name in NAMES:
            Image.new("RGB", (64, 64), "grey").save(root / f"{split}-{name}.png")
        rows = (f"{split}-{name}.png\t{name}\t0\t0\t31\t31\n" for name in NAMES)
        (root / f"{split}.tsv").write_text("".join(rows))
    return root


def test_a_format_is_one_file_and_one_line(lines, tmp_path):
    data = open_data_set(lines, None, FRUIT)
    assert (data.kind, data.split, data.named) == ("lines", "train", lines)
    assert [(s.name, s.label) for s in data.samples] == [
        (f"train-{name}.png", i) for i, name in enumerate(NAMES)
    ]
    assert data_name(lines, "lines", "train") == "lines" and format_of("lines").paper == "VOC"
    found = validation_of(data, FRUIT)
    assert found.data_set.split == "val" and not found.reason
    # Other folders are still what they were.
    assert open_data_set(layout(tmp_path / "data", "train"), None, FRUIT).kind == "folders"


def test_a_format_from_outside_has_regions(lines):
    data, prep = open_data_set(lines, "val", FRUIT), small_float().preprocessing
    objects = Objects(data, prep)
    assert objects.kinds == {"boxes"} and list(objects.files()) == [lines / "val.tsv"]
    regions = objects.regions(1, 1)
    assert regions.segmentation is None and objects.regions(1, 0).boxes is None
    high, wide = regions.boxes.shape
    rows, columns = torch.where(regions.boxes)
    # The left upper quarter of the picture, which the model sees whole.
    assert (rows.max() + 1, columns.max() + 1) == (high // 2, wide // 2)
    assert len(rows) == high * wide // 4


def test_a_run_has_the_images_of_a_format_from_outside(lines, tmp_path):
    generate(lines, tmp_path / "run", ("gradcam",), Search((0.5,)))
    with MaskStore(tmp_path / "run/masks/small-gradcam.h5") as store:
        assert store.settings["data_kind"] == "lines"
        rows = store.rows(0, 3)
        assert rows.label.tolist() == [0, 1, 2]
        assert rows.areas.tolist() == (torch.eye(3) / 4).tolist()
    shown = aft("gen-masks", "--show", tmp_path / "run/masks/small-gradcam.h5")
    assert "classes: apple 1, pear 1, plum 1" in shown.out


def test_an_unknown_format_is_refused_by_name(lines, tmp_path, monkeypatch):
    data = open_data_set(lines, None, FRUIT)
    monkeypatch.delitem(FORMATS, "lines")
    for refused in (lambda: data.areas(0), lambda: data_name(lines, "lines", "train")):
        with pytest.raises(
            AftError, match="unknown format of data sets 'lines'; there are folders"
        ):
            refused()
