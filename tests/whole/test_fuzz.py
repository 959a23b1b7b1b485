"""Damaged files: the right result or one line, whatever the bytes are (the benchmark fuzz)."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aftcli.core.classes import Classes, read_classes
from aftcli.data.images import read_image
from aftcli.data.maps import read_map
from aftcli.errors import AftError
from aftcli.formats.voc import read_xml
from aftcli.masks.store import MaskStore
from aftcli.options.read import OUTPUTS
from aftcli.report import terminal as foreign
from aftcli.report.masks import summarise
from aftcli.settings import read_thresholds
from tests.helpers import bombs, mutants
from tests.helpers.command import aft
from tests.helpers.stored import generate, make_images, small_float

pytestmark = pytest.mark.slow

SEEDS = st.integers(0, 2**32)
PICTURES = {name: make() for name, make in mutants.PICTURES.items()}
MAPS = {name: make() for name, make in mutants.MAPS.items()}


def fuzz(examples):
    """The same examples on every machine."""
    return settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=examples,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to be in, with a picture, a mask store, and a small network for the commands."""
    folder = tmp_path_factory.mktemp("fuzz")
    f = small_float()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("aftcli.models.load.load_classifier", lambda *_, **__: f)
        mutants.photograph().save("photo.png")
        generate(make_images(folder / "fruit", each=2), folder / "run", ("gradcam",))
        yield folder


def outcome(*arguments, capfd=None):
    """The result, or None for an error of one line; anything else fails."""
    # Another picture of the same name would get names of its own, and a note.
    shutil.rmtree("aft-out", ignore_errors=True)
    result = aft(*arguments)
    if capfd:
        assert capfd.readouterr().err == ""  # what libraries write themselves
    assert not list(Path().rglob(".[0-9]*-*")) and not Path("EXECUTED").exists()
    if result.code in (0, None):
        assert result.err == ""
        return json.loads(result.out, parse_constant=lambda text: pytest.fail(text))
    line = result.err.removesuffix("\n")
    assert result.code == 1, result
    assert line.startswith("aft: ") and line.isprintable() and len(line) < 1000, result.err
    assert "fault of aft" not in line
    assert result.out in ("", "[]\n")
    return None


@fuzz(110)
@given(name=st.sampled_from(sorted(PICTURES)), seed=SEEDS, command=st.sampled_from(OUTPUTS))
def test_damaged_pictures(place, capfd, name, seed, command):
    data, _ = mutants.mutate(PICTURES[name], name, random.Random(seed))
    Path(name).write_bytes(data)
    kinds = "map" if command == "figure" else command  # a figure takes half a second
    found = outcome("explain", name, "--json", "--save", kinds, capfd=capfd)
    if found:
        assert 0 < found[0]["probability"] <= 1
        assert all(Path(path).stat().st_size for path in found[0]["outputs"].values())


@fuzz(110)
@given(name=st.sampled_from(sorted(MAPS)), seed=SEEDS)
def test_damaged_maps(place, capfd, name, seed):
    data, _ = mutants.mutate(MAPS[name], name, random.Random(seed))
    Path(name).write_bytes(data)
    arguments = ("tft", "photo.png", "--map", name, "--json", "--save", "map", "--quiet")
    found = outcome(*arguments, capfd=capfd)
    if found:
        assert 0 <= found[0]["tft"]["area"] <= 1


@fuzz(80)
@given(seed=SEEDS)
def test_damaged_stores(place, seed):
    store = Path("run/masks/small-gradcam.h5")
    rng = random.Random(seed)
    data = rng.choice(mutants.GENERIC)(store.read_bytes(), rng)
    Path("x.h5").write_bytes(data)
    found = outcome("gen-masks", "--show", "x.h5", "--json")
    if found:
        with MaskStore(store) as whole:
            assert found["settings"] == whole.settings and found["images"] == len(whole)


