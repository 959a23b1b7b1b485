"""Whose images a run's networks have seen: the control, the masks, and what is evaluated on."""

import json
import os
import shutil
from pathlib import Path

import pytest

from aftcli.aft.jobs import control_job, control_jobs, mask_job
from aftcli.aft.loss import in_situation
from aftcli.aft.run import Options, Tuned, fine_tune
from aftcli.cli.evaluate import TableOutput, evaluated
from aftcli.data.blocks import Processes, content_of, pack, unpack
from aftcli.data.parts import choose_held_out
from aftcli.errors import AftError
from aftcli.evaluation import study as evaluate_jobs
from aftcli.evaluation.run import Plan
from aftcli.evaluation.study import Asked, find_studies
from aftcli.masks.store import MaskStore
from aftcli.models.checkpoint import read_card
from aftcli.models.source import Source
from aftcli.options.groups import EvaluateRun
from aftcli.pages.grids import Shown
from aftcli.pages.printed import as_csv, as_dict, as_text
from tests.helpers.stored import generate, small_float
from tests.helpers.trained import SETTINGS, make_colours

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Load the small network, whatever checkpoint is named."""
    monkeypatch.setattr(Source, "load", lambda self: small_float())
    monkeypatch.setattr(evaluate_jobs, "load_classifier", lambda *_, **own: small_float())


@pytest.fixture
def images(tmp_path):
    return make_colours(tmp_path / "colours")


def masks(root, run, cam="gradcam", limit=None):
    generate(root, run, (cam,), limit=limit)
    return MaskStore(run / f"masks/small-{cam}.h5")


def train(job, run, overwrite=False, **settings):
    """Tune on a job for an epoch; the card."""
    chosen = in_situation(**{**SETTINGS, "objective": "tuner", "epochs": 1, **settings})
    options = Options(workers=0, save_every=0, overwrite=overwrite)
    (done,) = (e for e in fine_tune([job], run, chosen, options) if isinstance(e, Tuned))
    return done.card


def names_of(store):
    rows = store.rows(0, len(store))
    return [(os.fsdecode(bytes(p)), int(n)) for p, n in zip(rows.path, rows.label, strict=True)]


def seen_by(job, card):
    """The images that a job is trained on, and those held out, by name."""
    samples = job.data_set.samples
    names, labels = [s.name for s in samples], [s.label for s in samples]
    return choose_held_out(names, labels, card["held_out"], card["seed"])


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("moved", [False, True])
def test_the_control_trains_on_the_images_of_the_masks(images, tmp_path, limit, moved):
    run = tmp_path / "run"
    store = masks(images, run, limit=6)
    where = Path(shutil.copytree(images, tmp_path / "copy")) if moved else None
    (job,) = control_jobs(run, Source(), where, limit=limit)
    found = [(s.name, s.label) for s in job.data_set.samples]
    assert found == names_of(store)[:: 1 if limit is None else 2] and not job.new_head
    other = mask_job(store, small_float(), where, limit)
    card, against = train(job, run), train(other, run)
    assert seen_by(job, card) == seen_by(other, against)
    for key in ("images", "images_hash", "split", "trained_on", "learning_rate", "epochs"):
        assert card[key] == against[key]
    (study,) = find_studies(run, Asked(Source()))
    assert [v.name for v in study.variants] == ["original", "control", "aft"]
    contents = {content_of(job.data_set.root / name) for name, _ in found}
    assert all(unpack(each["trained_contents"]) == contents for each in (card, against))


def test_a_control_can_not_be_of_other_images_than_the_masks(images, tmp_path):
    run = tmp_path / "run"
    masks(images, run)
    with pytest.raises(AftError, match=r"the masks are of train.*on val is no control.*--split"):
        control_jobs(run, Source(), split="val")
    other = make_colours(tmp_path / "other", each=4, seed=1)
    with pytest.raises(AftError, match=r"other: does not hold the images of .*leave DATASET out"):
        control_jobs(run, Source(), other)
    (job,) = control_jobs(tmp_path / "new", Source(), other)
    assert len(job.data_set.samples) == 12
    masks(images, run, "layercam", limit=6)
    with pytest.raises(AftError, match=r"different images .*18 of .* and .*6 of .*another --run"):
        control_jobs(run, Source())
    (images / "train/pear/2.png").write_bytes(b"")
    (run / "masks/small-layercam.h5").unlink()
    with pytest.raises(AftError, match="1 images have changed"):
        control_jobs(run, Source())


def test_a_control_trained_otherwise_is_refused_and_the_difference_named(images, tmp_path):
    run = tmp_path / "run"
    # Before there are masks, the control takes the whole split.
    train(control_job(small_float(), images, None, None), run)
    store = masks(images, run, limit=6)
    train(mask_job(store, small_float()), run)
    with pytest.raises(AftError) as error:
        find_studies(run, Asked(Source()))
    said = str(error.value)
    assert "small-control.safetensors: is no control of small-gradcam.safetensors" in said
    assert "images 18 and 6;" in said and "--no-masks --overwrite" in said
    (job,) = control_jobs(run, Source())
    for settings, named in (
        ({"seed": 1}, "trained with other settings: seed 1 and 0;"),
        ({"held_out": 0.5, "batch": 2}, "held-out share 0.5 and 0.2; batch size 2 and 5;"),
        ({"learning_rate": 0.01}, "learning rate 0.01 and 0.001;"),
    ):
        train(job, run, overwrite=True, **settings)
        with pytest.raises(AftError, match=named):
            find_studies(run, Asked(Source()))
    train(job, run, overwrite=True)
    assert len(find_studies(run, Asked(Source()))[0].variants) == 3


@pytest.mark.parametrize("tuned", [False, True])
def test_two_data_sets_in_one_run_are_not_evaluated_as_one(images, tmp_path, tuned):
    run = tmp_path / "run"
    # Of the same names, so that only what the files hold tells them apart.
    other = make_colours(tmp_path / "other", seed=1)
    for root, cam in ((images, "gradcam"), (other, "layercam")):
        store = masks(root, run, cam)
        if tuned:
            train(mask_job(store, small_float()), run)
            store.path.unlink()
    said = r"different data sets \(.*gradcam.* of colours, train; .*layercam.* of other, "
    with pytest.raises(AftError, match=rf"{said}train\); name .* aft evaluate DATASET"):
        find_studies(run, Asked(Source()))
    (study,) = find_studies(run, Asked(Source(), ["layercam"]))
    assert study.data_set.root == (other / "val").resolve()
    (study,) = find_studies(run, Asked(Source(), data=images))
    assert study.data_set.root == images / "val" and study.cams == ("gradcam", "layercam")


def test_a_copy_of_a_data_set_is_the_same_one(images, tmp_path):
    run = tmp_path / "run"
    copy = Path(shutil.copytree(images, tmp_path / "copy"))
    masks(images, run)
    store = masks(copy, run, "layercam")
    train(mask_job(store, small_float(), images, 3), run)
    (study,) = find_studies(run, Asked(Source()))
    assert study.data_set.root == (images / "val").resolve()


def test_images_that_were_trained_on_are_said(images, tmp_path, capsys):
    run = tmp_path / "run"
    store = masks(images, run, limit=6)
    train(mask_job(store, small_float()), run)
    (job,) = control_jobs(run, Source())
    train(job, run)
    renamed = tmp_path / "renamed"
    shutil.copytree(images / "train", renamed)
    for path in renamed.rglob("*.png"):
        path.rename(path.with_name(f"x{path.name}"))
    plan, output = Plan(("soft",), workers=0), TableOutput(metrics="average_drop")
    how = EvaluateRun(run=run, quiet=True)

    def tables_of(where, split=None):
        asked = Asked(Source(), data=where, split=split)
        return evaluated(find_studies(run, asked), plan, output, how, Processes())

    same = {"dataset": "renamed", "model": "small", "n": 18}
    for where, split in ((renamed, None), (images, "train")):
        tables = tables_of(where, split)
        document = as_dict(tables, Shown())
        json.dumps(document)
        rows = [{**row, "dataset": "renamed"} for row in document["seen"]]
        assert rows == [
            {**same, "cam": None, "variant": "control", "seen": 6},
            {**same, "cam": "gradcam", "variant": "aft", "seen": 6},
        ]
        as_text(tables, Shown(ci=True))
        out = capsys.readouterr().out
        said = "Trained on images that it is evaluated on: Control 6 of 18; AFT (Grad-CAM) 6 of 18."
        assert out.count(said) == 3
        as_csv(tables, Shown())
        out = capsys.readouterr().out
        assert out.count("images trained on,6,,,18") == 2
    tables = tables_of(images)
    assert [row["seen"] for row in as_dict(tables, Shown())["seen"]] == [0, 0]
    as_text(tables, Shown())
    as_csv(tables, Shown())
    assert "rained on" not in capsys.readouterr().out


def test_what_a_network_started_from_counts_as_trained_on(images, tmp_path):
    other = make_colours(tmp_path / "other", each=2, seed=1)
    first = train(control_job(small_float(), other, None, None), tmp_path / "start")
    f = small_float()
    f.checkpoint = str(tmp_path / "start/tuned/small-control.safetensors")
    card = train(control_job(f, images, None, None), tmp_path / "run")
    both = {content_of(p) for root in (images, other) for p in root.glob("train/*/*.png")}
    assert unpack(card["trained_contents"]) == both > unpack(first["trained_contents"])
    assert read_card(tmp_path / "run/tuned/small-control.safetensors") == card
    assert unpack(pack([])) == frozenset()
