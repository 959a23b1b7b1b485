"""The chain from Python, as a user calls it: files are named by text."""

from pathlib import Path

import pytest

import aftcli
from aftcli.aft.run import Options
from aftcli.evaluation.run import Plan
from aftcli.models.load import load_classifier  # the fixture replaces others
from tests.helpers import faulty
from tests.helpers.stored import small_float
from tests.helpers.trained import make_colours


@pytest.fixture
def f(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in ("models.load", "models.source", "evaluation.study"):
        monkeypatch.setattr(f"aftcli.{module}.load_classifier", faulty.load_small)
    make_colours(Path("data"), each=2)
    return small_float()


def test_files_are_named_by_text_as_by_paths(f):
    data = aftcli.open_data_set("data", "train", f.classes)
    search = aftcli.Search((0.3,))
    list(aftcli.generate_masks(f, data, "gradcam", "run", search, workers=0))
    store = aftcli.MaskStore("run/masks/small-gradcam.h5")
    jobs = [
        aftcli.mask_job(store, f, "data"),
        aftcli.control_job(small_float(), "data", None, None),
    ]
    list(aftcli.fine_tune(jobs, "run", aftcli.Recipe(epochs=1), Options(workers=0)))
    cards = [
        aftcli.read_card(f"run/tuned/small-{what}.safetensors") for what in ("gradcam", "control")
    ]
    assert [card["cam"] for card in cards] == ["gradcam", None]
    [study] = aftcli.find_studies("run")
    list(aftcli.evaluate_study(study, "run", Plan(workers=0)))
    assert len(list(Path("run/results").glob("*.safetensors"))) > 2


def test_what_is_no_list_of_judges_or_classes_is_said(f):
    data = aftcli.open_data_set("data", "train", f.classes)
    with pytest.raises(aftcli.AftError, match="^judges is 'mirror'; give a list of aftcli.Judge"):
        list(aftcli.generate_masks(f, data, "gradcam", "run", aftcli.Search(), judges="mirror"))
    assert not Path("run").exists()
    for classes in ("names.txt", Path("names.txt")):
        with pytest.raises(aftcli.AftError, match=r"^classes is .*names\.txt'\)?; give the names"):
            load_classifier("resnet18", classes=classes, weights=False)
