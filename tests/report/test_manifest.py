"""manifest.json: what it lists, names that it keeps apart, kills, damage, calls side by side."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import aftcli
from aftcli.errors import AftError
from aftcli.locks import BusyError, waiting
from aftcli.report import manifest as listing
from aftcli.report.manifest import Manifest, writing
from tests.helpers.command import aft, leftovers, objects
from tests.helpers.stored import draw

pytestmark = pytest.mark.usefixtures("f")

OUT = Path("out")


@pytest.fixture(autouse=True)
def out(picture):
    OUT.mkdir()


def image(path, content):
    """A file that nobody decodes here."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)
    return Path(path)


def call(images, notes=None, files=("overlay.png",), close=True):
    """Write files for images as a command does; return the names that they begin with."""
    manifest = Manifest(OUT, {"command": "aft"}, (notes if notes is not None else []).append)
    names = manifest.names({path: path.stem for path in images})
    for path in images:
        for kind in files:
            target = OUT / f"{names[path]}-{kind}"
            with writing(manifest, target, {names[path]: path}, {"kind": kind}) as temporary:
                temporary.write_bytes(path.read_bytes())
    if close:
        manifest.close()
    return [names[path] for path in images]


def read():
    return json.loads((OUT / "manifest.json").read_bytes())


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_command_lists_what_made_each_file(f):
    draw("in/b.png", seed=2)
    options = ("--cam", "gradcam", "--cam", "layercam", "--tft", "--fill", "black", "--save")
    before = time.time()
    found = objects("explain", "a.png", "in/b.png", *options, "overlay,map")
    files = json.loads(Path("aft-out/manifest.json").read_text())["files"]
    by_file = {Path(p).name: r for r in found for p in r["outputs"].values()}
    assert set(files) == set(by_file) == {*leftovers(Path("aft-out"))}
    for name, entry in files.items():
        result = by_file[name]
        kind = next(kind for kind, p in result["outputs"].items() if Path(p).name == name)
        assert entry["kind"] == kind
        if kind == "overview":
            assert entry["image"] == [os.path.abspath("a.png"), os.path.abspath("in/b.png")]
            assert entry["sha256"] == [sha256("a.png"), sha256("in/b.png")]
        else:
            assert entry["image"] == os.path.abspath(result["image"])
            assert entry["sha256"] == sha256(result["image"])
        keys = ("model", "layer", "cam", "class_index", "class_name")
        if kind in ("overlay", "map"):
            assert {k: entry[k] for k in keys} == {k: result[k] for k in keys}
        assert entry["settings"]["fill"] == "black" and entry["settings"]["tft"] is True
        assert entry["version"] == aftcli.__version__
        assert entry["command"].startswith("aft explain a.png in/b.png --cam gradcam")
        when = time.strptime(entry["time"], "%Y-%m-%dT%H:%M:%S+00:00")
        assert before - 1 <= time.mktime(when) - time.timezone <= time.time()
    [grid] = [entry for name, entry in files.items() if name.startswith("a-") and "grid" in name]
    assert [each["cam"] for each in grid["shows"]] == ["gradcam", "layercam"]


def test_without_files_there_is_no_manifest(f):
    objects("explain", "a.png", "--save", "none")
    assert leftovers(Path("aft-out")) == [] and not Path("aft-out/manifest.json").exists()


def test_names_follow_the_content_of_images():
    a, b = image("a/photo.jpg", b"one"), image("b/photo.jpg", b"two")
    notes = []
    assert call([a], notes) == ["photo"]
    own = f"photo-{sha256(b)[:6]}"
    assert call([b], notes) == [own]
    assert notes == [f"out: has files of another image named photo; those of {b} are named {own}"]
    # The same content under another name, and a file that is only touched.
    assert call([image("c/photo.jpg", b"two"), image("d/other.jpg", b"one")]) == [own, "other"]
    os.utime(a, (1, 1))
    assert call([a, b], notes := []) == ["photo", own]
    assert len(notes) == 1
    # Another content in the same place.
    image(a, b"three")
    assert call([a]) == [f"photo-{sha256(a)[:6]}"]
    assert {p.name: p.read_bytes() for p in OUT.glob("*.png")} == {
        "photo-overlay.png": b"one",
        f"{own}-overlay.png": b"two",
        f"photo-{sha256(a)[:6]}-overlay.png": b"three",
        "other-overlay.png": b"one",
    }


