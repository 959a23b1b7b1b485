"""The images that a command finds by the names that users give."""

import os
from pathlib import Path

from aftcli.cli.images import find_images
from aftcli.files import FOLLOW
from tests.helpers.unreadable import refuse_to_read


def test_find_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        *("b.PNG", "a.jpg", "notes.txt", ".hidden.jpg", "._a.jpg", "[x]/c d.jpeg", "[x]/e/ü.tif"),
        *("out/a-cat-overlay.png", ".cache/thumb.png", "empty/notes.txt"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.jpg").mkdir()
    os.symlink("nowhere", tmp_path / "link.jpg")
    nested = ["[x]/c d.jpeg", "[x]/e/ü.tif"]
    everything = [*nested, "a.jpg", "b.PNG", "link.jpg", "out/a-cat-overlay.png"]

    def names(*arguments, out=None):
        paths, problems = find_images(arguments, out)
        return list(map(str, paths)), problems

    assert names(".") == (everything, [])
    assert names(".", out=Path("out")) == (everything[:-1], [])
    assert names(str(tmp_path), out=Path("out"))[0] == [str(tmp_path / n) for n in everything[:-1]]
    assert names("out", out=Path("out")) == (everything[-1:], [])
    assert names("a.jpg", "./a.jpg", "*.jpg", "notes.txt", "a.jpg") == (
        ["a.jpg", "link.jpg", "notes.txt"],
        [],
    )
    assert names("[x]") == (nested, [])
    assert names("**/*.tif") == (nested[1:], [])
    assert names("?x?", "[[]x]") == (nested, [])
    for argument, what in {
        "empty": "empty: there is no image in this folder",
        "emp*": "emp*: there is no image in this folder",
        "*.bmp": "*.bmp: there is no such file or folder",
        "": "'': there is no such file or folder",
        "y" * 300: f"{'y' * 300}: there is no such file or folder",
        "a.jpg/b": "a.jpg/b: there is no such file or folder",
    }.items():
        assert names(argument, "b.PNG") == (["b.PNG"], [what])


def test_links_out_of_a_folder_are_said_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(FOLLOW, raising=False)
    for folder, count in (("one", 1), ("many", 30)):
        Path(folder).mkdir()
        for i in range(count):
            os.symlink("../a.jpg", f"{folder}/{i:02}.jpg")
    for name in ("a.jpg", "many/own.jpg"):
        Path(name).write_text("x")
    said = "00.jpg: is a link that leads out of {0}; set AFT_FOLLOW_LINKS=1 if you trust the links"
    paths, problems = find_images(["one", "many"])
    assert paths == [Path("many/own.jpg")]
    assert problems == [
        f"one/{said.format('one')} there",
        f"many/{said.format('many')} there (29 more pictures there are such links)",
    ]
    monkeypatch.setenv(FOLLOW, "1")
    assert len(find_images(["one", "many"])[0]) == 32


def test_folders_that_can_not_be_read_are_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.jpg", "a/no/2.jpg", "a/no/deep/3.jpg", "a/.trash/4.jpg", "b/5.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")
    refuse_to_read(monkeypatch, "a/no", "a/.trash", "b")
    paths, problems = find_images(["a", "b"])
    assert paths == [Path("a/1.jpg")]
    assert problems == [
        "a/no: can't be read (Permission denied)",
        "b: can't be read (Permission denied)",
    ]
