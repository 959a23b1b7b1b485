"""Images that are held out of a data set without a val split, from masks to tables."""

import hashlib
import json
import shutil

import h5py
import pytest

from aftcli import AftError, MaskStore, mask_job
from aftcli.core.classes import Classes
from aftcli.data.parts import Held, Reading, held_names
from aftcli.data.sets import open_data_set, validation_of
from aftcli.masks.generate import generate_masks
from aftcli.masks.images import choose_held, reread
from aftcli.settings import Search
from tests.helpers.archives import make_shards, make_tables
from tests.helpers.command import aft
from tests.helpers.stored import NAMES, generate, make_images, small_float
from tests.helpers.trained import make_colours
from tests.whole.test_trust import sealed_again

FRUIT = Classes(NAMES)
HELD = Reading(held=Held(0.4, 1))

NETWORK = """
from torch import nn

def network(num_classes=4):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
    model.preprocessing = {"size": [32, 32], "resize": 36}
    return model
"""


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("seed", [0, 7])
def test_of_each_class_the_same_share_is_held_out(share, seed):
    sizes = {0: 1, 1: 2, 2: 5, 3: 40}
    samples = [(f"{label}/{i}.png", label) for label, n in sizes.items() for i in range(n)]
    found = held_names(samples, Held(share, seed))
    for label, size in sizes.items():
        names = [name for name, of in samples if of == label]
        order = [hashlib.sha256(f"{seed}\0{n}".encode()).hexdigest() for n in names]
        ranked = [name for _, name in sorted(zip(order, names, strict=True))]
        count = 0 if size == 1 else min(max(round(share * size), 1), size - 1)
        assert found & set(names) == set(ranked[:count])
    # Neither order nor other classes change it; another seed does.
    assert held_names(samples[::-1], Held(share, seed)) == found
    assert held_names(samples[3:], Held(share, seed)) == found - {"1/0.png", "1/1.png", "0/0.png"}
    assert held_names(samples, Held(share, seed + 1)) != found


def test_an_image_of_several_classes_is_in_one_part():
    samples = [(f"{i}.png", label) for label in range(3) for i in range(4)]
    assert len(held_names(samples, Held(0.5))) == 2


def parts(path, reading=HELD):
    opened = [open_data_set(path, split, FRUIT, reading=reading) for split in (None, "val")]
    return [{s.name for s in data.samples} for data in opened]


def test_plain_folders_have_two_parts(tmp_path):
    root = make_images(tmp_path / "fruit")
    train, val = parts(root)
    every = {s.name for s in open_data_set(root, None, FRUIT).samples}
    assert train | val == every and not train & val and len(val) == 6
    data_set = open_data_set(root, "train", FRUIT, reading=HELD)
    assert {s.name for s in data_set.samples} == train and data_set.part == "train"
    (note,) = data_set.notes
    assert "6 of 15 images are held out to evaluate on (--val-share 0.4, seed 1)" in note
    assert f"these are left out: {', '.join(sorted(val)[:5])} and 1 more" in note
    found = open_data_set(root, None, FRUIT, default="val", reading=HELD)
    assert {s.name for s in found.samples} == val and "only these are taken" in found.notes[0]
    again = validation_of(open_data_set(root, None, FRUIT, reading=HELD), FRUIT)
    assert again.data_set.samples == found.samples
    with pytest.raises(AftError, match="has no folder test/"):
        open_data_set(root, "test", FRUIT, reading=HELD)


def test_only_what_has_no_val_split_is_divided(tmp_path):
    root = make_colours(tmp_path / "data", each=5)
    assert parts(root) == parts(root, Reading())
    # The folder of a split is one part, whatever lies in it.
    inner = open_data_set(root / "val", None, FRUIT, reading=HELD)
    assert inner.held is None and len(inner.samples) == 6
    assert open_data_set(root / "train", None, FRUIT, reading=HELD).held is None
    shutil.rmtree(root / "val")
    train, val = parts(root)
    assert (len(train), len(val)) == (9, 6)
    assert open_data_set(root / "train", None, FRUIT, reading=HELD).held == Held(0.4, 1, "train")
    (root / "train").rename(root / "test")
    with pytest.raises(AftError, match="no split 'train'; there are test"):
        open_data_set(root, None, FRUIT, reading=HELD)