def test_names_differ_in_more_than_case_and_take_more_digits_where_few_are_taken():
    a, b = image("a/photo.jpg", b"one"), image("b/Photo.jpg", b"two")
    digest = sha256(b)
    taken = image("c/x.jpg", b"four").rename(f"c/PHOTO-{digest[:6]}.jpg")
    assert call([a, taken]) == ["photo", f"PHOTO-{digest[:6]}"]
    notes = []
    assert call([b], notes) == [f"Photo-{digest[:12]}"]
    assert len(notes) == 1
    more = [image(f"{i}/photo.jpg", bytes([i])) for i in range(3)]
    manifest = Manifest(OUT, {}, notes.append)
    manifest.names({path: f"{'photo' if i else 'free'}" for i, path in enumerate(more)})
    assert notes[1].endswith("; so are 1 more")


def test_names_of_images_without_files_are_free_again():
    a, b = image("a/photo.jpg", b"one"), image("b/photo.jpg", b"two")
    call([a], files=())  # it could not be explained
    assert call([b]) == ["photo"]
    (OUT / "photo-overlay.png").unlink()
    assert call([a]) == ["photo"]
    assert set(read()["files"]) == {"photo-overlay.png"}
    assert read()["images"]["photo"]["sha256"] == sha256(a)
    # While its call runs, a name without files is taken.
    running = Manifest(OUT, {}, print)
    assert running.names({image("a/new.jpg", b"3"): "new"}) == {Path("a/new.jpg"): "new"}
    assert call([image("b/new.jpg", b"4")]) == [f"new-{sha256('b/new.jpg')[:6]}"]
    running.close()
    assert call([image("c/new.jpg", b"5")]) == ["new"]


def test_images_that_can_not_be_read_take_no_name():
    gone = Path("gone/photo.jpg")
    manifest = Manifest(OUT, {}, print)
    assert manifest.names({gone: "photo"}) == {gone: "photo"}
    manifest.close()
    assert call([image("a/photo.jpg", b"one")]) == ["photo"]
    assert Manifest(OUT, {}, print).names({gone: "photo"}) == {gone: "photo"}


def test_files_that_are_not_listed_are_overwritten_with_a_note():
    a = image("a/photo.jpg", b"one")
    for kind in ("overlay.png", "mask.png", "new.png"):
        (OUT / f"photo-{kind}").write_bytes(b"-")
    notes = []
    call([a], notes, files=("overlay.png", "mask.png"))
    said = "overwrote photo-overlay.png and 1 more file, which manifest.json did not list"
    assert notes == [f"out: {said}"]
    call([a], notes := [], files=("overlay.png", "mask.png"))
    assert notes == []


@pytest.mark.parametrize(
    "option",
    [("--checkpoint", "one.pth"), ("--classes", "one.txt"), ("--target-fn", "one.py:mean")],
)
def test_files_of_other_weights_are_overwritten_with_a_note(f, option):
    path = Path(option[1].partition(":")[0])
    path.write_text({".pth": "-", ".txt": "x\ny\nz"}.get(path.suffix, MEAN))
    Path("two.pth").write_text("+")

    def notes(*options):
        result = aft("explain", "a.png", *options, "--json", "--save", "overlay,mask")
        assert result.code == 0, result.err
        return result.err, [Path(p).name for p in json.loads(result.out)[0]["outputs"].values()]

    said, files = notes(*option)
    assert said == ""
    assert notes(*option) == ("", files)
    path.write_text(path.read_text() + "\n")
    other = f"aft: aft-out: overwrote {files[0]} and 1 more file, made with another content of"
    assert notes(*option) == (f"{other} {path.name}\n", files)
    assert notes(*option) == ("", files)
    assert notes(*option, "--colormap", "jet")[0] == ""
    found = json.loads(Path("aft-out/manifest.json").read_text())["files"][files[0]]["inputs"]
    assert found == {os.path.abspath(path): sha256(path)}


