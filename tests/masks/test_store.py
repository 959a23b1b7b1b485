"""The mask store: exact, checked, self-describing."""

import hashlib
import pickle
import random

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from aftcli import AftError, MaskStore, attribution_map, fine_tune_threshold, to_input
from aftcli.data.blocks import Broken
from aftcli.data.images import read_image
from aftcli.masks import hdf5
from aftcli.masks import parts as making
from aftcli.masks.hdf5 import Rows, join_float, split_float
from aftcli.masks.parts import read_part, write_part
from aftcli.masks.settings import differences
from aftcli.settings import Search
from tests.helpers.stored import generate, make_images, small_float

METHODS = ("gradcam", "layercam", "ablationcam")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "fruit")


@pytest.fixture(scope="module")
def run(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("run")
    generate(images, path, METHODS)
    return path


def test_float16_and_correction_give_every_float32_back():
    bits = np.random.default_rng(0).integers(0, 0x3F800000, 20000, dtype=np.int32)
    exact = np.concatenate([bits.view(np.float32), np.float32([0, 1, 1e-7, 6e-8, 1e-45, 0.1])])
    half, correction = split_float(exact)
    assert half.dtype == np.float16
    assert np.array_equal(join_float(half, correction).view(np.int32), exact.view(np.int32))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_records_equal_the_python_api_image_by_image(images, run, method):
    f = small_float()
    with MaskStore(run / f"masks/small-{method}.h5") as store:
        assert len(store) == 15
        for i, record in enumerate(store):
            x = to_input(read_image(images / record.path), f.preprocessing)
            y, c = f(x).softmax(1).max(1)
            attribution = attribution_map(f, x, c, method)
            expected = fine_tune_threshold(f, x, attribution, c)
            assert record.class_index == c
            assert record.probability == pytest.approx(float(y), rel=1e-5)
            torch.testing.assert_close(record.probabilities, expected.probabilities[0])
            torch.testing.assert_close(record.rpi, expected.rpi[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(store.full_attribution(i), attribution[0])
            assert record.tau == float(expected.tau)
            assert torch.equal(store.full_mask(i), expected.mask[0])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["value", "percentile"])
@pytest.mark.parametrize("masking", ["binary", "soft"])
def test_the_full_mask_is_rebuilt_exactly(images, tmp_path, mode, masking):
    settings = Search(masking=masking, mode=mode)
    generate(images, tmp_path, ("layercam",), settings)
    f = small_float()
    with MaskStore(tmp_path / "masks/small-layercam.h5") as store:
        for i, record in enumerate(store):
            x = to_input(read_image(images / record.path), f.preprocessing)
            c = torch.tensor([record.class_index])
            maps = store.full_attribution(i)[None]
            expected = fine_tune_threshold(f, x, maps, c, masking=masking, mode=mode)
            assert record.tau == float(expected.tau)
            assert torch.equal(store.full_mask(i), expected.mask[0])


def test_the_mask_at_activation_size_is_the_map_at_or_above_tau(run):
    with MaskStore(run / "masks/small-gradcam.h5") as store:
        for record in store:
            kept = (record.attribution >= torch.tensor(record.tau)) & (record.attribution != 0)
            assert torch.equal(record.mask, kept)
            assert record.mask.shape == (4, 4)


def test_labels_are_the_models_classes_by_folder_name(run):
    with MaskStore(run / "masks/small-gradcam.h5") as store:
        assert [record.label for record in store] == [0] * 5 + [1] * 5 + [2] * 5
        assert store.settings["labels"] == "model"
        assert [record.path for record in store][:2] == ["apple/0.png", "apple/1.png"]


def test_settings_say_what_the_masks_were_made_with(run):
    with MaskStore(run / "masks/small-layercam.h5") as store:
        settings = store.settings
    assert settings["cam"] == "layercam"
    assert settings["layer"] == "2+3"
    assert settings["thresholds"] == [round(0.1 * i, 1) for i in range(11)]
    assert settings["weights"] == small_float().weights_hash()
    assert settings["preprocessing"]["size"] == [32, 32]


def test_differences_are_told_in_words_of_users():
    held = {"share": 0.2, "seed": 0, "part": "train"}
    hashes = {"images_hash": "1f", "contents": "2e", "start": "3d"}
    made = {"images": 9, "every": True, "held": held, "masking": "soft", "files": ["a"], **hashes}
    assert differences(made, made) == []
    assert differences(made, {**made, "held": {**held, "seed": 3}}) == [
        "what is held out is 0.2 of each class by seed 0, asked for 0.2 of each class by seed 3"
    ]
    # What is not recorded is as by default.
    assert differences(made, {"images": 6, "masking": "soft"}) == [
        "contents of images differ",
        "--labels is all, asked for largest",
        "what is held out is 0.2 of each class by seed 0, asked for nothing",
        "images is 9, asked for 6",
        "names or labels of images differ",
        "weights that the training starts from differ",
    ]


def test_a_store_is_a_data_set_for_loaders_with_workers(run):
    with MaskStore(run / "masks/small-gradcam.h5") as store:
        alone = [record.tau for record in store]
        loader = DataLoader(store, batch_size=None, num_workers=2)
        assert [record.tau for record in loader] == alone
        with pickle.loads(pickle.dumps(store)) as copy:
            assert [record.tau for record in copy] == alone
        with pytest.raises(IndexError):
            store[15]
        assert store[-1].path == "plum/4.png"


def test_flipped_bytes_are_never_read_as_truth(run, tmp_path):
    rng = random.Random(0)
    original = (run / "masks/small-gradcam.h5").read_bytes()
    with MaskStore(run / "masks/small-gradcam.h5") as store:
        truth = store.rows(0, 15)
    path = tmp_path / "flipped.h5"
    refused = 0
    for _ in range(60):
        damaged = bytearray(original)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            with MaskStore(path) as store:
                store.verify()
                rows = store.rows(0, len(store))
        except AftError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert all(np.array_equal(a, b) for a, b in zip(rows, truth, strict=True))
    assert refused > 10


def test_a_torn_final_file_is_refused(run, tmp_path, images):
    original = (run / "masks/small-gradcam.h5").read_bytes()
    (tmp_path / "masks").mkdir()
    path = tmp_path / "masks/small-gradcam.h5"
    for offset in random.Random(1).sample(range(len(original)), 25):
        path.write_bytes(original[:offset])
        with pytest.raises(AftError, match=r"small-gradcam\.h5"):
            MaskStore(path)
        with pytest.raises(AftError, match="overwrite"):
            generate(images, tmp_path, ("gradcam",))
        assert path.read_bytes() == original[:offset]


def test_a_torn_part_is_no_part(tmp_path):
    rows = Rows(*(np.zeros((3, *shape), kind) for shape, kind in _COLUMNS))
    path = tmp_path / "part"
    write_part(path, rows, [Broken("a.png", "é broken")], {"cam": "gradcam", "list": [1, 2]})
    found, broken, settings = read_part(path)
    assert all(np.array_equal(a, b) for a, b in zip(found, rows, strict=True))
    assert broken == [Broken("a.png", "é broken")]
    assert settings == {"cam": "gradcam", "list": [1, 2]}
    whole = path.read_bytes()
    for offset in random.Random(2).sample(range(len(whole)), 25):
        path.write_bytes(whole[:offset])
        assert read_part(path) is None
        path.write_bytes(whole[:offset] + bytes(len(whole) - offset))
        assert read_part(path) is None
    assert read_part(tmp_path / "missing") is None


_COLUMNS = (
    ((), "S9"),
    ((), np.int32),
    ((), np.int32),
    ((), np.float32),
    ((11,), np.float32),
    ((11,), np.float32),
    ((), np.float32),
    ((7, 7), np.float16),
    ((7, 7), np.int32),
    ((7, 7), bool),
    ((0,), np.float32),
    ((), np.int64),
    ((2,), np.int64),
)


def test_other_files_are_refused_with_a_reason(tmp_path):
    with pytest.raises(AftError, match="no such mask file"):
        MaskStore(tmp_path / "missing.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(AftError, match="can't be read as a mask store"):
        MaskStore(tmp_path / "text.h5")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(AftError, match="mask store"):
        MaskStore(tmp_path / "foreign.h5")


@pytest.mark.parametrize("sizes", [(3, 5, 1, 9, 2), (4, 4), (1,), (0, 0), (0, 13, 0)])
def test_a_store_is_the_rows_of_its_blocks_whatever_their_sizes(run, tmp_path, monkeypatch, sizes):
    """Blocks are gathered to whole chunks of 4 rows here; the digest is of the rows alone."""
    monkeypatch.setattr(making, "APPENDED", 4)
    with MaskStore(run / "masks/small-gradcam.h5") as store:
        settings, rows = store.settings, store.rows(0, sum(sizes))
    parts, start = [], 0
    for number, size in enumerate(sizes):
        parts.append(tmp_path / str(number))
        own = hdf5.Rows(*(column[start : start + size] for column in rows))
        broken = [Broken(f"{number}.png", "gone")]
        making.write_part(parts[-1], own, broken, {})
        start += size
    plain = {k: v for k, v in settings.items() if k not in ("digest", "seal", "complete")}
    making.join_parts(tmp_path / "joined.h5", parts, plain)
    running = hashlib.sha256()
    hdf5.fold_rows(running, rows)
    with MaskStore(tmp_path / "joined.h5") as store:
        assert store.settings["digest"] == running.hexdigest()
        assert [b.path for b in store.broken] == [f"{i}.png" for i in range(len(sizes))]
        for found, expected in zip(store.rows(0, start), rows, strict=True):
            assert found.tobytes() == expected.tobytes() and found.dtype == expected.dtype
        assert [len(piece.path) for piece in store.verified()] or start == 0
        (names,) = store.columns(("path",), 1, 3)
        assert names.tolist() == rows.path[1:3].tolist()


def test_a_heap_of_texts_that_hdf5_would_walk_for_ever_is_refused(tmp_path):
    from aftcli.masks.hdf5 import HEAP, check_heaps

    def heap(*sizes, length=128):
        objects = b"".join(
            kind.to_bytes(2, "little") + bytes(6) + size.to_bytes(8, "little")
            for kind, size in sizes
        )
        return (HEAP + length.to_bytes(8, "little") + objects).ljust(length, b"\0")

    path = tmp_path / "x.h5"
    for sizes, good in (
        ([(0, 112)], True),  # free space alone
        ([(1, 0), (2, 0), (0, 80)], True),
        ([(0, 0)], False),  # no step forward
        ([(1, 2**64 - 16)], False),  # a step back
        ([(1, 200)], False),  # out of the heap
    ):
        path.write_bytes(b"before" + heap(*sizes))
        if good:
            check_heaps(path)
        else:
            with pytest.raises(ValueError, match="heap of texts is damaged"):
                check_heaps(path)