def test_a_manifest_without_val_is_divided(tmp_path):
    root = make_images(tmp_path / "fruit")
    names = sorted(p.relative_to(root).as_posix() for p in root.glob("*/*.png"))
    lines = [f"{name},{name.partition('/')[0]}\n" for name in names]
    (root / "labels.csv").write_text("path,label\n" + "".join(lines))
    assert parts(root / "labels.csv") == parts(root)


def test_one_image_a_class_leaves_nothing_to_hold_out(tmp_path):
    root = make_images(tmp_path / "fruit", each=1)
    data = open_data_set(root, None, FRUIT, reading=HELD)
    assert data.held is None and len(data.samples) == 3


@pytest.mark.parametrize(
    "held",
    [
        {"share": 0.2, "seed": 0},
        {"share": 2.0, "seed": 0, "part": "train"},
        {"share": 0.2, "seed": "0", "part": "train"},
        {"share": 0.2, "seed": 0, "part": "../x"},
        [0.2, 0, "train"],
    ],
)
def test_a_store_that_says_nonsense_of_what_was_held_out_is_refused(tmp_path, held):
    generate(make_images(tmp_path / "fruit", each=1), tmp_path / "run", ("gradcam",))
    path = tmp_path / "run/masks/small-gradcam.h5"
    with h5py.File(path, "r+") as file:
        file.attrs["held"] = json.dumps(held)
    sealed_again(path)
    with pytest.raises(AftError, match="its held is"):
        MaskStore(path)


@pytest.fixture
def study(tmp_path):
    """Plain class folders, and a network of other classes."""
    make_images(tmp_path / "fruit", each=5)
    (tmp_path / "net.py").write_text(NETWORK)
    return tmp_path


def ran(*options):
    done = aft(*options)
    assert done.code in (0, None), done.err
    return done


def test_the_chain_on_plain_class_folders_ends_in_tables(study):
    data, run = study / "fruit", ("--run", study / "run")
    model = ("--model", f"{study}/net.py:network")
    control = ran(
        *("finetune", data, "--no-masks", "--epochs", "1", "--seed", "3", *model, *run, "--json")
    )
    assert "3 of 15 images are held out to evaluate on (--val-share 0.2, seed 3)" in control.err
    (card,) = json.loads(control.out)
    assert card["held"] == {"share": 0.2, "seed": 3, "part": "train"} and card["images"] == 12
    assert card["metrics"]["after"]["val"]["images"] == 3
    (tuned,) = (study / "run/tuned").glob("*.safetensors")
    own, second = (*model, "--checkpoint", tuned), ("--run", study / "second")
    # The same are held out: the checkpoint says which.
    masks = ran("gen-masks", data, *own, "--thresholds", "0.3,0.6", *second)
    assert "3 of 15 images are held out to evaluate on (--val-share 0.2, seed 3)" in masks.err
    (path,) = (study / "second/masks").glob("*.h5")
    with MaskStore(path) as store:
        names, held = {record.path for record in store}, store.settings["held"]
    assert held == card["held"] and len(names) == 12
    (after,) = json.loads(
        ran("finetune", *own, "--objective", "tuner", "--epochs", "1", *second, "--json").out
    )
    assert after["held"] == card["held"] and after["metrics"]["after"]["val"]["images"] == 3
    tables = ran("evaluate", *own, "--table", "2,4", *second, "--json")
    assert "3 of 15 images are held out" in tables.err and "only these are taken" in tables.err
    found = json.loads(tables.out)
    (row,) = found["table2"]
    assert (row["split"], row["train"], row["test"]) == ("val", 12, 3)
    assert [row["n"] for row in found["table4"]] == [3, 3]
    # Nothing that was trained on is evaluated.
    assert [row["seen"] for row in found["seen"]] == [0, 0]
    moved = study / "moved"
    data.rename(moved)
    again = ran("evaluate", moved, *own, "--table", "2", *second, "--json")
    assert "only these are taken" in again.err
    # Another data set of these classes is evaluated as a whole.
    other = make_images(study / "other", each=2, seed=5)
    whole = ran("evaluate", other, *own, "--table", "2", *second, "--json")
    assert "held out" not in whole.err and json.loads(whole.out)["table2"][0]["test"] == 6


