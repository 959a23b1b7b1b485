"""`aft evaluate` as people run it: tables, formats, figures, the page, what is refused."""

import base64
import csv
import io
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from typing import get_args

import pytest
import torch
from PIL import Image

from aftcli import attribution_map, load_classifier, read_image, to_input
from aftcli.cli.app import with_table
from aftcli.cli.evaluate import Format
from aftcli.core.methods import METHODS
from aftcli.data.images import view_of
from aftcli.data.objects import Objects
from aftcli.data.sets import open_data_set
from aftcli.errors import AftError
from aftcli.evaluation.sanity import randomised, sanity, similarity
from aftcli.measures.published import TABLE3
from aftcli.measures.registry import CONTROLLED, VARIANTS
from aftcli.options.read import tables
from aftcli.pages.printed import FORMATS
from tests.helpers.command import aft, usage_error
from tests.reference import metrics as slow

pytestmark = pytest.mark.slow

T = (0.0, 0.3, 0.6)


@pytest.fixture(scope="module")
def run(study, tuned, tmp_path_factory):
    """The study's run, copied, so that what is evaluated stays here."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    return shutil.copytree(study / "run", folder)


@pytest.fixture(scope="module")
def document(run):
    options = ("--thresholds", "0,0.3,0.6", "--baselines", "--json", "--quiet")
    done = aft("evaluate", "--table", *options, "--run", run)
    assert done.code in (0, None), done.err
    return json.loads(done.out)


class Seen:
    """A val image and its numbers, computed one by one."""

    def __init__(self, f, path, label):
        x = to_input(read_image(path), f.preprocessing)
        with torch.no_grad():
            y = f(x).softmax(1)[0]
        c = int(y.argmax())
        self.y, self.right = float(y[c]), c == label
        attribution = attribution_map(f, x, torch.tensor([c]), "gradcam")

        def probability(x):
            with torch.no_grad():
                return float(f(x).softmax(1)[0, c])

        # y of the mirrored image, and y_hat of each judge.
        self.by = {"self": self.y, "mirror": probability(x.flip(-1))}
        self.y_hat = {"self": {}, "mirror": {}}

        def y_hat(shown):
            return probability(x * shown)

        cut = torch.quantile(attribution.flatten().double(), METHODS["gradcam"].muted)
        for masking, weigh in (("binary", lambda m: (m != 0).float()), ("soft", lambda m: m)):
            curve = [y_hat(weigh(torch.where(attribution >= t, attribution, 0))) for t in T]
            rises = [max(v - self.y, 0) / self.y for v in curve]
            best = T[rises.index(max(rises))]
            for view, at in (("original", 0), ("tft", best), ("fixed", cut)):
                x_hat = x * weigh(torch.where(attribution >= at, attribution, 0))
                self.y_hat["self"][masking, view] = probability(x_hat)
                self.y_hat["mirror"][masking, view] = probability(x_hat.flip(-1))


def test_tables_equal_a_literal_loop_over_the_images(document, study, tuned):
    original, own = load_classifier(), load_classifier(checkpoint=tuned)
    data = open_data_set(study / "data", "val", original.classes)
    paths = [(data.picture(i), data.samples[i].label) for i in range(3)]
    images = {
        "original": [Seen(original, *each) for each in paths],
        "aft": [Seen(own, *each) for each in paths],
    }
    rows = [row for row in document["table3"] if row["variant"] in VARIANTS]
    assert len(rows) == 2 * 2 * 4 * 2 and {row["n"] for row in rows} == {3}
    assert [row["judge"] for row in rows] == (["self"] * 4 + ["mirror"] * 4) * 4
    assert {row["group"] for row in rows + document["differences"]} == {"faithfulness"}
    for row in rows:
        assert (row["dataset"], row["model"], row["cam"]) == (
            "data",
            "efficientnet_lite0",
            "gradcam",
        )
        literal = {"average_increase": slow.increase, "average_drop": slow.drop}[row["measure"]]
        whose = "aft" if row["variant"] == "aft" else "original"
        view = "original" if row["variant"] == "aft" else row["variant"]
        pairs = [(i.y_hat[row["judge"]], i.by[row["judge"]]) for i in images[whose]]
        values = [literal(y_hat[row["masking"], view], y) for y_hat, y in pairs]
        assert row["value"] == pytest.approx(sum(values) / 3, abs=1e-4), row
        assert row["ci"][0] <= row["value"] <= row["ci"][1]
    for row in document["table4"]:
        assert row["accuracy"] == sum(i.right for i in images[row["variant"]]) / 3
    assert [(r["variant"], r["cam"]) for r in document["table4"]] == [
        ("original", None),
        ("aft", "gradcam"),
    ]
    (timed,) = document["table5"]
    assert 0 < timed["without"] < timed["with"] and timed["device"]
    assert timed["delta"] == pytest.approx(timed["with"] - timed["without"])
    pairs = {(d["variant"], d["against"]) for d in document["differences"]}
    controls = {(row, name) for row, own in CONTROLLED.items() for name in own}
    plain = {("tft", "original"), ("tft", "fixed"), ("aft", "original"), ("aft", "tft")}
    assert pairs == plain | controls


def test_controls_stand_beside_the_rows_that_they_control(document):
    """Each of TFT and AFT, by both readings; by each judge where there are probabilities."""
    rows = [row for row in document["table3"] if row["variant"] not in VARIANTS]
    found = Counter((row["variant"], row["masking"]) for row in rows)
    kinds = {"shift": ["binary"], "gamma": ["soft"]}
    names = {name for own in CONTROLLED.values() for name in own}
    both = ["binary", "soft"]
    wanted = {(name, m) for name in names for m in kinds.get(name.split()[1], both)}
    # Two measures by two judges.
    assert found == {each: 4 for each in wanted} and {row["n"] for row in rows} == {3}
    assert document["settings"]["studies"][0]["thresholds"] == [0, 0.3, 0.6]


@pytest.fixture(scope="module")
def figures(run, document):
    """A second call, with everything that can be shown; the tables' numbers are there already."""
    options = ("--thresholds", "0,0.3,0.6", "--baselines", "--ci", "--paper", "--table", "all")
    done = aft("evaluate", *options, "--figures", "--run", run, "--image", "n02123159/0")
    assert done.code in (0, None), done.err
    return done