MEAN = """
def mean(out):
    return out.mean(1)
"""
DAMAGED = [
    *(b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": 2}', b"{}"),
    *(b'{"format": 1, "files": []}', b'{"format": 1, "files": {"a.png": 3}}'),
    *(b'{"format": 1, "files": {"a.png": {"stem": []}}}', b'{"format": 1, "images": {"a": "b"}}'),
]


@pytest.mark.parametrize("damage", [*DAMAGED, "half"], ids=lambda each: str(each)[:30])
def test_a_damaged_manifest_is_said_and_kept(damage):
    a, b = image("a/photo.jpg", b"one"), image("b/photo.jpg", b"two")
    call([a])
    path = OUT / "manifest.json"
    damage = path.read_bytes()[:-20] if damage == "half" else damage
    path.write_bytes(damage)
    notes = []
    assert call([b], notes, files=("mask.png",)) == ["photo"]
    assert len(notes) == 1 and notes[0].startswith("out/manifest.json: is damaged, or of another")
    assert (OUT / "manifest.json.bak").read_bytes() == damage
    assert set(read()["files"]) == {"photo-mask.png"}


def test_values_of_a_foreign_manifest_are_not_trusted():
    a = image("a/photo.jpg", b"one")
    odd = {"image": ["x"], "sha256": 7, "size": None, "extra": {}}
    entry = {"stem": "photo", "image": None}
    (OUT / "photo-overlay.png").touch()
    foreign = {"format": 1, "images": {"photo": odd}, "files": {"photo-overlay.png": entry}}
    (OUT / "manifest.json").write_text(json.dumps(foreign))
    assert call([a]) == [f"photo-{sha256(a)[:6]}"]


def test_a_manifest_that_can_not_be_written_stops_no_file(monkeypatch):
    a = image("a/photo.jpg", b"one")
    replacing = listing.replacing

    @contextmanager
    def full(path):
        if path.name == "manifest.json":
            raise OSError(28, "No space left on device")
        with replacing(path) as temporary:
            yield temporary

    monkeypatch.setattr(listing, "replacing", full)
    wrong = r"out/manifest.json: can't be written \(No space left on device\); it does not list 2"
    with pytest.raises(AftError, match=wrong):
        call([a], files=("overlay.png", "mask.png"))
    assert leftovers(OUT) == ["photo-mask.png", "photo-overlay.png"]


def test_a_file_that_is_not_written_is_not_listed():
    a = image("a/photo.jpg", b"one")
    manifest = Manifest(OUT, {}, print)
    manifest.names({a: "photo"})
    with pytest.raises(AftError, match="photo-map.npy: can't be written"):
        with writing(manifest, OUT / "photo-map.npy", {"photo": a}, {}):
            raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt), writing(manifest, OUT / "b.png", {"photo": a}, {}):
        raise KeyboardInterrupt
    manifest.close()
    assert (read()["files"], read()["images"]) == ({}, {})


def test_files_are_listed_while_the_call_runs(monkeypatch):
    monkeypatch.setattr(listing, "PAUSE", 0)
    monkeypatch.setattr(listing, "SHARE", 1e9)
    a = image("a/photo.jpg", b"one")
    call([a], files=[f"{i}.png" for i in range(4)], close=False)
    # The last one was not there yet when it was listed.
    assert set(read()["files"]) == {f"photo-{i}.png" for i in range(3)}


# A call whose process is killed at a point of a write of the manifest.
KILLED = """
import os, signal, sys
from pathlib import Path
from aftcli.report import manifest as listing
listing.PAUSE = 0
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
folder, point = Path("out"), sys.argv[1]
m = listing.Manifest(folder, {}, print)
image = Path("b/photo.jpg")
name = m.names({image: "photo"})[image]
replace = os.replace
def replaced(*paths):
    if Path(paths[1]).name == "manifest.json":
        if point == "before":
            die()
        replace(*paths)
        die()
    replace(*paths)
def half(self, text, **_):
    with self.open("w") as file:
        file.write(text[: len(text) // 2])
    die()
if point == "half":
    Path.write_text = half
else:
    os.replace = replaced
with listing.writing(m, folder / f"{name}-overlay.png", {name: image}, {}) as temporary:
    temporary.write_bytes(image.read_bytes())
m.close()
"""


