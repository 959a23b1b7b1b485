"""Masks of a data set that judges choose with the network: as of single images, never mixed."""

import json

import h5py
import pytest
import torch

from aftcli import AftError, MaskStore
from aftcli.attributions.maps import attribution_map
from aftcli.core.classes import Classes
from aftcli.data.blocks import Processes
from aftcli.data.images import read_image, to_input
from aftcli.data.sets import open_data_set
from aftcli.masks.generate import generate_masks
from aftcli.masks.hdf5 import SEAL, seal_of
from aftcli.masks.settings import differences, store_settings
from aftcli.report.masks import summarise
from aftcli.settings import JUDGES, Search
from aftcli.tft.judges import Judge, judges_named, judges_of
from aftcli.tft.search import fine_tune_threshold
from tests.helpers.stored import NAMES, generate, make_images, small_float
from tests.masks.test_generate import METHODS, assert_same, content
from tests.tft.test_judges import MIRROR, another

# The second one does not know the first class, so it is not asked about its images.
LACKING = ("else", *NAMES[1:])


def judges():
    return MIRROR, another(LACKING)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "fruit", each=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory, images):
    """A run in one go, with one thread as the others have."""
    folder, threads = tmp_path_factory.mktemp("run"), torch.get_num_threads()
    torch.set_num_threads(1)
    generate(images, folder, judges=judges(), workers=0)
    yield folder
    torch.set_num_threads(threads)


def begin(images, run, **options):
    """A run that stores two images at a time."""
    f = small_float()
    data = open_data_set(images, None, f.classes)
    asked = {"block": 2, "batch": 2, "workers": 0, "judges": judges(), **options}
    return generate_masks(f, data, METHODS, run, Search(), **asked)


@pytest.mark.parametrize("search", ["exact", "fast"])
def test_each_threshold_is_that_of_the_image_alone(images, run, tmp_path, search):
    if search == "fast":
        run = tmp_path
        generate(images, run, judges=judges(), settings=Search(search=search), workers=0)
    f, alone = small_float(), 0
    for method in METHODS:
        with MaskStore(run / f"masks/small-{method}.h5") as store:
            assert len(store) == 12
            for i, record in enumerate(store):
                x = to_input(read_image(images / record.path), f.preprocessing)
                c = record.class_index
                attribution = attribution_map(f, x, c, method)
                asked = {"judges": judges(), "search": search}
                wanted = fine_tune_threshold(f, x, attribution, c, **asked)
                assert record.tau == float(wanted.tau)
                assert torch.equal(store.full_mask(i), wanted.mask[0])
                own = {"rtol": 1e-4, "atol": 1e-5, "equal_nan": True}
                torch.testing.assert_close(record.probabilities, wanted.probabilities[0], **own)
                torch.testing.assert_close(record.rpi, wanted.rpi[0], **own)
                without = fine_tune_threshold(f, x, attribution, c, search=search)
                alone += record.tau != float(without.tau)
    assert alone  # images whose threshold judges move


def test_a_stopped_run_resumes_to_the_same_store(images, run, tmp_path):
    begun = begin(images, tmp_path)
    for _ in range(5):
        next(begun)
    begun.close()
    assert list((tmp_path / "masks").glob(".*.parts/0*"))
    # The order of the judges changes nothing.
    assert list(begin(images, tmp_path, judges=judges()[::-1]))[0].images
    assert_same(content(tmp_path), content(run))


def test_two_processes_make_the_store_of_one(images, run, tmp_path):
    first, second = (
        begin(images, tmp_path, processes=Processes(i, 2, lambda: None)) for i in (0, 1)
    )
    next(first)  # which makes the folders
    both = list(second), list(first)
    assert all(sum(done.images for done in steps[1:]) for steps in both)
    assert_same(content(tmp_path), content(run))


