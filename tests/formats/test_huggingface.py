"""Hugging Face data sets on disk, made by pyarrow as `datasets` writes them."""

import json
import os

import pytest

pa = pytest.importorskip("pyarrow")

from aftcli import AftError, MaskStore, read_image  # noqa: E402
from aftcli.core.classes import Classes  # noqa: E402
from aftcli.data.blocks import content_of  # noqa: E402
from aftcli.data.sets import data_name, open_data_set, validation_of  # noqa: E402
from aftcli.formats import huggingface as module  # noqa: E402
from aftcli.networks.sources import imagenet_classes  # noqa: E402
from tests.formats.test_shards import labels, png  # noqa: E402
from tests.helpers.archives import make_tables, save_table, table_of  # noqa: E402
from tests.helpers.stored import NAMES, generate, make_images  # noqa: E402
from tests.helpers.trained import make_colours  # noqa: E402

CLASSES = Classes(NAMES)
KINDS = (".parquet", ".arrow")


def opened(path, split=None, classes=CLASSES, **options):
    return open_data_set(path, split, classes, **options)


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


@pytest.mark.parametrize("ending", KINDS)
def test_rows_give_the_pictures_of_class_folders(images, tmp_path, ending):
    make_tables(images, tmp_path / "rows", ending, stem="part")
    (tmp_path / "rows/cache-0123.arrow").write_bytes(b"of map")
    data, plain = opened(tmp_path / "rows"), opened(images)
    assert (data.kind, data.split, data.mapped, data.notes) == ("huggingface", "", True, ())
    assert [s.label for s in data.samples] == [s.label for s in plain.samples]
    stem = "part" if ending == ".parquet" else "data"
    assert [s.name for s in data.samples] == [
        f"{stem}-{i // 7:05}-of-00003{ending}/{i % 7}" for i in range(15)
    ]
    for own, file in reversed(list(zip(data.pictures(), plain.pictures(), strict=True))):
        assert own.read() == file.read() and content_of(own) == content_of(file)
        assert read_image(own).tobytes() == read_image(file).tobytes()
    assert data_name(data.root, data.kind, "") == "rows"
    first = tmp_path / "rows" / data.samples[0].name.split("/")[0]
    assert len(opened(first).samples) == 7
    pattern = f"{stem}-{{00001..00002}}-of-00003{ending}"
    assert opened(tmp_path / "rows" / pattern).samples == data.samples[7:]


def test_splits_of_a_saved_dictionary_and_of_parquet(tmp_path):
    colours = make_colours(tmp_path / "colours", each=2)
    for split, word in (("train", "train"), ("val", "validation")):
        make_tables(colours / split, tmp_path / "saved" / word, ".arrow")
        make_tables(colours / split, tmp_path / "hub/data", ".parquet", stem=word)
        make_tables(colours / split, tmp_path / "converted/default" / word, ".parquet", stem="0")
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    for name in ("saved", "hub", "converted"):
        data = opened(tmp_path / name)
        assert (data.split, len(data.samples)) == ("train", 6)
        val = validation_of(data, CLASSES).data_set
        assert (val.split, len(val.samples), val.root) == ("validation", 6, data.root)
        assert opened(tmp_path / name, "val").samples == val.samples
        with pytest.raises(AftError, match="has no split 'test'; there are train, validation"):
            opened(tmp_path / name, "test")
    assert opened(tmp_path / "saved/train").split == ""
    make_tables(colours / "val", tmp_path / "converted/other/train", ".parquet", stem="0")
    with pytest.raises(AftError, match=r"holds several data sets \(default, other\); name one"):
        opened(tmp_path / "converted")


def test_labels_are_numbers_of_classes_or_texts(tmp_path):
    rows = [(png(1), "plum"), (png(2), None), (png(3), "apple"), (png(4), " ")]
    text = opened(save_table(tmp_path / "a/text.parquet", table_of(rows)))
    assert labels(text) == {"text.parquet/0": "plum", "text.parquet/2": "apple"}
    skipped = "skipped rows without a label: text.parquet/1, text.parquet/3"
    assert text.notes == (f"{tmp_path}/a: {skipped}",)
    rows = [(png(1), 2), (png(2), -1), (png(3), None), (png(4), 0)]
    path = save_table(tmp_path / "b/number.parquet", table_of(rows, NAMES))
    assert labels(opened(path)) == {"number.parquet/0": "plum", "number.parquet/3": "apple"}
    # Files of other writers say nothing of features.
    table = pa.table({"picture": [png(1), png(2)], "cls": ["pear", "plum"]})
    path = save_table(tmp_path / "c/plain.parquet", table)
    assert labels(opened(path)) == {"plain.parquet/0": "pear", "plain.parquet/1": "plum"}


def test_of_several_columns_of_labels_one_is_taken_and_said(tmp_path):
    names = {"coarse_label": ["fruit"], "fine_label": list(NAMES)}
    features = {k: {"names": v, "_type": "ClassLabel"} for k, v in names.items()}
    features = {"image": {"_type": "Image"}, **features}
    table = table_of([(png(1), 0)], NAMES, features, coarse_label=[0], fine_label=[2])
    data = opened(save_table(tmp_path / "a.parquet", table.drop_columns(["label"])))
    assert labels(data) == {"a.parquet/0": "plum"}
    assert "took 'fine_label' as the label; so could coarse_label be" in data.notes[0]


def test_imagenets_names_are_known_by_their_order(tmp_path):
    model = imagenet_classes()
    names = [model.name(i) for i in range(1000)]
    assert len(set(names)) < 1000
    path = save_table(tmp_path / "a.parquet", table_of([(png(), 517), (png(), 134)], names))
    data = opened(path, classes=model)
    assert data.mapped and [s.label for s in data.samples] == [517, 134]
    names[517], names[0] = names[0], names[517]
    path = save_table(tmp_path / "b.parquet", table_of([(png(), 0)], names))
    assert not opened(path, classes=model).mapped


