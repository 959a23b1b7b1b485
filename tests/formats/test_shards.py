"""Tar shards: members are read where they lie, and give what class folders give."""

import io
import json
import os
import random
import tarfile
import warnings

import pytest
from PIL import Image
from torch import nn

from aftcli import AftError, MaskStore, read_image
from aftcli.core.classes import Classes, Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.data.blocks import GONE, content_of
from aftcli.data.names import unbraced
from aftcli.data.parts import Reading
from aftcli.data.sets import data_name, open_data_set, validation_of
from aftcli.formats import shards as module
from aftcli.masks.generate import generate_masks
from aftcli.networks.sources import imagenet_classes
from aftcli.report.masks import summarise
from aftcli.settings import Search
from tests.helpers.archives import add, make_shards, pictures_below
from tests.helpers.stored import NAMES, generate, make_images
from tests.helpers.trained import make_colours

CLASSES = Classes(NAMES)


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """The folder of indices."""
    monkeypatch.setenv("AFT_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept/shards"


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


def png(seed=0):
    file = io.BytesIO()
    Image.new("RGB", (40, 36), tuple(random.Random(seed).randbytes(3))).save(file, "png")
    return file.getvalue()


def shard(path, *members):
    """A tar file of members (name, content), of which a tuple may say more of its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content, *more in members:
            add(tar, name, content, **(more[0] if more else {}))
    return path


def opened(path, split=None, classes=CLASSES, **options):
    return open_data_set(path, split, classes, **options)


def labels(data):
    return {s.name: data.classes[s.label] for s in data.samples}


@pytest.mark.parametrize("label", ["cls", "json", "folder"])
def test_shards_give_the_pictures_of_class_folders(images, tmp_path, label):
    make_shards(images, tmp_path / "shards", label=label)
    data, plain = opened(tmp_path / "shards"), opened(images)
    assert (data.kind, data.split, data.mapped) == ("shards", "", True)
    assert [s.label for s in data.samples] == [s.label for s in plain.samples]
    separator = "/" if label == "folder" else "-"
    assert [s.name for s in data.samples] == [
        f"shard-{i // 4:03}.tar/{s.name.replace('/', separator)}"
        for i, s in enumerate(plain.samples)
    ]
    for own, file in zip(data.pictures(), plain.pictures(), strict=True):
        assert own.read() == file.read() and content_of(own) == content_of(file)
        assert own.stat()[0] == file.stat()[0]
        assert read_image(own).tobytes() == read_image(file).tobytes()


def test_a_data_set_is_a_folder_a_shard_or_a_pattern(images, tmp_path, monkeypatch):
    first, *_, last = make_shards(images, tmp_path / "shards")
    whole = opened(tmp_path / "shards").samples
    for name in ("*.tar", "shard-{000..003}.tar", "shard-{000,001,002,003}.tar", "shard-00[0-3].*"):
        assert opened(tmp_path / "shards" / name).samples == whole
    assert opened(first).samples == whole[:4] and opened(last).samples == whole[12:]
    assert opened(tmp_path / "shards/shard-{003..002}.tar").samples == whole[12:] + whole[8:12]
    monkeypatch.chdir(tmp_path)
    assert opened(module.Path("shards/shard-{000..003}.tar")).samples == whole
    for name, missing in (("shard-{002..004}.tar", "shard-004.tar"), ("x*.tar", r"x\*.tar")):
        with pytest.raises(AftError, match=f"{missing}: there is no such file"):
            opened(tmp_path / "shards" / name)
    with pytest.raises(AftError, match=r"gone\.tar: there is no such folder"):
        opened(tmp_path / "gone.tar")


def test_braces_are_written_out_as_shells_do():
    for text, names in {
        "a{8..10}": ["a8", "a9", "a10"],
        "{08..10}": ["08", "09", "10"],
        "{2..0}": ["2", "1", "0"],
        "{a,b}{0..1}": ["a0", "a1", "b0", "b1"],
        "plain{a}": ["plain{a}"],
    }.items():
        assert list(unbraced(text)) == names
    with pytest.raises(AftError, match="names more than"):
        list(unbraced("{0..99999999}"))


def test_archives_beside_their_pictures_are_no_shards(images, tmp_path):
    make_shards(images, images)
    assert opened(images).kind == "folders"
    data = opened(images, reading=Reading("shards"))
    assert data.kind == "shards" and len(data.samples) == 15
    assert opened(images / "*.tar").samples == data.samples


@pytest.mark.parametrize("by", ["names", "folders"])
def test_splits_are_told_by_names_or_folders(tmp_path, by):
    colours = make_colours(tmp_path / "colours", each=2)
    for split, word in (("train", "train"), ("val", "validation")):
        where, stem = (word, "shard") if by == "folders" else (".", f"fruit3-{word}")
        make_shards(colours / split, tmp_path / "fruit" / where, stem=stem)
    data = opened(tmp_path / "fruit")
    assert (data.split, len(data.samples)) == ("train", 6)
    for split in ("val", "validation"):
        assert opened(tmp_path / "fruit", split).split == "validation"
    val = validation_of(data, CLASSES)
    assert not val.reason and (val.data_set.split, len(val.data_set.samples)) == ("validation", 6)
    assert data_name(data.root, data.kind, data.split) == "fruit"
    with pytest.raises(AftError, match=r"has no split 'test'; there are train, validation"):
        opened(tmp_path / "fruit", "test")
    # Files that are named are meant, whatever split is the default.
    name = "validation/*.tar" if by == "folders" else "*-validation-*.tar"
    assert len(opened(tmp_path / "fruit" / name).samples) == 6
    shard(tmp_path / "fruit/more.tar", ("apple/0.png", png()))
    with pytest.raises(AftError, match=r"more\.tar is of no split, but .*train"):
        opened(tmp_path / "fruit")


def test_the_case_of_a_split_does_not_matter(tmp_path):
    for name in ("Train-0.tar", "train-1.tar", "VAL-0.tar"):
        shard(tmp_path / name, (f"{name[0]}.cls", b"pear"), (f"{name[0]}.png", png()))
    assert list(labels(opened(tmp_path))) == ["Train-0.tar/T.png", "train-1.tar/t.png"]
    assert list(labels(opened(tmp_path, "val"))) == ["VAL-0.tar/V.png"]


def test_splits_within_a_shard_are_refused(tmp_path):
    def packed(*folders):
        return shard(tmp_path / "a.tar", *((f"{folder}/1.png", png()) for folder in folders))

    with pytest.raises(AftError, match=r"several splits .*a.tar/train/pear/1.png, a.tar/val/pear"):
        opened(packed("train/pear", "val/pear"))
    assert len(opened(packed("train/pear", "train/plum")).samples) == 2
    classes = opened(packed("train", "val")).classes  # they may be names of classes
    assert classes == ("train", "val")


def test_without_words_for_splits_there_is_none(images, tmp_path):
    make_shards(images, tmp_path / "shards")
    with pytest.raises(AftError, match="no name of a file says its split, so there is no 'val'"):
        opened(tmp_path / "shards", "val")
    assert validation_of(opened(tmp_path / "shards"), CLASSES).data_set is None


def test_numbers_are_indices_of_the_model_or_classes_of_their_own(tmp_path):
    for name, numbers in {"all": "012", "own": "01", "gap": "02", "beyond": "0123"}.items():
        members = [m for n in numbers for m in ((f"{n}.cls", n.encode()), (f"{n}.png", png()))]
        shard(tmp_path / name / "a.tar", *members)
    for name in ("all", "gap"):
        data = opened(tmp_path / name)
        assert data.mapped and data.classes == NAMES
        assert [str(s.label) for s in data.samples] == [s.name[6] for s in data.samples]
        assert "taken as indices of the model's classes (0: apple" in data.notes[0]
    for name in ("own", "beyond"):
        data = opened(tmp_path / name)
        assert not data.mapped and data.classes == tuple("0123"[: len(data.samples)])
        assert "taken as names of classes of their own" in data.notes[0]


def test_a_json_says_the_label_in_one_of_its_usual_fields(tmp_path):
    said = {
        "a": {"label": "pear", "caption": "a plum"},
        "b": {"class": 3, "label": 2, "class_name": "apple"},
        "c": "plum",
        "d": {"caption": "an apple"},
        "e": {"label": None, "cls": "pear"},
    }
    members = [m for k, v in said.items() for m in ((f"{k}.json", json.dumps(v)), (f"{k}.png", ""))]
    data = opened(shard(tmp_path / "a.tar", *((n, c.encode() or png()) for n, c in members)))
    assert labels(data) == {
        "a.tar/a.png": "pear",
        "a.tar/b.png": "apple",
        "a.tar/c.png": "plum",
        "a.tar/e.png": "pear",
    }
    assert data.notes == (f"{tmp_path}: skipped pictures without a label: a.tar/d.png",)


def test_what_is_no_sample_is_skipped_and_named(tmp_path):
    link = {"type": tarfile.SYMTYPE, "linkname": "/etc/hostname"}
    data = opened(
        shard(
            tmp_path / "a.tar",
            ("./a.png", png(1)),
            ("./a.cls", b"apple"),
            ("a.seg.png", png(2)),
            ("a.txt", b"an apple"),
            ("b.png", png(3)),
            ("b.cls", b"\xff\xfe"),
            ("c.png", b"", link),
            ("c.cls", b"plum"),
            ("../d.png", png(4)),
            ("/e.png", png(5)),
            ("__MACOSX/._a.png", png(6)),
            ("a.png", png(7)),
            ("folder", b"", {"type": tarfile.DIRTYPE}),
            ("f.webp", png(8)),
            ("f.cls", b"plum"),
        )
    )
    assert labels(data) == {"a.tar/a.png": "apple", "a.tar/f.webp": "plum"}
    assert next(data.pictures()).read() == png(1)
    assert sorted(note.removeprefix(f"{tmp_path}: ") for note in data.notes) == [
        "skipped further pictures of a key: a.tar/a.seg.png",
        "skipped hidden members: a.tar/__MACOSX/._a.png",
        "skipped members that are links: a.tar/c.png",
        "skipped members whose name another one has: a.tar/a.png",
        "skipped members whose names lead out of their shard: a.tar/../d.png, a.tar//e.png",
        "skipped pictures without a label: a.tar/b.png",
    ]
    for name in ("a.tar/../d.png", "a.tar//e.png", "../a.tar/a.png", "a.png", "b.tar/a.png"):
        with pytest.raises(AftError):
            data.format.picture(data, name)


def test_only_some_classes_of_the_model_are_refused_with_the_member(tmp_path):
    path = shard(tmp_path / "a.tar", ("apple/0.png", png()), ("kiwi/1.png", png()))
    with pytest.raises(AftError, match=r"a\.tar/kiwi/1\.png: 'kiwi' is not a class of the model"):
        opened(path)
    own = opened(path, classes=Classes(("cat", "dog")))
    assert (own.classes, own.mapped) == (("apple", "kiwi"), False)
    with pytest.raises(AftError, match="there is no labelled picture in b.tar"):
        opened(shard(tmp_path / "b.tar", ("a.png", png())))


def test_names_may_be_of_any_script(tmp_path):
    names = (
        "äpfel/Ωμέγα 1.png",
        "🍐/\ud800.png".encode("utf-8", "surrogatepass").decode("latin-1"),
    )
    long = f"{'x' * 90}/{'y' * 90}/" + "z" * 120
    path = shard(tmp_path / "früchte.tar", *((n, png()) for n in (*names, f"pear/{long}.png")))
    data = opened(path, classes=Classes(("a", "b")))
    assert [s.name.partition("/")[2] for s in data.samples] == [*names, f"pear/{long}.png"]
    assert all(picture.read() == png() for picture in data.pictures())
    raw = tmp_path / "raw.tar"
    raw.write_bytes(shard(raw, ("pear/Q.png", png())).read_bytes().replace(b"Q.png", b"\xff.png"))
    content = bytearray(raw.read_bytes())
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    raw.write_bytes(content)
    data = opened(raw)
    assert data.samples[0].name == "raw.tar/pear/\udcff.png"
    generate(raw, tmp_path / "run", ("gradcam",))
    with MaskStore(tmp_path / "run/masks/small-gradcam.h5") as store:
        assert store[0].path == data.samples[0].name and not store.broken


def test_a_damaged_picture_is_left_out_with_its_name(images, tmp_path):
    (images / "pear/2.png").write_bytes(b"no picture")
    (images / "plum/0.png").write_bytes(b"")
    make_shards(images, tmp_path / "shards")
    generate(tmp_path / "shards", tmp_path / "run", ("gradcam",))
    with MaskStore(tmp_path / "run/masks/small-gradcam.h5") as store:
        assert {b.path: b.reason for b in store.broken} == {
            "shard-001.tar/pear-2.png": "is not a picture in a known format, or is damaged",
            "shard-002.tar/plum-0.png": "the file is empty",
        }
    with pytest.raises(AftError, match=r"shards/shard-001\.tar/pear-2\.png: is not a picture"):
        generate(tmp_path / "shards", tmp_path / "strict", ("gradcam",), strict=True)


def test_a_shard_that_is_cut_off_gives_what_is_whole(images, tmp_path):
    first, *_ = make_shards(images, tmp_path / "shards")
    with tarfile.open(first) as tar:
        *_, before, member = tar.getmembers()
    content = first.read_bytes()
    for length, lost in (
        (member.offset_data + member.size // 2, None),  # amid the last picture
        (member.offset_data + -(-member.size // 512) * 512, ""),  # after it
        (member.offset_data - 512, member.name),  # before it
    ):
        first.write_bytes(content[:length])
        data = opened(tmp_path / "shards")
        last = before.name if lost else member.name
        assert data.notes == (
            f"{tmp_path}/shards: members may be missing, for a shard has no end after: "
            f"shard-000.tar/{last}",
        )
        assert len(data.samples) == 15 - bool(lost)
        broken = [p.name for p in data.pictures() if content_of(p) == GONE]
        assert broken == ([f"{first}/{member.name}"] if lost is None else [])
    generate(tmp_path / "shards", tmp_path / "run", ("gradcam",))


@pytest.mark.parametrize("place", [0, 1])
def test_a_shard_that_is_damaged_amid_is_refused(images, tmp_path, place):
    first, *_ = make_shards(images, tmp_path / "shards")
    with tarfile.open(first) as tar:
        start = tar.getmembers()[2 * place].offset
        last = tar.getmembers()[2 * place - 1].name
    content = bytearray(first.read_bytes())
    content[start : start + 100] = b"\1" * 100
    first.write_bytes(content)
    where = f"after {last}" if place else "or is compressed"
    with pytest.raises(AftError, match=rf"shard-000\.tar: is no whole tar file,? {where} \("):
        opened(tmp_path / "shards")
    first.write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(AftError, match=r"shard-000\.tar: is no whole tar file, or is compressed"):
        opened(tmp_path / "shards")


def test_a_member_that_claims_more_than_there_is_takes_no_memory(tmp_path):
    path = shard(tmp_path / "a.tar", ("apple/0.png", png()), ("pear/1.png", png()))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmembers()[1].offset
    content[start + 124 : start + 136] = b"77777777777\0"  # 8 GB
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    path.write_bytes(content)
    data = opened(path)
    assert [s.name for s in data.samples] == ["a.tar/apple/0.png", "a.tar/pear/1.png"]
    with pytest.raises(AftError, match=r"pear/1\.png: can't be read as a picture \(its shard ends"):
        read_image(data.picture(1))


def test_a_shard_is_read_once(images, tmp_path, monkeypatch, kept):
    make_shards(images, tmp_path / "shards")
    data = opened(tmp_path / "shards")
    assert len(list(kept.glob("*.json"))) == 4
    scanned, real = [], module._scan
    monkeypatch.setattr(module, "_scan", lambda path: scanned.append(path.name) or real(path))
    assert opened(tmp_path / "shards") == data and scanned == []
    # A changed shard is read again, and so is one whose index was damaged.
    second = tmp_path / "shards/shard-001.tar"
    os.utime(second, ns=(1, 1))
    assert opened(tmp_path / "shards") == data and scanned == ["shard-001.tar"]
    for path in kept.glob("*.json"):
        path.write_text(path.read_text()[:-9])
    assert opened(tmp_path / "shards") == data and len(scanned) == 5
    # Without a place for it, pictures are found all the same.
    monkeypatch.setenv("AFT_CACHE", "/dev/null")
    assert opened(tmp_path / "shards") == data and len(scanned) == 9
    monkeypatch.setattr(module, "MANY", 3)
    with pytest.warns(UserWarning, match="reads where the members of 4 shards begin, once"):
        opened(tmp_path / "shards")


def test_masks_are_those_of_class_folders_however_many_work(images, tmp_path):
    make_shards(images, tmp_path / "shards", each=7)
    stores = []
    for root, workers in ((images, 0), (tmp_path / "shards", 0), (tmp_path / "shards", 2)):
        run = tmp_path / f"{root.name}-{workers}"
        generate(root, run, workers=workers)
        stores.append([MaskStore(run / f"masks/small-{cam}.h5") for cam in ("gradcam", "layercam")])
    names = list(stores[0][0].rows(0, 15)._fields)
    for own in stores[1:]:
        for store, plain in zip(own, stores[0], strict=True):
            for name, column, expected in zip(
                names, store.rows(0, 15), plain.rows(0, 15), strict=True
            ):
                assert name in ("path", "stamp") or column.tobytes() == expected.tobytes()
    assert stores[1][0].settings["digest"] == stores[2][0].settings["digest"]


def test_names_of_a_store_find_their_members_again(images, tmp_path):
    first, *_ = make_shards(images, tmp_path / "shards")
    generate(tmp_path / "shards", tmp_path / "run", ("gradcam",))
    with MaskStore(tmp_path / "run/masks/small-gradcam.h5") as store:
        assert store.settings["data_kind"] == "shards"
        assert store.changed(opened(tmp_path / "shards"), range(15)) == []
        (images / "apple/1.png").write_bytes(png(9))
        make_shards(images, tmp_path / "shards")
        changed = store.changed(opened(tmp_path / "shards"), range(15))
        assert changed == ["shard-000.tar/apple-1.png"]
        first.unlink()
        # What is gone is told by who reads it.
        assert store.changed(opened(tmp_path / "shards"), range(15)) == []


def test_labels_are_shown_by_their_names_in_imagenet(tmp_path):
    """Names of members do not say them, as those of class folders do."""
    layers = (nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    prep = Preprocessing(size=(32, 32), resize=36)
    f = cut_classifier(
        nn.Sequential(*layers, nn.Linear(4, 1000)),
        "0+1",
        name="small",
        preprocessing=prep,
        classes=imagenet_classes(),
    )
    members = (("a.cls", b"n01440764"), ("a.png", png()), ("b.cls", b"217"), ("b.png", png()))
    for name, taken, shown in (
        ("wnids", members[:2], {"tench, Tinca tinca": 1}),
        ("numbers", members[2:], {"English springer, English springer spaniel": 1}),
    ):
        data = opened(shard(tmp_path / name / "a.tar", *taken), classes=f.classes)
        for _ in generate_masks(f, data, ["gradcam"], tmp_path / f"run-{name}", Search()):
            pass
        with MaskStore(tmp_path / f"run-{name}/masks/small-gradcam.h5") as store:
            assert summarise(store).labels == shown
            store.settings.pop("imagenet")
            # Stores of before: the classes are numbered.
            assert summarise(store).labels == {f"class {store[0].label}": 1}


def test_links_out_of_the_folder_are_not_followed(images, tmp_path, monkeypatch):
    first, *_ = make_shards(images, tmp_path / "shards")
    first.rename(tmp_path / "elsewhere.tar")
    first.symlink_to(tmp_path / "elsewhere.tar")
    with pytest.raises(AftError, match=r"shard-000\.tar: is a link that leads out of"):
        opened(tmp_path / "shards")
    monkeypatch.setenv("AFT_FOLLOW_LINKS", "1")
    data = opened(tmp_path / "shards")
    assert data.picture(0).read()
    monkeypatch.delenv("AFT_FOLLOW_LINKS")
    with pytest.raises(AftError, match=r"shard-000\.tar: is a link that leads out of"):
        data.picture(0)
    data.picture(5)


def test_opening_warns_of_nothing_else(images, tmp_path):
    make_shards(images, tmp_path / "shards")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = opened(tmp_path / "shards")
    assert data.notes == () and len(pictures_below(images)) == len(data.samples)