@pytest.mark.parametrize("finished", [True, False])
def test_a_store_of_other_judges_is_refused(images, tmp_path, finished):
    begun = begin(images, tmp_path, judges=(another(),))
    for _ in begun if finished else range(5):
        next(begun, None)
    begun.close()
    own, heavy, lacking = (
        judges_named([judge.recorded(small_float())])
        for judge in (another(), another(scale=1.3), another(LACKING))
    )
    assert len({own, heavy, lacking}) == 3
    renamed = Judge("renamed", another().classifier)
    others = {
        "none": (),
        "mirror": (MIRROR,),
        f"{own}, mirror": (MIRROR, another()),
        own.replace("another", "renamed"): (renamed,),
        heavy: (another(scale=1.3),),
        lacking: (another(LACKING),),
    }
    for named, asked in others.items():
        with pytest.raises(AftError) as refused:
            list(begin(images, tmp_path, judges=asked))
        said = f"was begun with other settings: tft_judges is {own}, asked for {named}; use the"
        assert said in str(refused.value)
    list(begin(images, tmp_path, judges=(another(),)))


def test_a_store_without_judges_is_as_it_always_was(images, run, tmp_path):
    f = small_float()
    data = open_data_set(images, None, f.classes)
    plain = store_settings(f, data, Search())
    assert JUDGES not in plain and plain == store_settings(f, data, Search(), ())
    assert differences(plain, {**plain, JUDGES: []}) == []
    asked = store_settings(f, data, Search(), judges())
    assert {key for key in asked if key not in plain} == {JUDGES}
    with pytest.raises(AftError, match="tft_judges is another .*, mirror, asked for none; use"):
        list(begin(images, run, judges=()))


def test_masks_of_other_judges_are_told_apart():
    mirror = {JUDGES: [MIRROR.recorded(small_float())]}
    assert judges_of("run", [{}, {JUDGES: []}]) == [] == judges_of("run", [])
    assert judges_of("run", [mirror, mirror]) == mirror[JUDGES]
    with pytest.raises(AftError, match=r"different --tft-judges \(mirror; none\); choose some by"):
        judges_of("run", [mirror, {}])
    tuned, now = {"masks": {"digest": "a"}}, {"masks": {"digest": "b", **mirror}}
    assert differences(tuned, now) == ["masks: tft_judges is none, asked for mirror"]
    again = {"masks": {"digest": "b"}}
    assert differences(tuned, again) == ["masks: they were made again, of other content"]


def test_judges_that_know_none_of_the_classes_are_refused_at_the_start(images, tmp_path):
    with pytest.raises(AftError, match="judge another: has none of the 3 classes of small"):
        next(begin(images, tmp_path, judges=(another(("one", "two", "three")),)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("judge", ["mirror", {"name": "mirror"}, {"name": 1}])
def test_a_foreign_file_without_proper_judges_is_refused(run, tmp_path, judge):
    path = tmp_path / "store.h5"
    path.write_bytes((run / "masks/small-gradcam.h5").read_bytes())
    with MaskStore(path) as store:
        made = {**store.settings, JUDGES: [judge]}
    with h5py.File(path, "r+") as file:
        file.attrs[JUDGES] = json.dumps(made[JUDGES])
        file.attrs[SEAL] = seal_of(made)
    with pytest.raises(AftError, match="its tft_judges are not judges"):
        MaskStore(path)


def test_figures_of_a_store_are_those_at_its_thresholds(images, run, tmp_path):
    thresholds, counted = torch.tensor(Search().thresholds), 0
    for method in METHODS:
        with MaskStore(run / f"masks/small-{method}.h5") as store:
            gains, raised = [], 0
            for record in store:
                at = int((thresholds == record.tau).nonzero())
                gains.append(float(record.rpi[at]))
                y, y_hat = record.probability, float(record.probabilities[at])
                raised += y_hat > y * (1 + 1e-4 * (1 - y) + 2.0**-21)  # a rise beyond rounding
            summary = summarise(store)
            assert summary.rpi == pytest.approx(sum(gains) / len(gains), rel=1e-5)
            assert summary.raised == raised / len(gains)
            counted += raised
    assert counted == sum(done.raised for done in begin(images, tmp_path))


def test_of_two_classes_that_are_taken_for_the_same_the_settings_differ():
    """The question to a judge depends on how its classes match."""
    f = small_float()
    f.classes = Classes(("pear", "apple", "plum"))
    assert another().recorded(f)["key"] != another().recorded(small_float())["key"]
    assert another().recorded(f)["weights"] == another().recorded(small_float())["weights"]