STORED = {"classes": "x", "cam": None, "split": np.nan}


@pytest.mark.parametrize("key", STORED)
def test_stores_of_other_settings(place, key):
    value = STORED[key]
    Path("x.h5").write_bytes(Path("run/masks/small-gradcam.h5").read_bytes())
    with h5py.File("x.h5", "r+") as file:
        del file.attrs[key]
        if value is not None:
            file.attrs[key] = value
    result = aft("gen-masks", "--show", "x.h5", "--json")
    assert (result.code, result.out) == (1, "") and result.err.startswith("aft: x.h5: ")


def test_labels_beyond_the_classes(place, monkeypatch):
    monkeypatch.setattr("aftcli.report.masks._classes_of", lambda store: Classes(("one",)))
    with MaskStore("run/masks/small-gradcam.h5") as store, pytest.raises(AftError, match="beyond"):
        summarise(store)


@fuzz(30)
@given(seed=SEEDS)
def test_damaged_class_names(place, seed):
    data, _ = mutants.mutate(b"apple\npear\nplum, damson\n", "names.txt", random.Random(seed))
    Path("names.txt").write_bytes(data)
    outcome("explain", "photo.png", "--classes", "names.txt", "--json", "--save", "none")


@fuzz(150)
@given(text=st.text("0123456789.:,-e ", max_size=24) | st.text(max_size=12))
def test_any_text_as_thresholds(text):
    try:
        values = read_thresholds(text)
    except AftError as error:
        assert foreign.plain(str(error)).count("\n") == 0
    else:
        assert values and all(0 <= value <= 1 for value in values)
        assert all(a < b for a, b in zip(values, values[1:], strict=False))


@fuzz(100)
@given(start=st.floats(0, 1), length=st.floats(0, 1), step=st.floats(1e-4, 1.5), text=st.text())
def test_any_range_of_thresholds(start, length, step, text):
    stop = min(start + length, 1)
    values = read_thresholds(f"{start}:{stop}:{step}")
    assert values[0] == pytest.approx(start, abs=1e-9)
    assert values[-1] <= stop < values[-1] + step * (1 + 1e-5) + 1e-9
    assert not set(foreign.plain(text)) & set("\n\r\x1b\x7f\u2028\u202e\ud800")


def test_a_step_that_ends_beside_the_stop_does_not_pass_it():
    assert read_thresholds("0:1:0.50000001") == (0, 0.50000001, 1)


@pytest.mark.parametrize("name", ["x.eps", "x.jpg", "x.png"])
def test_no_picture_runs_a_program(place, monkeypatch, name):
    from PIL import EpsImagePlugin

    def run(*_, **__):
        raise AssertionError("runs Ghostscript")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    Path(name).write_bytes(bombs.EPS)
    for arguments in (("explain", name), ("tft", "photo.png", "--map", name)):
        result = aft(*arguments)
        assert (result.code, result.err) == (
            1,
            f"aft: {name}: is not a picture in a known format, or is damaged\n",
        )


def test_what_libtiff_says_is_not_printed_too(place, capfd):
    data = bytearray(PICTURES["deflate.tif"])
    data[20:60] = bytes(40)
    Path("x.tif").write_bytes(data)
    assert outcome("explain", "x.tif", capfd=capfd) is None
    os.write(2, b"still open\n")
    assert capfd.readouterr().err == "still open\n"


def test_an_image_whose_explanation_is_no_number(place, monkeypatch):
    f = small_float()
    # The logits overflow, their gradients do not.
    f.head.get_submodule("6").weight.data.fill_(1e34)
    f.head.get_submodule("6").bias.data.fill_(3.4028e38)
    monkeypatch.setattr("aftcli.models.load.load_classifier", lambda *_, **__: f)
    result = aft("explain", "photo.png", "--json")
    assert result.code == 1 and "gives NaN or infinite numbers" in result.err


