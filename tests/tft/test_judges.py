"""Judges: what others make of masks, against literal loops; stored, resumed, shared, shown."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aftcli.attributions.maps import attribution_map
from aftcli.core.classes import Classes, Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.core.methods import METHODS
from aftcli.data.blocks import Processes
from aftcli.data.objects import Regions
from aftcli.errors import AftError
from aftcli.evaluation.batch import measure_batch, passes
from aftcli.evaluation.run import evaluate_study
from aftcli.evaluation.study import Asked, find_studies
from aftcli.evaluation.tables import differences, table3
from aftcli.measures.registry import BASELINES, MOST_JUDGES, VARIANTS, judges
from aftcli.measures.values import Images, Unit, Wanted, measure
from aftcli.models.source import Source
from aftcli.networks.sources import imagenet_classes
from aftcli.settings import MODES, Search
from aftcli.tft import judges as judging
from aftcli.tft.judges import Judge, judged, load_judges
from aftcli.tft.masking import FILLS, MASKINGS
from aftcli.tft.scoring import judged_masks
from tests.evaluation.test_run import PLAN, UNITS, run_all, same, study_of
from tests.helpers.command import aft, usage_error
from tests.helpers.small import KINDS, MEAN, SIZE, STD, small_model
from tests.helpers.stored import NAMES, make_images, small_float
from tests.reference import metrics as slow
from tests.reference import paper as reference

pytestmark = pytest.mark.slow

T = (0.0, 0.3, 0.6, 1.0)
CAMS = ("gradcam", "xgradcam")
MIRROR = Judge("mirror")


def network(kind, seed, names, preprocessing):
    """The network as it is written and the same one cut, both in float64."""
    model = small_model(kind, seed)
    f = cut_classifier(model, KINDS[kind][1], preprocessing=preprocessing, classes=Classes(names))
    return model.eval(), f


class Case:
    """A network, another one of other size, colours and classes, and inputs of the first."""

    def __init__(self, seed, count=8):
        names = ("a", "b", "c", "d", "e")
        self.model, self.f = network(
            "linear", seed, names, Preprocessing(SIZE, None, mean=MEAN, std=STD)
        )
        generator = torch.Generator().manual_seed(seed)
        # Of different colours, so that not all are of one class.
        self.x = torch.randn(count, 3, *SIZE, dtype=torch.float64, generator=generator)
        self.x += 3 * torch.randn(count, 3, 1, 1, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            self.c = self.model(self.x).argmax(1).tolist()
        # Of the classes that are predicted the judge lacks one, and has the others elsewhere.
        assert len(set(self.c)) > 1
        self.lacks = names[self.c[0]]
        self.others = ["x" if n == self.lacks else n for n in names[3:] + names[:3]]
        other = Preprocessing((27, 16), 30, "bicubic", (0.1, 0.2, 0.3), (0.5, 0.4, 0.3))
        self.other, self.g = network("mixing", seed + 50, tuple(self.others), other)

    def whole(self, count=None):
        index = torch.arange(len(self.x))
        return Images(self.x[:count], index[:count], index[:count], lambda i, c: Regions())


def stretched(channel, height, width):
    """One channel, bilinear with antialiasing, pixel by pixel."""

    def weights(small, large):
        found = []
        scale, reach = large / small, max(large / small, 1)
        for i in range(small):
            centre = (i + 0.5) * scale
            own = [max(0.0, 1 - abs(j + 0.5 - centre) / reach) for j in range(large)]
            found.append([w / sum(own) for w in own])
        return found

    down, across = weights(height, len(channel)), weights(width, len(channel[0]))
    rows = [
        [sum(w * v for w, v in zip(own, line, strict=True)) for own in across] for line in channel
    ]
    return [
        [sum(w * line[j] for w, line in zip(own, rows, strict=True)) for j in range(width)]
        for own in down
    ]


def flipped(x):
    """An input, shape (3, H, W), with its columns in the other order."""
    found = torch.empty_like(x)
    for j in range(x.shape[2]):
        found[:, :, x.shape[2] - 1 - j] = x[:, :, j]
    return found


def by_another(case, x):
    """An input of f, shape (3, H, W), as the other network wants it."""
    p = case.g.preprocessing
    channels = []
    for k in range(3):
        colours = [[v * STD[k] + MEAN[k] for v in line] for line in x[k].tolist()]
        scaled = stretched(colours, *p.size)
        channels.append([[(v - p.mean[k]) / p.std[k] for v in line] for line in scaled])
    return torch.tensor(channels, dtype=torch.float64)


def literal(case, judge, x, c):
    """p(c | x) by a judge; None where it does not know the class."""
    with torch.no_grad():
        if judge.classifier is None:
            return float(case.model(flipped(x)[None]).softmax(1)[0, c])
        name = case.f.classes.names[c]
        if name not in case.others:
            return None
        scores = case.other(by_another(case, x)[None]).softmax(1)[0]
        return float(scores[case.others.index(name)])


def close(found, wanted):
    if wanted is None:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_judge_sees_what_the_network_saw(seed):
    case = Case(seed)
    c = torch.tensor(case.c)
    for judge in (MIRROR, Judge("other", case.g)):
        found = judged(judge, case.f, case.x, c)
        for n in range(len(case.x)):
            close(float(found[n]), literal(case, judge, case.x[n], case.c[n]))
            alone = judged(judge, case.f, case.x[n : n + 1], c[n : n + 1])
            torch.testing.assert_close(alone[0], found[n], atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fill", FILLS)
def test_every_view_is_judged_as_the_loop_does(masking, mode, fill):
    case = Case(1, 4)
    own = {"mirror": MIRROR, "other": Judge("other", case.g)}
    keys = {judge.key(case.f): judge for judge in own.values()}
    wanted = Wanted(Search(T, mode=mode), frozenset({BASELINES}), fill, judges=keys)
    units = [Unit(cam, masking) for cam in CAMS]
    found = measure_batch(case.f, case.whole(), units, wanted)
    filled = FILLS[fill](case.f, case.x)
    known = 0
    for unit, values in found.items():
        maps = attribution_map(case.f, case.x, torch.tensor(case.c), unit.cam)
        views = {"original", "tft"} | ({"fixed"} if METHODS[unit.cam].muted is not None else set())
        for key, judge in keys.items():
            verdict = values.judges[key]
            assert set(verdict.y_hat) == views
            for n, c in enumerate(case.c):
                y = literal(case, judge, case.x[n], c)
                close(float(verdict.y[n]), y)
                known += y is not None
                for view in views:
                    tau, how = {
                        "original": (0.0, "value"),
                        "fixed": (METHODS[unit.cam].muted, "percentile"),
                        "tft": (float(values.tau[n]), mode),
                    }[view]
                    shown = torch.from_numpy(reference.thresholded(maps[n].numpy(), tau, how))
                    weight = shown if masking == "soft" else (shown != 0).double()
                    x_hat = case.x[n] * weight + filled[n] * (1 - weight)
                    y_hat = literal(case, judge, x_hat, c)
                    close(float(verdict.y_hat[view][n]), y_hat)
                    for name, formula in (
                        ("average_increase", slow.increase),
                        ("average_drop", slow.drop),
                        ("average_gain", slow.gain),
                    ):
                        value = float(measure(values, view, name, key)[n])
                        if y is None:
                            assert math.isnan(value)
                        elif name == "average_drop" or abs(y_hat - y) > 1e-5:
                            assert value == pytest.approx(formula(y_hat, y), abs=2e-5)
    assert 4 * len(units) < known < 2 * 4 * len(units)  # both kinds of images are compared


def test_a_batch_is_judged_as_its_images_one_by_one():
    case = Case(1)
    judge = Judge("other", case.g)
    keys = {judge.key(case.f): judge, MIRROR.key(case.f): MIRROR}
    wanted = Wanted(Search(T), frozenset({BASELINES}), judges=keys)
    units = [Unit(cam, masking) for cam in CAMS for masking in MASKINGS]
    together = measure_batch(case.f, case.whole(), units, wanted)
    for n in range(len(case.x)):
        one = slice(n, n + 1)
        images = Images(case.x[one], torch.zeros(1), torch.tensor([n]), lambda i, c: Regions())
        for unit in units:
            (alone,) = measure_batch(case.f, images, [unit], wanted).values()
            columns = together[unit].columns()
            for name, values in alone.columns().items():
                if name.startswith("judge"):
                    torch.testing.assert_close(
                        values[0], columns[name][n], atol=1e-6, rtol=0, equal_nan=True
                    )


def test_a_judge_is_asked_about_a_whole_image_once_and_about_equal_masks_once():
    case, seen = Case(0), []
    case.g.classes = case.f.classes
    case.g.watch = seen.append
    judge = Judge("other", case.g)
    wanted = Wanted(Search(T), frozenset({BASELINES}), judges={judge.key(case.f): judge})
    units = [Unit(cam, "soft") for cam in CAMS]
    measure_batch(case.f, case.whole(), units, wanted)
    assert len(case.x) < sum(seen) <= len(case.x) * wanted.asked(len(units))
    seen.clear()
    # Masks that keep every pixel are not asked about.
    maps = torch.ones(len(case.x), *SIZE, dtype=torch.float64)
    judged_masks(
        judge,
        case.f,
        case.x,
        maps,
        torch.zeros(len(maps), 2, dtype=torch.float64),
        torch.tensor(case.c),
        torch.rand(len(maps)),
        torch.arange(len(maps)),
        Search(masking="binary"),
    )
    assert not seen
    plain = Wanted(Search(T))
    more = passes(plain._replace(judges={"judgemirror": MIRROR}), 2) - passes(plain, 2)
    assert more == 1 + 2 * 2 and passes(wanted, 2) == passes(wanted._replace(judges={}), 2)


LIST = imagenet_classes()


@pytest.mark.parametrize(
    ("own", "theirs", "wanted"),
    [
        (Classes(("cat", "dog")), Classes(("Dog", "bird", "cat")), [2, 0]),
        (Classes(("cat", "cow")), Classes(("Dog", "cat")), [1, -1]),
        (Classes(("n02123159", "n07920052")), LIST, [282, 967]),
        (Classes(("bird", "cow")), LIST, [-1, -1]),
        (Classes.numbered(3), Classes.numbered(3), [0, 1, 2]),
        (Classes.numbered(2), Classes.numbered(3), [-1, -1]),
        (Classes.numbered(2), Classes(("class 0", "b")), [-1, -1]),
    ],
)
def test_classes_are_matched_by_name_or_wnid(own, theirs, wanted):
    assert judging._matching(own, theirs).tolist() == wanted


def test_classes_of_imagenets_list_are_matched_by_wnid():
    assert judging._matching(LIST, LIST).tolist() == list(range(1000))
    heads = Classes(("n07920052", "n02123159"))
    found = judging._matching(LIST, heads).tolist()
    assert (found[967], found[282]) == (0, 1) and found.count(-1) == 998


def test_a_judge_without_a_common_class_is_refused():
    f = small_float()
    strange = small_float()
    strange.classes = Classes(("one", "two", "three"))
    with pytest.raises(AftError, match=r"--judge strange: has none of the 3 classes.*mirror"):
        Judge("strange", strange).check(f, "--judge")
    # As a state dict's are: the same number of classes says nothing of their order.
    strange.classes = Classes.numbered(3)
    with pytest.raises(AftError, match=r"strange: its 3 classes have no names.*finetune.*mirror"):
        Judge("strange", strange).check(f)
    strange.classes = Classes(("one", "two", NAMES[0]))
    Judge("strange", strange).check(f)
    MIRROR.check(f)


def test_a_judge_without_names_has_those_of_the_run():
    f, said = small_float(), []
    unnamed = Judge("unnamed", another(Classes.numbered(3).names).classifier)
    named = unnamed.named_by(f, said.append)
    named.check(f)
    assert "unnamed: its 3 classes have no names; taken to be those of small in the" in said.pop()
    assert named.classifier.classes == f.classes and len(unnamed.classifier.classes) == 3
    assert unnamed.classifier.classes == Classes.numbered(3)
    x = torch.rand(2, 3, *f.preprocessing.size)
    c = torch.tensor([0, 2])
    p = another().probabilities(f, x)
    assert torch.equal(judged(named, f, x, c), p[[0, 1], c]) and named.key(f) == another().key(f)
    # Other names, other counts and the network itself stay what they are.
    two = Judge("two", another(Classes.numbered(2).names).classifier)
    for judge in (another(), another(("one", "two", "three")), two, MIRROR):
        assert judge.named_by(f, said.append) is judge
    assert not said
    f.classes = Classes.numbered(3)
    assert unnamed.named_by(f, said.append) is unnamed and not said


def test_studies_are_found_with_their_judges(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "load", lambda self: small_float())
    strange = another(("one", "two", "three"))
    here = {"good": another(), "strange": strange}
    monkeypatch.setattr(
        "aftcli.evaluation.study.load_judges", lambda names, *_: tuple(here[n] for n in names)
    )

    def found(*names):
        data = base[0] / "data"
        asked = Asked(Source(), ["gradcam"], data=data, judges=names)
        return find_studies(tmp_path / "run", asked)

    assert found()[0].judges == () and found("good")[0].judges == (here["good"],)
    here["unnamed"] = another(Classes.numbered(3).names)
    with pytest.warns(UserWarning, match="classes have no names; taken to be"):
        assert found("unnamed")[0].judges[0].classifier.classes.names == NAMES
    with pytest.raises(AftError, match="has none of the 3 classes of small"):
        found("good", "strange")


def another(names=NAMES, scale=1.2):
    """A judge of its own weights, size and colours."""
    g = small_float()
    with torch.no_grad():
        next(iter(g.head.parameters())).mul_(scale)
    g.preprocessing = Preprocessing((36, 30), 40, mean=(0.3,) * 3, std=(0.2,) * 3)
    g.classes = Classes(tuple(names))
    return Judge("another", g)


def judged_study(root, *asked):
    return replace(study_of(root), judges=asked or (MIRROR, another()))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("judged")
    make_images(folder / "data", each=4)
    return folder, run_all(judged_study(folder / "data"), folder / "whole")


def nearly_same(one, two):
    """The same columns, equal up to rounding."""
    for key, result in one.results.items():
        assert set(result.columns) == set(two.results[key].columns)
        for name, values in result.columns.items():
            other = two.results[key].columns[name]
            torch.testing.assert_close(values, other, atol=1e-6, rtol=0, equal_nan=True)


def test_rows_are_means_of_what_judges_say(base):
    folder, whole = base
    study = whole.study
    rows = table3(whole, ("average_increase", "area"), tuple(VARIANTS))
    assert {(r.measure, r.judge) for r in rows} == {
        ("average_increase", "self"),
        ("average_increase", "mirror"),
        ("average_increase", "another"),
        ("area", "self"),
    }
    key = study.judge_keys["another"]
    for row in rows:
        if (row.judge, row.measure) == ("another", "average_increase"):
            source = {"aft": "aft", "control": "control"}.get(row.variant, "original")
            view = row.variant if source == "original" else "original"
            columns = whole.results[source, Unit(row.cam, row.masking)].columns
            pairs = zip(
                columns[f"{key}/{view}"].tolist(), columns[f"{key}/y"].tolist(), strict=True
            )
            values = [slow.increase(*pair) for pair in pairs]
            assert row.value == pytest.approx(sum(values) / 12, abs=1e-6) and row.n == 12
    assert {r.judge for r in differences(whole, ("average_drop",), ("tft", "original"))} == {
        "self",
        "mirror",
        "another",
    }
    only = table3(whole, ("average_drop",), ("original",), ["mirror"])
    assert {r.judge for r in only} == {"mirror"}
    with pytest.raises(AftError, match="unknown judge 'miror'; nearest: mirror"):
        table3(whole, ("average_drop",), ("original",), ["miror"])


def test_images_whose_class_the_judge_lacks_do_not_count(base, tmp_path):
    folder, whole = base
    c = whole.results["original", UNITS[0]].columns["class_index"]
    lacking = int(c[0])
    names = [n if i != lacking else "else" for i, n in enumerate(NAMES)]
    measured = run_all(judged_study(folder / "data", another(names)), tmp_path / "run")
    rows = table3(measured, ("average_drop",), ("original",))
    known = int((c != lacking).sum())
    assert {(r.judge, r.n) for r in rows} == {("self", 12)} | (
        {("another", known)} if known else set()
    )


@pytest.mark.parametrize("steps", [3, 9, 16])
def test_an_interrupted_evaluation_with_judges_resumes(base, tmp_path, steps):
    folder, whole = base
    begun = evaluate_study(judged_study(folder / "data"), tmp_path / "run", PLAN)
    for _ in range(steps):
        next(begun)
    begun.close()
    same(whole, run_all(judged_study(folder / "data"), tmp_path / "run"))
    assert not list((tmp_path / "run/results").glob(".*.parts"))


def evaluate_as_one_of(index, count, barrier, root, run):
    torch.set_num_threads(1)
    run_all(judged_study(root), run, processes=Processes(index, count, barrier.wait))


def test_two_processes_find_what_one_finds(base, tmp_path, processes):
    folder, whole = base
    barrier = processes.Barrier(2)
    both = [
        processes.Process(
            target=evaluate_as_one_of, args=(i, 2, barrier, folder / "data", tmp_path / "shared")
        )
        for i in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    shared = run_all(judged_study(folder / "data"), tmp_path / "shared")
    assert shared.reused
    nearly_same(whole, shared)


def test_results_are_reused_by_judge(base, tmp_path):
    """Without judges they serve for the network itself; a judge is added; a changed one again."""
    folder, whole = base
    data, run = folder / "data", tmp_path / "run"
    plain = run_all(study_of(data), run)
    added = run_all(judged_study(data), run)
    assert not added.reused
    same(whole, added)
    for key, result in plain.results.items():
        for name, values in result.columns.items():
            assert torch.equal(values.nan_to_num(7), added.results[key].columns[name].nan_to_num(7))
    # Fewer judges, none, another name, another order: all is there.
    for asked in ((another(),), (replace(another(), name="b"), MIRROR), (MIRROR,)):
        assert run_all(judged_study(data, *asked), run).reused
    assert run_all(study_of(data), run).reused
    assert not run_all(judged_study(data, another(scale=1.3)), run).reused
    renamed = another(("apple", "pear", "else"))
    assert renamed.key(study_of(data).f) != another().key(study_of(data).f)
    assert not list((run / "results").glob(".*.parts"))


def test_a_judge_is_asked_about_a_view_that_is_added_later(base, tmp_path):
    folder, whole = base
    data, run = folder / "data", tmp_path / "run"
    few = replace(PLAN, extras=PLAN.extras - {BASELINES})
    run_all(judged_study(data), run, few)
    # The fixed view comes while nobody else is at hand.
    assert not run_all(study_of(data), run).reused
    assert run_all(judged_study(data), run, few).reused is False
    # Masked images passed in other batches.
    nearly_same(whole, run_all(judged_study(data), run))
    assert run_all(judged_study(data), run).reused


def test_judges_run_on_the_engine_too(base, tmp_path):
    folder, _ = base
    asked, passed = [], []

    def accelerate(f, count):
        asked.append((f.preprocessing.size, count))
        fast = f.with_engine(None)
        fast.watch = lambda images: passed.append((f.preprocessing.size, images))
        return fast

    judge = another()
    study = replace(
        judged_study(folder / "data", judge), variants=study_of(folder / "data").variants[:1]
    )
    run_all(study, tmp_path / "run", replace(PLAN, accelerate=accelerate))
    # Of 12 images: the whole one, and of six maps the plain, the fixed and the tuned view.
    assert asked[1] == ((36, 30), 12 * (1 + 6 * 3))
    by_judge = sum(images for size, images in passed if size == (36, 30))
    assert 12 < by_judge <= asked[1][1]


def test_names_of_judges():
    assert judges(None) == ("mirror",) and judges(["none"]) == judges(["self"]) == ()
    assert judges(["self", "resnet50", "mirror", "resnet50"]) == ("resnet50", "mirror")
    for wrong in (["none", "mirror"], [f"resnet{i}" for i in range(MOST_JUDGES + 1)]):
        with pytest.raises(AftError):
            judges(wrong)


def test_judges_are_loaded_by_name_by_file_and_by_model_and_file(lite0, tmp_path):
    path = tmp_path / "mirror.pth"
    torch.save(lite0.weights(), path)
    found = load_judges(["mirror", "efficientnet_lite0", str(path), f"efficientnet_lite0={path}"])
    assert [j.name for j in found] == [
        "mirror",
        "efficientnet_lite0",
        str(path),
        f"efficientnet_lite0={path}",
    ]
    assert found[0].classifier is None and found[0].weights == ""
    assert len({j.key(lite0) for j in found}) == 2
    assert {j.weights for j in found[1:]} == {lite0.weights_hash()}
    renamed = Path(path.rename(tmp_path / "lite.pth"))
    assert [j.name for j in load_judges([str(renamed)])] == ["lite"]
    with pytest.raises(AftError, match=r"--judge .*gone.pth: there is no such checkpoint file"):
        load_judges([str(tmp_path / "gone.pth")])
    with pytest.raises(AftError, match=r"--judge resnet5: unknown model"):
        load_judges(["resnet5"])
    torch.save({"weight": torch.zeros(2)}, renamed)
    with pytest.raises(AftError, match=r"write --judge MODEL=.*lite.pth"):
        load_judges([str(renamed)])


def test_a_judge_that_cannot_be_asked_is_said(tmp_path):
    said = "--judge none stands alone"
    assert said in usage_error(
        aft("evaluate", "--run", tmp_path, "--judge", "none", "--judge", "mirror")
    )


def test_tables_with_and_without_judges(study, tmp_path):
    """A network that masked is told from one that did not."""
    options = ("--thresholds", "0,0.3", "--masking", "soft", "--quiet", "--limit", "2")
    command = ("evaluate", *options, "--table", "3", "--run", study / "run")
    judges = ("--judge", "efficientnet_lite1", "--judge", "mirror")
    done = aft(*command, *judges, "--ci")
    assert done.code in (0, None), done.err
    table, pairs = done.out.split("Paired differences")
    for part in (table, pairs):
        named = [line.split()[4] for line in part.splitlines() if "Average Drop" in line]
        if part is pairs:
            named = [line.split()[5] for line in part.splitlines() if "Average Drop" in line]
        assert named == ["self", "efficientnet_lite1", "mirror"]
        assert "flipped left-right" in part
    document = json.loads(aft(*command, *judges, "--json").out)
    assert {r["judge"] for r in document["table3"]} == {"self", "efficientnet_lite1", "mirror"}
    assert {r["judge"] for r in document["differences"]} == {"self", "efficientnet_lite1", "mirror"}
    (settings,) = document["settings"]["studies"]
    assert [j["name"] for j in settings["judges"]] == ["efficientnet_lite1", "mirror"]
    assert len(settings["judges"][0]["weights"]) == 64
    alone = aft(*command, "--judge", "none")
    assert "judge" not in alone.out and "mirror" not in alone.out
    by_default = json.loads(aft(*command, "--json").out)
    assert {r["judge"] for r in by_default["table3"]} == {"self", "mirror"}
    areas = json.loads(aft(*command, "--json", "--metrics", "area").out)
    assert {r["judge"] for r in areas["table3"]} == {"self"}
    assert areas["settings"]["studies"][0]["judges"] == []
    told = aft(*[o for o in command if o != "--quiet"], "--metrics", "area", "--judge", "mirror")
    assert "--judge has no effect on --metrics without probabilities" in told.err
