"""Checkpoints: one file is all that is needed, and nothing but the right file is taken."""

import json
import random
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aftcli import AftError, load_classifier, read_image, to_input
from aftcli.core.classes import Classes
from aftcli.core.classifier import Classifier
from aftcli.files import write_tensors
from aftcli.models.checkpoint import checkpoint_of, read_card, restore
from tests.helpers.command import aft, usage_error

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def x(tuned):
    f = load_classifier()
    images = sorted((tuned.parents[2] / "data/train").rglob("*.png"))
    return torch.cat([to_input(read_image(path), f.preprocessing) for path in images])


def rebuilt(path, x):
    """Logits without aftcli: timm's network with the file's tensors."""
    import timm

    tensors = {k: v for k, v in load_file(path).items() if not k.startswith("aft_tuner.")}
    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(tensors)
    with torch.no_grad():
        return network.eval()(x)


def test_a_reloaded_checkpoint_has_the_same_logits_bit_for_bit(tuned, x):
    f = load_classifier(checkpoint=tuned)
    assert (f.name, f.layer_name, f.cam) == ("efficientnet_lite0", "conv_head+bn2", "gradcam")
    assert f.classes == load_classifier().classes
    with torch.no_grad():
        assert torch.equal(f(x), rebuilt(tuned, x))
        assert not torch.equal(f(x), load_classifier()(x))


def test_only_w1_and_w2_differ_from_the_original(tuned):
    f, original = load_classifier(checkpoint=tuned), load_classifier()
    for (name, a), b in zip(f.state_dict().items(), original.state_dict().values(), strict=True):
        trained = not name.startswith("stem.") and "running" not in name and "num_b" not in name
        assert torch.equal(a, b) != trained, name


def test_the_card_says_what_was_done(tuned, study):
    card = read_card(tuned)
    assert card["preprocessing"] == json.loads(json.dumps(vars(load_classifier().preprocessing)))
    assert len(card["classes"]["names"]) == len(card["classes"]["wnids"]) == 1000
    assert card["start"] == load_classifier().weights_hash()
    assert card["masks"]["thresholds"] == [0.3] and len(card["masks"]["digest"]) == 64
    assert card["data_set"] == str((study / "data/train").resolve())
    assert card["images"] == 12 and not card["new_head"] and card["seed"] == 0


def test_the_tuner_comes_back(tuned):
    f = load_classifier(checkpoint=tuned)
    tuner = restore(f, tuned, read_card(tuned))
    tensors = load_file(tuned)
    for name, value in tuner.state_dict().items():
        assert torch.equal(value, tensors[f"aft_tuner.{name}"])
    assert tuner(torch.zeros(1, 1280, 7, 7)).shape == (1, 7, 7)


def test_explain_takes_it_alone(tuned, tmp_path, chelsea):
    from tests.conftest import ROOT

    photo = ROOT / "docs/images/chelsea.jpg"
    done = aft("explain", photo, "--checkpoint", tuned, "--out", tmp_path, "--json")
    (result,) = json.loads(done.out)
    assert (result["model"], result["cam"]) == ("efficientnet_lite0", "gradcam")
    with torch.no_grad():
        y = load_classifier(checkpoint=tuned)(chelsea).softmax(1)[0]
    assert result["probability"] == pytest.approx(float(y.max()), rel=1e-6)
    # Another method may still be asked for.
    done = aft("explain", photo, "--checkpoint", tuned, "--out", tmp_path, "--cam", "layercam")
    assert done.code in (0, None) and "layercam" in done.out


def test_finetune_again_says_that_it_is_there(tuned, study):
    options = ("--objective", "tuner", "--epochs", "2", "--batch-size", "4", "--held-out", "0.2")
    before = tuned.stat().st_mtime_ns
    done = aft("finetune", "--run", study / "run", *options)
    assert done.code in (0, None) and "there already" in done.out
    assert tuned.stat().st_mtime_ns == before
    rows = [line.split() for line in done.out.splitlines()]
    assert [row[2:4] for row in rows if row[:1] == ["efficientnet_lite0"]] == [
        ["train,", "held"],
        ["train,", "held"],
        ["val", "3"],
        ["val", "3"],
    ]
    done = aft("finetune", "--run", study / "run", *options, "--lr", "0.01")
    assert done.code == 1
    assert "learning_rate is 0.0003, asked for 0.01; use the same ones" in done.err