def test_text_has_the_papers_shape(figures, document):
    out = figures.out
    assert "Table 3 (efficientnet_lite0): binary masks, the paper's text" in out
    assert "Table 3 (efficientnet_lite0): soft masks, the authors' code" in out
    header = next(line for line in out.splitlines() if line.startswith("data set  CAM"))
    assert re.split(r"\s{2,}", header)[:8] == (
        ["data set", "CAM", "measure", "judge", "Original", "Fixed", "TFT", "AFT"]
    )
    value = {
        (row["variant"], row["measure"]): row["value"]
        for row in document["table3"]
        if row["masking"] == "soft" and row["judge"] == "self"
    }
    soft = out.split("soft masks")[1]
    line = next(each for each in soft.splitlines() if "Average Drop" in each)
    cells = re.findall(r"(\d\.\d{3}) \[", line)
    wanted = [f"{value[v, 'average_drop']:.3f}" for v in ("original", "fixed", "tft", "aft")]
    assert cells[:4] == wanted
    # The network itself comes first, then the judges, without published figures.
    lines = [each for each in soft.splitlines() if "Average Drop" in each][:2]
    assert [each.split()[4] for each in lines] == ["self", "mirror"]
    assert lines[0].split()[-1] != "-" and lines[1].split()[-6:] == ["-"] * 6
    # The published figures, and factors that the paper's own numbers give.
    assert re.search(r"Average Increase .* 0\.334 +0\.439 \(x1\.31\) +0\.449 \(x1\.34\)", out)
    assert "Table 4: accuracy" in out and "Table 5: seconds a map" in out
    assert "Paired differences" in out and "95 % intervals" in out
    assert "\x1b" not in out


