"""Files that are written whole or not at all."""

import os
from pathlib import Path

from aftcli.files import replacing, sweep


def test_what_a_killed_writer_left_is_swept_away(tmp_path):
    path = tmp_path / "[a].json"
    for name in (".99999999-[a].json", f".{os.getppid()}-[a].json", ".x-[a].json", ".99999999-b"):
        (tmp_path / name).write_text("half")
    with replacing(path) as temporary:
        temporary.write_text("whole")
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == sorted([f".{os.getppid()}-[a].json", ".x-[a].json", ".99999999-b", "[a].json"])


def test_files_of_one_folder_are_written_with_one_scan_of_it(tmp_path, monkeypatch):
    """Otherwise the time to write many pictures would grow with their square."""
    scans, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: scans.append(Path(path)) or listdir(path))
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / "a", Path("b")]
    for folder in folders:
        folder.mkdir()
        (folder / ".99999999-7.png").write_text("half")
    for number in range(20):
        for folder in folders:
            with replacing(folder / f"{number}.png") as temporary:
                temporary.write_text(str(number))
    assert scans == [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        assert {p.name: p.read_text() for p in folder.iterdir()} == {
            f"{number}.png": str(number) for number in range(20)
        }


def test_a_sweep_sees_what_was_left_after_the_first_scan(tmp_path):
    path, left = tmp_path / "a.json", tmp_path / ".99999999-a.json"
    with replacing(path) as temporary:
        temporary.write_text("whole")
    left.write_text("half")
    sweep(path)
    assert os.listdir(tmp_path) == ["a.json"]