def test_several_layers_are_tuned_together_by_the_command(study, tmp_path):
    (tmp_path / "masks").mkdir()
    shutil.copy(study / "run/masks/efficientnet_lite0-gradcam.h5", tmp_path / "masks")
    options = ("--epochs", "1", "--run", tmp_path, "--objective", "cam", "--quiet")
    done = aft("finetune", *options, "--layer", "blocks.6", "--layer", "conv_head+bn2", "--json")
    assert done.code in (0, None), done.err
    (card,) = json.loads(done.out)
    assert card["layer"] == "conv_head+bn2" and card["earlier_layers"] == ["blocks.6"]
    assert card["objective"] == "cam"
    f, original = load_classifier(checkpoint=card["path"]), load_classifier()
    start = original.weights()
    changed = {n.split(".")[0] for n, v in f.weights().items() if not torch.equal(v, start[n])}
    assert changed == {"blocks", "conv_head", "bn2", "classifier"}
    blocks = {n for n, v in f.weights().items() if "blocks" in n and not torch.equal(v, start[n])}
    assert all(name.startswith("blocks.6.") for name in blocks)
    # Other layers are other settings.
    done = aft("finetune", *options)
    assert done.code == 1 and "earlier_layers is ['blocks.6'], asked for []" in done.err
    done = aft("finetune", *options, "--overwrite", "--layer", "conv_head", "--layer", "blocks.6")
    assert done.code == 1 and "layer is conv_head+bn2, asked for blocks.6" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layer", "fc", "--layer", "conv_head+bn2"), "can't be tuned with conv_head"),
    ],
)
def test_options_that_make_no_sense_are_refused(study, options, message):
    done = aft("finetune", "--run", study / "run", *options)
    assert done.code == 1 and message in done.err and "Traceback" not in done.err


def test_masks_of_a_tuned_checkpoint_remember_it(tuned, study, tmp_path):
    """gen-masks --checkpoint, then finetune without: it finds the checkpoint by the store."""
    done = aft(
        *("gen-masks", study / "data", "--checkpoint", tuned, "--run", tmp_path),
        *("--limit", "3", "--thresholds", "0.3"),
    )
    assert done.code in (0, None), done.err
    done = aft("finetune", "--run", tmp_path, "--objective", "tuner", "--epochs", "1")
    assert done.code in (0, None), done.err
    card = read_card(tmp_path / "tuned/efficientnet_lite0-gradcam.safetensors")
    assert card["start"] == load_classifier(checkpoint=tuned).weights_hash()
    moved = tmp_path / "moved.safetensors"
    shutil.move(tmp_path / "tuned/efficientnet_lite0-gradcam.safetensors", moved)


def test_the_start_is_not_overwritten(tuned, study):
    before = tuned.read_bytes()
    done = aft("gen-masks", study / "data", "--checkpoint", tuned, "--run", study / "run")
    assert done.code == 1 and "weights is" in done.err
    own = tuned.with_name("efficientnet_lite0-control.safetensors")
    own.write_bytes(before)
    done = aft(
        *("finetune", study / "data", "--no-masks", "--checkpoint", own),
        *("--run", study / "run", "--overwrite"),
    )
    said = "the training starts from this file and would overwrite it; give another --run"
    assert done.code == 1 and said in done.err
    assert own.read_bytes() == before
    own.unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "resnet50"), "was tuned for --model efficientnet_lite0, asked for resnet50"),
        (("--layer", "blocks.5"), r"was tuned for --layer conv_head+bn2, asked for blocks.5"),
    ],
)
def test_another_model_or_layer_is_refused(tuned, tmp_path, options, message):
    from tests.conftest import ROOT

    photo = ROOT / "docs/images/chelsea.jpg"
    done = aft("explain", photo, "--checkpoint", tuned, *options, "--out", tmp_path)
    assert done.code == 1 and message in done.err


def test_torn_and_changed_files_are_refused(tuned, tmp_path):
    whole = tuned.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    rng = random.Random(2)
    path = tmp_path / "torn.safetensors"
    places = [rng.randrange(8) for _ in range(4)]
    places += [rng.randrange(8, 8 + header) for _ in range(12)]
    places += [rng.randrange(8 + header, len(whole)) for _ in range(8)]
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(6)]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        damaged.append(bytes(changed))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(AftError, match="damaged|can't be read as a checkpoint|is not a check"):
            load_classifier(checkpoint=path)


def test_a_foreign_safetensors_file_is_a_state_dict_or_refused(tuned, tmp_path, x):
    tensors = {k: v for k, v in load_file(tuned).items() if not k.startswith("aft_tuner.")}
    plain = tmp_path / "plain.safetensors"
    save_file(tensors, plain)
    assert read_card(plain) is None
    f = load_classifier(checkpoint=plain)
    assert f.cam is None
    with torch.no_grad():
        assert torch.equal(f(x), rebuilt(tuned, x))
    save_file({"something": torch.zeros(3)}, plain)
    with pytest.raises(AftError, match="is not a checkpoint of efficientnet_lite0"):
        load_classifier(checkpoint=plain)
    save_file({"a": torch.zeros(1)}, plain, {"aft": '{"card": {}}'})
    with pytest.raises(AftError, match="damaged"):
        load_classifier(checkpoint=plain)


