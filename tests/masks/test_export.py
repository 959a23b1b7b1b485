"""The images of a store for other programs: rows, pandas, COCO's encoding, loaders."""

import csv
import io
import json

import h5py
import numpy as np
import pytest
from torch.utils.data import DataLoader

from aftcli import MaskStore
from aftcli.core.classes import Preprocessing
from aftcli.data.images import read_image, to_input
from aftcli.data.objects import from_rle
from aftcli.report.masks import ImageRow
from tests.helpers.command import aft, usage_error
from tests.helpers.stored import NAMES, generate, make_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = make_images(tmp_path_factory.mktemp("images") / "fruit", each=2)
    (root / "plum/0.png").rename(root / "plum/=größe, 1.png")
    return root


@pytest.fixture(scope="module")
def path(tmp_path_factory, images):
    run = tmp_path_factory.mktemp("run")
    generate(images, run, ("gradcam",))
    return run / "masks/small-gradcam.h5"


def decimal(value):
    """The shortest decimal that is this float32."""
    return next(n for n in (round(float(value), d) for d in range(12)) if np.float32(n) == value)


@pytest.fixture(scope="module")
def wanted(path):
    """The rows, record by record."""
    with MaskStore(path) as store:
        return [
            ImageRow(
                record.path,
                NAMES[record.label],
                record.label,
                NAMES[record.class_index],
                record.class_index,
                decimal(record.probability),
                decimal(record.tau),
                decimal(record.rpi.max()),
                float(record.mask.double().mean()),
            )
            for record in store
        ]


def shown(path, words):
    done = aft("gen-masks", "--show", path, "--format", words)
    assert done.code in (0, None) and not done.err
    return done.out


def test_json_has_an_object_an_image(path, wanted):
    assert json.loads(shown(path, "json")) == [row._asdict() for row in wanted]


def test_csv_has_a_line_an_image(path, wanted):
    head, *rows = csv.reader(io.StringIO(shown(path, "csv")))
    assert head == [*ImageRow._fields] and len(rows) == 6
    numbers = [5, 6, 7, 8]
    for row, true in zip(rows, wanted, strict=True):
        assert [float(row[i]) for i in numbers] == [true[i] for i in numbers]
        assert row[:5] == [str(value) for value in true[:5]]


def test_parquet_has_the_same(path, wanted, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    with file.open("w", encoding="utf-8") as out:
        done = aft("gen-masks", "--show", path, "--format", "parquet", stdout=out)
    assert done.code in (0, None), done.err
    assert parquet.read_table(file).to_pylist() == [row._asdict() for row in wanted]


def test_pandas_reads_a_store_by_h5py(path, wanted):
    pandas = pytest.importorskip("pandas")
    with h5py.File(path) as file:
        columns = {name: file[name][:] for name in ("path", "label", "tau")}
    table = pandas.DataFrame(columns)
    assert table["path"].str.decode("utf-8").tolist() == [row.path for row in wanted]
    assert table["tau"].tolist() == [np.float32(row.tau) for row in wanted]


def test_masks_are_runs_of_the_input_or_of_the_picture(path, images):
    with MaskStore(path) as store:
        for i in range(len(store)):
            assert np.array_equal(from_rle(store.rle(i)), store.full_mask(i).numpy())
            size = read_image(images / store[i].path).size
            seen = store.picture_mask(i, size)
            assert seen.shape == size[::-1]
            assert np.array_equal(from_rle(store.rle(i, size)), seen)


def test_a_mask_lies_on_what_the_network_saw(path):
    """Scaled and cropped as a picture, it is the mask of the input again."""
    from PIL import Image

    with MaskStore(path) as store:
        own = Preprocessing.from_dict(store.settings["preprocessing"])
        plain = Preprocessing(own.size, own.resize, "nearest", (0, 0, 0), (1, 1, 1))
        for i in range(len(store)):
            seen = store.picture_mask(i, (360, 360))  # ten pixels each
            picture = Image.fromarray(np.uint8(seen) * 255).convert("RGB")
            again = to_input(picture, plain)[0, 0] > 0.5
            assert again.equal(store.full_mask(i))
            # What is cropped away is not kept.
            assert not seen[:20].any() and not seen[:, -20:].any()


def test_a_store_is_a_data_set_of_torch_with_workers(path, wanted):
    with MaskStore(path) as store:
        alone = [record.mask for record in store]
        loader = DataLoader(store, batch_size=4, num_workers=2)
        batches = list(loader)
        assert [name for batch in batches for name in batch.path] == [row.path for row in wanted]
        assert [len(batch.label) for batch in batches] == [4, 2]
        masks = [mask for batch in batches for mask in batch.mask]
        assert all(a.equal(b) for a, b in zip(masks, alone, strict=True))
        # The file of this process is still its own.
        assert store[0].mask.equal(alone[0])


def test_what_can_not_be_exported_is_said(path, tmp_path):
    done = aft("gen-masks", "--show", tmp_path / "gone.h5", "--format", "csv")
    assert done.code == 1 and "there is no such mask file" in done.err and not done.out
    note = aft("gen-masks", "--show", path, "--format", "csv", "--json")
    assert note.code == 2 and "--format has no effect with --json" in usage_error(note)