def test_large_sides_and_scans_are_refused(tmp_path):
    for name in ("wide.png", "scans.jpg", "claim.png", "claim.jpg", "claim.gif", "claim.tif"):
        bombs.BOMBS[name](tmp_path / name)
        with pytest.raises(AftError, match=r"is too large \(.*\); scale it down first"):
            read_image(tmp_path / name)


READ = """
import sys
from pathlib import Path
from aftcli.core.classes import Preprocessing
from aftcli.data.images import read_image
from aftcli.data.maps import read_map
from aftcli.data.images import to_input
from aftcli.errors import AftError

def status(name):
    return int(dict(line.split(":", 1) for line in open("/proc/self/status"))[name].split()[0])

before = status("VmRSS")
for folder in map(Path, sys.argv[1:]):
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix in (".npy", ".npz"):
                read_map(path)
            else:
                to_input(read_image(path), Preprocessing())
            print("right", end=" ")
        except AftError as error:
            print("error" if str(error).isprintable() else "lines", end=" ")
    print((status("VmHWM") - before) * 1024 / 1e8)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_bombs_and_100_megapixels_take_bounded_memory(tmp_path):
    """The peak above what the process has before: bytes a pixel of 100 megapixels."""
    claims, large = tmp_path / "claims", tmp_path / "large"
    claims.mkdir()
    large.mkdir()
    for name, make in bombs.BOMBS.items():
        if name not in ("zeros.png", "claim-within.jpg"):
            make(claims / name)
    bombs.png_claim(large / "rgba.png", bombs.SIDE, bombs.SIDE, 8, 6, bombs.SIDE)
    bombs.png_claim(large / "grey.png", bombs.SIDE, bombs.SIDE, 16, 0, bombs.SIDE)
    command = [sys.executable, "-c", READ, str(claims), str(large)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    refused, read = (line.split() for line in done.stdout.splitlines())
    assert refused[:-1] == ["error"] * len(list(claims.iterdir()))
    assert float(refused[-1]) < 3
    assert read[:-1] == ["right"] * 2
    assert 4 < float(read[-1]) < 9


HUGE = {
    "claim.npy": "is too large (1000000 x 1000000 values",
    "strings.npy": "a map holds numbers, this holds <U500000000",
    "header.npz": "can't be read as a map",
    "zeros.npz": "is too large (9000 x 9000 values",
}


@pytest.mark.parametrize("name", HUGE)
def test_maps_are_refused_by_their_headers(tmp_path, name):
    bombs.BOMBS[name](tmp_path / name)
    with pytest.raises(AftError) as error:
        read_map(tmp_path / name)
    assert HUGE[name] in str(error.value)


def test_a_zipped_map_is_checked_to_its_end(tmp_path):
    data = bytearray(MAPS["stored.npz"])
    place = data.find(b"\x93NUMPY") + 3000
    data[place] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(AftError, match="CRC"):
        read_map(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["fifo", "device", "large"])
def test_class_names_come_from_a_file_of_bounded_size(tmp_path, monkeypatch, name):
    monkeypatch.setattr("aftcli.files.LARGEST_TEXT", 999)
    path = tmp_path / name
    if name == "fifo":
        os.mkfifo(path)
    elif name == "device":
        path = Path("/dev/zero")
    else:
        path.write_text("name\n" * 200)
    wanted = "larger than 999 bytes" if name == "large" else "no regular file"
    with pytest.raises(AftError, match=f"can't be read as class names.*{wanted}"):
        read_classes(path)


@fuzz(150)
@given(seed=SEEDS)
def test_any_bytes_as_an_annotation(place, seed):
    rng = random.Random(seed)
    content = b"<a><b>1</b><c x='2'>text &amp; more</c><b/></a>"
    Path("x.xml").write_bytes(rng.choice(mutants.GENERIC)(content, rng))
    try:
        assert read_xml(Path("x.xml")).tag
    except ValueError as error:
        assert "\n" not in str(error)