class Page(HTMLParser):
    """Collects what a page refers to, its tables' rows and pictures."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.rows, self.open = [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [v for k, v in attributes if k in ("src", "href", "srcset", "action")]
        self.rows += tag == "tr"
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(figures, run):
    text = (run / "results/report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and page.rows > 12
    # Of three images, by two readings, the best two and the worst one.
    assert len(page.sources) == 3 + 2 * 3
    for i, source in enumerate(page.sources):
        kind, _, data = source.partition(",")
        is_figure = i < 3
        assert kind == f"data:image/{'png' if is_figure else 'jpeg'};base64"
        width = Image.open(io.BytesIO(base64.b64decode(data))).width
        assert width > 500 if is_figure else width <= 128
    # Of the pictures' letters and digits any word may come out by chance.
    written = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert len(written) < len(text)
    assert "http" not in written and "url(" not in written
    assert "aft evaluate" in text and re.search(r"thresholds</th><td>0, 0.3, 0.6<", text)
    for name in ("tau", "rpi", "0"):
        path = run / f"results/figures/efficientnet_lite0-data-{name}.png"
        assert f"wrote {path}" in figures.out
        assert Image.open(path).format == "PNG"


def again(run, *options):
    return aft("evaluate", "--thresholds", "0,0.3,0.6", "--run", run, "--quiet", *options)


@pytest.fixture(scope="module")
def texts(run, document):
    made = {}
    for name in ("csv", "markdown", "latex"):
        done = again(run, "--table", "all", "--format", name, "--paper")
        assert done.code in (0, None), done.err
        made[name] = done.out
    return made


def test_csv_has_a_line_a_number(texts, document):
    lines = list(csv.DictReader(io.StringIO(texts["csv"])))
    own = [line for line in lines if line["table"] == "table3"]
    columns = set(VARIANTS) - {"fixed"}
    rows = [row for row in document["table3"] if row["variant"] in columns]
    assert len(own) == len(rows)
    for line, row in zip(own, rows, strict=True):
        assert float(line["value"]) == row["value"] and int(line["n"]) == row["n"]
        assert [float(line["ci_low"]), float(line["ci_high"])] == row["ci"]
        for key in ("dataset", "model", "cam", "masking", "variant", "measure", "judge"):
            assert line[key] == row[key]
    assert [line["variant"] for line in lines if line["table"] == "table5"] == (
        ["without", "with", "delta"]
    )
    published = [line for line in lines if line["table"] == "paper table3"]
    assert len(published) == len(TABLE3) * 6


def test_markdown_and_latex_have_the_same_cells(texts):
    lines = [line for line in texts["markdown"].splitlines() if line.startswith("|")]
    widths = {line.replace("\\|", "").count("|") for line in lines}
    assert min(widths) >= 6 and len(lines) >= 8
    rows = [r for r in texts["markdown"].split("soft masks")[1].splitlines() if "Average Drop" in r]
    tex = texts["latex"].split("soft masks")[1]
    others = [r for r in tex.splitlines() if "Average Drop" in r]
    assert len(rows) == len(others) == 2
    for row, other in zip(rows, others, strict=True):
        cells = [cell.strip(" *") for cell in row.strip("|").split("|")]
        plain = re.sub(r"\\textbf\{(.*?)\}", r"\1", other.replace(r"($\times$", "(x"))
        assert [c.strip() for c in plain.removesuffix(r" \\").split("&")] == cells
    assert texts["latex"].count(r"\begin{tabular}") == texts["latex"].count(r"\end{tabular}") == 4
    assert re.search(r"efficientnet\\_lite0", texts["latex"])


def test_one_image_is_evaluated_without_an_interval(run):
    done = again(run, "--limit", "1", "--json", "--masking", "soft")
    document = json.loads(done.out)
    assert {(row["n"], row["ci"]) for row in document["table3"]} == {(1, None)}
    assert "table5" not in document and {r["masking"] for r in document["table3"]} == {"soft"}


def refused(*arguments):
    done = aft("evaluate", *arguments)
    assert (done.code, done.out) == (1, "")
    (line,) = done.err.splitlines()
    assert line.startswith("aft: ")
    return line


def test_without_masks_it_says_how_to_make_them(tmp_path):
    line = refused("--run", tmp_path / "nothing")
    assert "neither masks nor tuned classifiers" in line and "aft gen-masks" in line
    assert not (tmp_path / "nothing").exists()


def test_what_does_not_belong_together_is_refused(run, study, tmp_path):
    torch.manual_seed(0)
    other = load_classifier(weights=False)
    torch.save(other.weights(), tmp_path / "other.pth")
    line = refused("--run", run, "--checkpoint", tmp_path / "other.pth")
    assert "masks were made for another classifier: weights is" in line
    line = refused("--run", run, "--cam", "layercam")
    assert "by layercam" in line and "aft gen-masks" in line
    line = refused("--run", run, "--model", "resnet50")
    assert "of resnet50" in line
    moved = tmp_path / "without-masks"
    shutil.copytree(run / "tuned", moved / "tuned")
    line = refused("--run", moved, "--checkpoint", tmp_path / "other.pth", study / "data")
    assert "was tuned from other weights" in line and "--checkpoint" in line


def test_data_sets_that_can_not_be_evaluated_are_refused(run, study, tmp_path):
    (tmp_path / "empty" / "val" / "n02123159").mkdir(parents=True)
    assert "there is no image" in refused(tmp_path / "empty", "--run", run)
    assert "has no split 'test'" in refused("--run", run, "--split", "test")
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pets" / name / "0.png")
    line = refused(tmp_path / "pets", "--run", run)
    assert "not among the classes of efficientnet_lite0" in line and "--no-masks" in line
    assert "there is no such folder" in refused(tmp_path / "nowhere", "--run", run)


@pytest.mark.parametrize(
    "options, said",
    [
        (("--table", "9"), "no table '9'"),
        (("--format", "xml"), "'--format': 'xml' is not one of 'table', 'json', 'csv'"),
        (("--metrics", "adccc"), "nearest: adcc"),
        (("--masking", "hard"), "'hard' is not one of 'both', 'binary', 'soft'"),
        (("--cam", "gradcamm"), "unknown method"),
        (("--fill", "red"), "'red' is not one of 'mean', 'black', 'blur'"),
    ],
)
def test_wrong_words_are_usage_errors_and_named(tmp_path, options, said):
    assert said in usage_error(aft("evaluate", "--run", tmp_path, *options))


def test_wrong_thresholds_are_named(tmp_path):
    said = "must increase within [0, 1]"
    assert said in usage_error(aft("evaluate", "--run", tmp_path, "--thresholds", "0:2:1"))


def test_an_unknown_image_of_figure_3_is_named(run, document):
    done = again(run, "--figures", "--image", "zebra", "--baselines")
    assert done.code == 1 and "--image zebra: no image" in done.err


@pytest.mark.parametrize(
    ("name", "said"),
    [("zebra", "--image zebra: no image"), ("n02123159/0", "n02123159/0.png: is not a picture")],
)
def test_a_wrong_image_of_figure_3_is_refused_before_anything_is_measured(
    study, tmp_path, monkeypatch, name, said
):
    """One that is not there, and one that can't be read."""

    def measured(*_):
        raise AssertionError("an image was measured first")

    monkeypatch.setattr("aftcli.evaluation.run.evaluate_study", measured)
    data = shutil.copytree(study / "data", tmp_path / "data")
    (data / "val/n02123159/0.png").write_bytes(b"no picture")
    assert said in refused(data, "--run", study / "run", "--figures", "--image", name)