def test_what_was_made_before_is_held_out_again_and_a_share_may_be_given(study):
    data, run = study / "fruit", ("--run", study / "run")
    model = ("--model", f"{study}/net.py:network", "--thresholds", "0.3")
    made = ran("gen-masks", data, *model, *run, "--val-share", "0.4", "--seed", "2")
    assert "6 of 15 images are held out to evaluate on (--val-share 0.4, seed 2)" in made.err
    again = ran("gen-masks", data, *model, *run, "--cam", "layercam")
    assert "(--val-share 0.4, seed 2)" in again.err
    other = aft("gen-masks", data, *model, *run, "--val-share", "0")
    said = "what is held out is 0.4 of each class by seed 2, asked for nothing"
    assert other.code == 1 and said in other.err
    every = ran("gen-masks", data, *model, "--run", study / "all", "--val-share", "0")
    assert "held out" not in every.err
    refused = aft("evaluate", *model[:2], "--run", study / "all")
    assert refused.code == 1 and "has no split to evaluate on; name one" in refused.err
    val = ran("gen-masks", data, "--split", "val", *model, "--run", study / "val")
    assert "3 of 15 images" in val.err and "only these are taken" in val.err


@pytest.mark.parametrize("seed", range(3))
def test_a_split_stays_by_names_when_images_come_and_go(seed):
    held = Held(0.3, seed)
    before = [(f"{c}/{i}.png", c) for c in range(3) for i in range(10)]
    out = held_names(before, held)
    trained = frozenset(name for name, _ in before) - out
    # The first of each part and class go, others come.
    gone = {min(n for n in part if n[0] == str(c)) for part in (out, trained) for c in range(3)}
    new = [(f"{c}/new{i}.png", c) for c in range(3) for i in range(20)] + [("3/a.png", 3)]
    after = [sample for sample in before if sample[0] not in gone] + new
    assert held_names(after, held) & trained  # without their names some would be evaluated
    found = held_names(after, held, trained)
    assert not found & trained and found >= out - gone
    assert held_names(before, held, trained) == out


def test_a_data_set_that_was_moved_and_changed_keeps_its_split(tmp_path):
    data, f = make_images(tmp_path / "fruit", each=5), small_float()
    (data / "pear/9.png").write_bytes(b"")  # a broken image is not new later
    part = open_data_set(data, None, FRUIT, reading=Reading(held=Held(0.2)))
    list(generate_masks(f, part, ["gradcam"], tmp_path / "run", Search((0.3,)), workers=0))
    trained = {sample.name for sample in part.samples}
    recorded = {f"{n}/{i}.png" for n in NAMES for i in range(5)} | {"pear/9.png"}
    recorded -= trained

    def val_of(place, data=None):
        with MaskStore(tmp_path / "run/masks/small-gradcam.h5") as store:
            reading = reread(data, Reading(), store.settings, FRUIT, [store])
        found = open_data_set(place, "val", FRUIT, reading=reading)
        return {s.name for s in found.samples}, " ".join(found.notes)

    assert val_of(data)[0] == recorded and "changed" not in val_of(data)[1]
    moved = data.rename(tmp_path / "moved")
    assert val_of(moved, moved)[0] == recorded and "changed" not in val_of(moved, moved)[1]
    more = make_images(tmp_path / "more", each=9, seed=7)
    for name in NAMES:
        for i in range(9):
            (more / name / f"{i}.png").rename(moved / name / f"new{i}.png")
    for there in (moved, data):  # in its old place too
        if there == data:
            moved.rename(data)
        found, said = val_of(there, None if there == data else there)
        assert found >= recorded and not found & trained
        fresh = 27 - len(found - recorded)
        assert "the data set has changed since, the split stays as it was" in said
        assert f"and {fresh} new images are in no part of it: " in said
    # Other pictures under these names are another data set.
    other = make_images(tmp_path / "other", each=5, seed=9)
    with MaskStore(tmp_path / "run/masks/small-gradcam.h5") as store:
        assert reread(other, Reading(), store.settings, FRUIT, [store]).held is None