def test_what_is_wrong_is_said_with_its_row(tmp_path):
    def refused(said, table, classes=CLASSES):
        with pytest.raises(AftError, match=said):
            opened(save_table(tmp_path / "a.parquet", table), classes=classes)

    refused(
        r"a\.parquet/1: its label '3' is none of 3 classes", table_of([(b"", 0), (b"", 3)], "abc")
    )
    refused(r"a\.parquet/1: 'kiwi' is not a class", table_of([(png(), "pear"), (png(), "kiwi")]))
    refused("no row of a.parquet has a label in 'label'", table_of([(png(), None)]))
    refused("no row of a.parquet has a label in 'label'", table_of([]))
    floats = table_of([(png(), None)]).set_column(1, "label", pa.array([1.5]))
    refused(r"a\.parquet/0: its label '1.5' is neither a name nor an integer", floats)
    table = table_of([(png(), "pear")])
    refused("pictures in 'image', but no column of labels", table.drop_columns(["label"]))
    path = {"bytes": None, "path": "/home/me/a.png"}
    refused(
        r"names files \(/home/me/a.png\) and does not hold their pictures",
        pa.table({"image": pa.array([path], table.schema.field("image").type), "label": ["pear"]}),
    )
    with pytest.raises(AftError, match="is not a list of pictures"):
        opened(save_table(tmp_path / "b.parquet", table.drop_columns(["image"])))


@pytest.mark.parametrize("ending", KINDS)
def test_damaged_files_are_refused_and_damaged_pictures_left_out(tmp_path, ending):
    rows = [(png(i), i % 3) for i in range(6)]
    rows[2], rows[4] = (b"no picture", 0), (None, 1)
    path = save_table(tmp_path / f"rows/data-00000-of-00001{ending}", table_of(rows, NAMES))
    generate(tmp_path / "rows", tmp_path / "run", ("gradcam",), workers=2)
    with MaskStore(tmp_path / "run/masks/small-gradcam.h5") as store:
        assert len(store) == 4
        assert [b.path.partition("/")[2] for b in store.broken] == ["2", "4"]
        assert store.broken[0].reason == "is not a picture in a known format, or is damaged"
        assert "its row has no bytes of a picture" in store.broken[1].reason
        assert store.changed(opened(tmp_path / "rows"), range(4)) == []
        # Copied, it is read again, and found to be the same.
        os.utime(path, ns=(1, 1))
        assert store.changed(opened(tmp_path / "rows"), range(4)) == []
        save_table(path, table_of([(png(9), 0), *rows[1:]], NAMES))
        assert store.changed(opened(tmp_path / "rows"), range(4)) == [f"{path.name}/0"]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(AftError, match=rf"{path.name}: can't be read as an? {ending[1:]} file \("):
        opened(tmp_path / "rows")


def test_files_outside_the_folder_are_not_read(images, tmp_path):
    make_tables(images, tmp_path / "rows", ".arrow")
    state = tmp_path / "rows/state.json"
    said = json.loads(state.read_text())
    said["_data_files"][0]["filename"] = "../secret.arrow"
    state.write_text(json.dumps(said))
    with pytest.raises(AftError, match=r"secret\.arrow: leads out of"):
        opened(tmp_path / "rows")
    state.write_text("{}")
    with pytest.raises(AftError, match=r"state\.json: can't be read as what save_to_disk writes"):
        opened(tmp_path / "rows")
    make_tables(images, tmp_path / "hub", ".parquet")
    data = opened(tmp_path / "hub")
    for name in ("../hub/train-00000-of-00003.parquet/0", "train-00000-of-00003.parquet/x", "0"):
        with pytest.raises(AftError):
            data.format.picture(data, name)
    (tmp_path / "hub/train-00000-of-00003.parquet").rename(tmp_path / "elsewhere.parquet")
    (tmp_path / "hub/train-00000-of-00003.parquet").symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(AftError, match="is a link that leads out of"):
        opened(tmp_path / "hub")


def test_tables_beside_pictures_are_no_data_set(images, tmp_path):
    make_tables(images, images, ".parquet")
    assert opened(images).kind == "folders"


def test_only_some_rows_are_in_memory(images, tmp_path):
    module._group.cache_clear()
    make_tables(images, tmp_path / "rows", ".parquet")
    for picture in opened(tmp_path / "rows").pictures():
        picture.read()
    found = module._group.cache_info()
    # A group of rows is read once where they are read in order, and at most two are kept.
    assert (found.misses, found.currsize) == (7, module.GROUPS)


def test_without_pyarrow_it_is_said_what_to_install(images, tmp_path, monkeypatch):
    make_tables(images, tmp_path / "rows", ".parquet")
    for name in ("pyarrow", "pyarrow.ipc"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    module._head.cache_clear()
    with pytest.raises(AftError, match=r"pip install 'aftcli\[hf\]'"):
        opened(tmp_path / "rows")


@pytest.mark.parametrize("ending", KINDS)
def test_masks_are_those_of_class_folders(images, tmp_path, ending):
    make_tables(images, tmp_path / "rows", ending)
    found = []
    for root, workers in ((images, 0), (tmp_path / "rows", 2)):
        generate(root, tmp_path / f"run-{root.name}", ("gradcam",), workers=workers)
        with MaskStore(tmp_path / f"run-{root.name}/masks/small-gradcam.h5") as store:
            found.append(store.rows(0, 15)._asdict())
    for name in set(found[0]) - {"path", "stamp"}:
        assert found[0][name].tobytes() == found[1][name].tobytes()