def test_tuned_networks_are_evaluated_without_their_masks(run, document, study, tmp_path):
    shutil.copytree(run / "tuned", tmp_path / "run/tuned")
    found = json.loads(again(tmp_path / "run", "--json").out)
    columns = set(VARIANTS) - {"fixed"}
    wanted = [row for row in document["table3"] if row["variant"] in columns]
    for row, other in zip(found["table3"], wanted, strict=True):
        assert row == {**other, "value": pytest.approx(other["value"], abs=1e-6), "ci": row["ci"]}


def test_a_bare_table_option():
    assert with_table(["evaluate", "--table"]) == ["evaluate", "--table", "all"]
    assert with_table(["evaluate", "--table", "/"]) == ["evaluate", "--table", "all", "/"]
    assert with_table(["evaluate", "--table", "3", "x"]) == ["evaluate", "--table", "3", "x"]
    long = "a" * 5000
    assert with_table(["evaluate", "--table", long])[2] == long
    assert with_table(["evaluate", "--table=4"]) == ["evaluate", "--table=4"]
    assert tables("1,3") == (1, 3) and tables(None) == (3, 4) and tables("all") == (3, 4, 5)
    assert tables("1,all") == (1, 3, 4, 5) and tables("all, 2,3") == (2, 3, 4, 5)
    with pytest.raises(AftError):
        tables("3,")