def pack(kind, data, folder, stem):
    """Pack class folders into two files or more; return a pattern that names them."""
    if kind == "shards":
        make_shards(data, folder, each=8, stem=stem)
        return folder / f"{stem}-*.tar"
    pytest.importorskip("pyarrow")
    make_tables(data, folder, ".parquet", each=8, stem=stem)
    return folder / f"{stem}-*.parquet"


@pytest.mark.parametrize("kind", ["shards", "huggingface"])
def test_files_that_are_named_stay_the_data_set(kind, tmp_path, monkeypatch):
    """Files of another data set beside them are in no part of it, also where they are moved."""
    monkeypatch.setenv("AFT_CACHE", str(tmp_path / "cache"))
    f, folder = small_float(), tmp_path / "packed"
    own = pack(kind, make_images(tmp_path / "fruit", each=5), folder, "own")
    pack(kind, make_images(tmp_path / "other", each=5, seed=7), folder, "an-other")
    pack(kind, make_images(tmp_path / "more", each=5, seed=8), folder, "z")
    whole = open_data_set(own, None, FRUIT)
    assert len(whole.samples) == 15 and len({s.name.split("/")[0] for s in whole.samples}) == 2
    part = open_data_set(own, None, FRUIT, reading=HELD)
    list(generate_masks(f, part, ["gradcam"], tmp_path / "run", Search((0.3,)), workers=0))
    held_out = {s.name for s in whole.samples} - {s.name for s in part.samples}
    assert held_out == part.held_out and len(held_out) == 6
    store = MaskStore(tmp_path / "run/masks/small-gradcam.h5")
    # The same names again are held out as before; other files are another data set.
    again, other = (choose_held(tmp_path / "run", f, n, None, None) for n in (own, folder))
    assert (again, other) == (HELD.held, Held(0.2))
    found = [mask_job(store, f).data_set]
    reading = reread(None, Reading(), store.settings, FRUIT, [store])
    assert {
        s.name for s in open_data_set(folder, "val", FRUIT, reading=reading).samples
    } == held_out
    folder.rename(tmp_path / "moved")
    moved = mask_job(store, f, tmp_path / "moved" / own.name).data_set
    for data in (*found, moved):
        assert {s.name for s in data.samples} == {s.name for s in part.samples}
    assert {s.name for s in validation_of(moved, FRUIT).data_set.samples} == held_out
    # What a store says leads nowhere else.
    outside = Reading.of({**store.settings, "files": ["../secret.tar"]})
    with pytest.raises(AftError, match="leads out of"):
        open_data_set(tmp_path / "moved", None, FRUIT, reading=outside)
    assert Reading.of({**store.settings, "files": 7}).files == ()
    one = open_data_set(tmp_path / "moved" / whole.files[0], None, FRUIT)
    assert one.record["files"] == [whole.files[0]]
    assert "files" not in open_data_set(tmp_path / "moved", None, FRUIT).record