@pytest.mark.parametrize("point", ["before", "half", "after"])
def test_a_kill_leaves_a_whole_manifest_and_names_taken(point):
    a, b = image("a/photo.jpg", b"one"), image("b/photo.jpg", b"two")
    call([a])
    killed = subprocess.run([sys.executable, "-c", KILLED, point], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    own = f"photo-{sha256(b)[:6]}"
    listed = {"photo-overlay.png"} | ({f"{own}-overlay.png"} if point == "after" else set())
    assert set(read()["files"]) == listed
    assert set(read()["images"]) == {"photo", own}
    # The next calls find their names and say nothing but them; nothing is left of the killed one.
    c = image("c/photo.jpg", b"three").rename(f"c/{own}.jpg")
    assert call([a], notes := []) == ["photo"] and notes == []
    assert call([c]) == [f"{own}-{sha256(c)[:6]}"]
    assert call([b]) == [own]
    assert (OUT / f"{own}-overlay.png").read_bytes() == b"two"
    assert not [path.name for path in OUT.iterdir() if path.name.startswith(".")]


SIDE_BY_SIDE = """
import sys
from pathlib import Path
from aftcli.report import manifest as listing
listing.PAUSE, listing.SHARE = 0, 1e9
folder, images = Path("out"), [Path(sys.argv[1], n) for n in ("photo.jpg", "same.jpg")]
m = listing.Manifest(folder, {"who": sys.argv[1]}, lambda text: None)
names = m.names({image: image.stem for image in images})
print("ready", flush=True)
sys.stdin.read(1)
for i in range(10):
    for image, name in names.items():
        with listing.writing(m, folder / f"{name}-{i}.png", {name: image}, {}) as temporary:
            temporary.write_bytes(image.read_bytes())
m.close()
"""


def test_calls_side_by_side_keep_their_names_and_list_all():
    pipe, calls = subprocess.PIPE, "abc"
    for who in calls:
        image(f"{who}/photo.jpg", who.encode())
        image(f"{who}/same.jpg", b"same")
    running = [
        subprocess.Popen([sys.executable, "-c", SIDE_BY_SIDE, who], stdin=pipe, stdout=pipe)
        for who in calls
    ]
    for process in running:
        assert process.stdout.readline() == b"ready\n"
    for process in running:
        process.communicate(b"\n")
        assert process.returncode == 0
    found = read()
    # Images of one content share a name; others have one each.
    [plain] = [
        who for who in calls if found["images"]["photo"]["sha256"] == sha256(f"{who}/photo.jpg")
    ]
    names = {
        who: "photo" if who == plain else f"photo-{sha256(f'{who}/photo.jpg')[:6]}" for who in calls
    }
    expected = {f"{names[who]}-{i}.png": who.encode() for who in calls for i in range(10)}
    expected |= {f"same-{i}.png": b"same" for i in range(10)}
    shared = [name for name in found["images"] if name.startswith("same")]
    for name in shared[1:]:
        expected |= {f"{name}-{i}.png": b"same" for i in range(10)}
    assert {p.name: p.read_bytes() for p in OUT.iterdir() if p.suffix == ".png"} == expected
    assert set(found["files"]) == set(expected)
    for name, entry in found["files"].items():
        assert entry["sha256"] == hashlib.sha256(expected[name]).hexdigest()
    assert not [path.name for path in OUT.iterdir() if path.name.startswith(".")]


HOLDING = """
import sys, time
from pathlib import Path
from aftcli.locks import waiting
with waiting(Path("out/manifest.json")):
    print("held", flush=True)
    sys.stdin.read(1)
"""


def test_a_lock_is_waited_for_and_given_back():
    target, pipe = OUT / "manifest.json", subprocess.PIPE
    command = [sys.executable, "-c", HOLDING]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BusyError), waiting(target, 0.05):
            pass
        holder.stdin.write(b"\n")
        holder.stdin.flush()
        with waiting(target):
            assert [path.name for path in OUT.iterdir()] == [".manifest.lock"]
    assert list(OUT.iterdir()) == []


def test_a_lock_whose_file_was_removed_is_taken_again(monkeypatch):
    """Its holder may remove it between another process's opening and locking of it."""
    from aftcli import locks

    target, removed, missing = OUT / "manifest.json", [], locks._without_locks

    def late(descriptor, path):
        if not removed:
            removed.append(os.fstat(descriptor).st_ino)
            (OUT / ".manifest.lock").unlink()
        return missing(descriptor, path)

    monkeypatch.setattr(locks, "_without_locks", late)
    with waiting(target):
        assert removed and (OUT / ".manifest.lock").exists()
    assert list(OUT.iterdir()) == []


def test_a_held_manifest_ends_a_command_with_advice(f, monkeypatch):
    @contextmanager
    def busy(path):
        raise BusyError("held")
        yield

    monkeypatch.setattr(listing, "waiting", busy)
    result = aft("explain", "a.png")
    assert result.code == 1
    assert result.err.startswith("aft: aft-out/manifest.json: another process has held it for too")


def test_outputs_of_many_images_are_listed_once_each(f, monkeypatch):
    """Writes of the list take a small share of the time, however many files there are."""
    writes = []
    text = listing._text
    monkeypatch.setattr(listing, "_text", lambda listed: writes.append(1) or text(listed))
    monkeypatch.setattr(listing, "PAUSE", 1e9)
    for i in range(12):
        Image.fromarray(np.full((40, 40, 3), i, np.uint8)).save(f"{i:02}.png")
    assert aft("explain", ".", "--save", "mask", "--json").code == 0
    assert len(writes) == 2  # names, then files
    assert len(leftovers(Path("aft-out"))) == 13