def test_formats_are_those_of_the_help():
    assert list(get_args(Format)) == list(FORMATS)
    help_ = " ".join(aft("evaluate", "--help").out.replace("│", "").split())
    first, *rest = FORMATS
    assert f"Print as: {first} (default), {', '.join(rest)}." in help_


# Tables 1 and 2 need no evaluation.
def test_tables_1_and_2(run, tmp_path):
    done = aft("evaluate", "--table", "1,2", "--run", run)
    assert re.search(r"Grad-CAM +85%", done.out) and re.search(r"Score-CAM +50%", done.out)
    assert re.search(r"data +3 +12 +3 \(val\)", done.out)


@pytest.fixture
def boxed(tmp_path):
    """A picture of 100 x 50, half the model's scale, with a box and without."""
    folder = tmp_path / "boxed" / "val" / "n02123159"
    folder.mkdir(parents=True)
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (100, 50)).save(folder / name)
    (tmp_path / "boxed/val_boxes.csv").write_text(
        "file,x1,y1,x2,y2\nn02123159/a.png,30,10,49,29\nn02123159/a.png,60,0,69,9\n"
        "n02123159/c.png,0,0,4,49\n"
    )
    return tmp_path / "boxed"


def test_boxes_lie_where_the_model_sees_them(boxed, lite0):
    data = open_data_set(boxed, "val", lite0.classes)
    objects = Objects(data, lite0.preprocessing)
    assert objects.kinds == {"boxes"} and list(objects.files()) == [boxed / "val_boxes.csv"]
    c = data.samples[0].label
    region = objects.regions(0, c).boxes
    view = view_of((100, 50), lite0.preprocessing)
    scale, (left, top) = view.scaled[0] / 100, view.crop[:2]
    for row in range(0, 224, 7):
        for column in range(0, 224, 7):
            x, y = (column + 0.5 + left) / scale, (row + 0.5 + top) / scale
            inside = (30 <= x < 50 and 10 <= y < 30) or (60 <= x < 70 and y < 10)
            assert bool(region[row, column]) == inside, (row, column)
    assert region.any()
    # No box; another class than the box's; a box that the crop leaves out.
    assert objects.regions(1, c).boxes is None
    assert objects.regions(0, c + 1).boxes is None
    assert objects.regions(2, c).boxes is None


def test_boxes_that_can_not_be_read_are_refused(boxed, lite0):
    (boxed / "val_boxes.csv").write_text("file,x1\nn02123159/a.png,3\n")
    with pytest.raises(AftError, match="columns are file,x1,y1,x2,y2"):
        Objects(open_data_set(boxed, "val", lite0.classes), lite0.preprocessing)