def sealed_with(tuned, path, **changed):
    """A checkpoint with other entries in its card, as a later version might write it."""
    import hashlib

    with safe_open(tuned, "pt") as file:
        card = json.loads(file.metadata()["aft"])["card"] | changed
    text = json.dumps(card, sort_keys=True)
    seal = hashlib.sha256(text.encode()).hexdigest()
    metadata = {"aft": json.dumps({"card": card, "sha256": seal})}
    save_file(load_file(tuned), path, metadata)
    return path


def test_a_later_format_or_another_architecture_is_named(tuned, tmp_path):
    path = sealed_with(tuned, tmp_path / "later.safetensors", format_version=9)
    with pytest.raises(AftError, match="format 9, this aft reads format 1; upgrade aft"):
        load_classifier(checkpoint=path)
    path = sealed_with(tuned, tmp_path / "other.safetensors", model="resnet18", layer="layer4.1")
    with pytest.raises(AftError, match="do not fit resnet18 as it is installed here"):
        load_classifier(checkpoint=path)


def test_a_new_head_keeps_its_classes(tmp_path, x):
    f = load_classifier()
    from aftcli.models.load import with_new_head

    new = with_new_head(f, ("cat", "cup", "rocket"))
    assert isinstance(new, Classifier)
    path = tmp_path / "new.safetensors"
    write_tensors(path, *checkpoint_of(new, None, {}))
    loaded = load_classifier(checkpoint=path)
    assert loaded.classes == new.classes
    with torch.no_grad():
        assert torch.equal(loaded(x), new(x))
    with pytest.raises(AftError, match="has 3 classes, --classes names 2"):
        load_classifier(checkpoint=path, classes=("a", "b"))
    renamed = load_classifier(checkpoint=path, classes=("a", "b", "c"))
    assert renamed.classes.names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cam", "layercam"), "there are no masks by layercam (there is efficientnet_lite0-grad"),
        (("--model", "vgg16"), "there are no masks of vgg16"),
        (("--precision", "fp16"), "--precision fp16 can't be used on a CPU; use bf16"),
        (("elsewhere",), "elsewhere: there is no such folder"),
        (("elsewhere", "--no-masks"), "elsewhere: there is no such folder"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(study, options, message):
    run = study / "run"
    before = sorted(run.rglob("*"))
    done = aft("finetune", *options, "--run", run)
    assert done.code == 1 and message in done.err
    assert len(done.err.strip().splitlines()) == 1 and done.out == ""
    assert [p for p in sorted(run.rglob("*")) if p.suffix != ".lock"] == [
        p for p in before if p.suffix != ".lock"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cam", "gradcan"), "unknown method 'gradcan'; nearest: gradcam"),
        (("--objective", "cams"), "'cams' is not one of 'tuner', 'cam'"),
        (("--classification", "soft"), "'soft' is not one of 'labels', 'distillation'"),
        (("--cache", "ram"), "'ram' is not one of 'auto', 'memory', 'disk', 'off'"),
        (("--precision", "fp8"), "'fp8' is not one of"),
        (("--export", "tflite"), "'tflite' is not one of 'onnx'"),
        (("--consistency", "-1"), "consistency must be 0 or more, got -1"),
        (("--lam", "-1"), "lambda must be 0 or more, got -1"),
        (("--lr", "0"), "the learning rate must be above 0"),
        (("--held-out", "1"), "the held-out share must lie in [0, 1)"),
        (("--cache", "memory", "--augment"), "leave --cache out"),
        (("--no-masks", "--cam", "gradcam"), "--no-masks and --cam exclude each other"),
        (("--split", "val"), "--split goes with --no-masks"),
        (("--no-masks", "--lam", "2"), "--lam and --no-masks exclude each other"),
        (("--no-masks", "--consistency", "2"), "--consistency and --no-masks exclude each other"),
    ],
)
def test_wrong_values_name_the_right_ones_and_leave_nothing(study, options, message):
    run = study / "run"
    before = sorted(run.rglob("*"))
    assert message in usage_error(aft("finetune", *options, "--run", run))
    assert sorted(run.rglob("*")) == before


def test_without_masks_the_error_says_how_to_make_them(tmp_path):
    for options in ((), ("--no-masks",)):
        done = aft("finetune", *options, "--run", tmp_path / "run")
        assert done.code == 1 and "make them with aft gen-masks DATASET" in done.err
    assert not (tmp_path / "run").exists()


def test_class_names_may_be_a_tuple_a_list_or_classes():
    names = tuple(f"kind {i}" for i in range(1000))
    for given in (names, list(names), Classes(names)):
        f = load_classifier("squeezenet1_1", weights=False, classes=given)
        assert f.classes == Classes(names) and f.classes.name(7) == "kind 7"