def test_objects_of_voc(tmp_path, lite0):
    root = tmp_path / "VOC2012"
    for folder in ("ImageSets/Segmentation", "JPEGImages", "Annotations", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("one\n")
    Image.new("RGB", (64, 64)).save(root / "JPEGImages/one.jpg")
    seen = Image.new("P", (64, 64))
    seen.paste(8, (0, 0, 32, 64))  # cat
    seen.paste(255, (32, 0, 40, 64))  # void
    seen.putpalette([i for i in range(256) for _ in range(3)])
    seen.save(root / "SegmentationClass/one.png")
    (root / "Annotations/one.xml").write_text(
        "<annotation><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>32</xmax>"
        "<ymax>64</ymax></bndbox></object></annotation>"
    )
    data = open_data_set(root, "val", lite0.classes)
    objects = Objects(data, lite0.preprocessing)
    assert objects.kinds == {"boxes", "segmentation"} and len(list(objects.files())) == 2
    found = objects.regions(0, 7)
    left = view_of((64, 64), lite0.preprocessing).crop[0]
    columns = [
        (c + 0.5 + left) * 64 / view_of((64, 64), lite0.preprocessing).scaled[0] for c in range(224)
    ]
    for region, right in ((found.boxes, 32), (found.segmentation, 32)):
        assert region[100].tolist() == [x < right for x in columns]
    assert found.counted[100].tolist() == [not 32 <= x < 40 for x in columns]
    nothing = objects.regions(0, 11)
    assert nothing.boxes is nothing.segmentation is None
    (root / "Annotations/one.xml").write_text("<annotation")
    with pytest.raises(AftError, match="can't be read"):
        objects.regions(0, 7)


def test_random_networks_forget_from_the_output_on():
    from tests.helpers.stored import small_float

    f = small_float()
    before = {k: v.clone() for k, v in f.weights().items()}
    stages = []
    for stage in randomised(f):
        changed = {k for k, v in stage.f.weights().items() if not torch.equal(v, before[k])}
        stages.append((stage.name, changed))
    names = {part: set(getattr(f, part).state_dict()) for part in ("head", "layer", "stem")}
    assert stages[0] == ("w2", names["head"])
    assert stages[1] == ("w1 and w2", names["head"] | names["layer"])
    assert stages[-1][0] == "all" and stages[-1][1] == set(before)
    assert all(torch.equal(v, before[k]) for k, v in f.weights().items())


def test_similarity_of_maps():
    from scipy import stats

    generator = torch.Generator().manual_seed(0)
    one, two = torch.rand(2, 3, 5, 6, generator=generator)
    x = torch.zeros(3, 3, 20, 24)
    same, other = similarity(one, one, x), similarity(one, two, x)
    assert same["spearman"].tolist() == pytest.approx([1, 1, 1])
    assert same["ssim"].tolist() == pytest.approx([1, 1, 1])
    for n in range(3):
        wanted = stats.spearmanr(one[n].flatten(), two[n].flatten()).statistic
        assert float(other["spearman"][n]) == pytest.approx(wanted, abs=1e-6)
    assert (other["ssim"] < 0.9).all()
    flat = similarity(one[:1], torch.zeros(1, 5, 6), x[:1])
    assert flat["spearman"].tolist() == [0] and len(flat["ssim"]) == 1


def test_maps_of_random_networks_differ(lite0, chelsea):
    found = sanity(lite0, chelsea, "gradcam", None)
    assert list(found)[-1] == "all/ssim" and len(found) == 12
    assert float(found["all/spearman"]) < 0.6 and float(found["all/ssim"]) < 0.8
    assert {k: v.tolist() for k, v in sanity(lite0, chelsea, "gradcam", None).items()} == {
        k: v.tolist() for k, v in found.items()
    }


def test_metrics_of_quantus_are_printed(run, document):
    options = ("--thresholds", "0,0.3,0.6", "--masking", "soft", "--table", "3", "--run", run)
    asked = ("--metrics", "average_drop,quantus:Sparseness")
    done = aft("evaluate", *asked, *options)
    assert done.code in (0, None), done.err
    (line,) = (each for each in done.out.splitlines() if "Sparseness" in each)
    assert re.search(
        r"Grad-CAM +complexity +Quantus Sparseness +self +0\.\d{3} +0\.\d{3} \(x", line
    )
    done = aft("evaluate", *asked, "--json", *options)
    rows = [r for r in json.loads(done.out)["table3"] if r["measure"] == "quantus:Sparseness"]
    assert [(row["variant"], row["group"], row["n"]) for row in rows] == [
        (variant, "complexity", 3) for variant in ("original", "tft", "aft")
    ]
    assert all(f"{row['value']:.3f}" in line for row in rows)
    done = aft("evaluate", "--metrics", "quantus:Sparsenes", *options)
    assert done.code == 2 and "nearest: Sparseness" in done.err
