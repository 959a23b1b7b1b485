"""Compare what the same photographs give as class folders and in every other format.

    python -m benchmarks same_formats DATA/imagenette [--images 60] [--work FOLDER]

Runs gen-masks, finetune and evaluate on efficientnet_lite0, twice for each format: in one process
to the end; and in two, which SIGKILL ends when a part of the work is done and which begin again.
DATA has train and val as class folders. Columns of masks, tau*, zero levels and tables must be
equal bit for bit, but for names of images and places.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from aftcli import MaskStore
from aftcli.data.parts import spread
from tests.helpers.archives import PACKED, pictures_below

NAMES = ("path", "stamp")  # columns of a store that say where an image lies, and since when
PLACES = ("dataset", "train", "seconds")  # fields of tables that say where, and how long

COMMANDS = {
    "gen-masks": ("--cam", "gradcam"),
    "finetune": ("--held-out", "0"),  # which images are held out turns on their names
    "evaluate": ("--table", "1,2,3,4", "--masking", "binary", "--json"),
}
ALONE = ("finetune",)  # two processes share each batch, equal up to rounding


def copied(data: Path, out: Path, images: int) -> Path:
    """Copy as many images of each split, spread over the classes."""
    for split in ("train", "val"):
        found = pictures_below(data / split)
        for i in spread(len(found), images):
            place = out / found[i].relative_to(data)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found[i], place)
    return out


def aft(folder: Path, processes: int, killed: bool, *words: str) -> tuple[str, bool]:
    """Run `aft` in a folder.

    Args:
        folder: has its run.
        processes: of torchrun, where more than one.
        killed: kill all of them when the first part of the results is there.
        words: the arguments.

    Returns:
        What it prints, and if it was killed before its end.
    """
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--nproc_per_node", str(processes), "-m", "--"]
    given = [*launch, "aftcli", *words, "--run", "run", "--quiet", "--workers", "1"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "AFT_CACHE": str(folder.parent / "cache")}
    with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
        process = subprocess.Popen(
            [*given, "--device", "cpu"],
            cwd=folder,
            env=settings,
            stdout=out,
            stderr=err,
        )
        before = parts(folder)
        while killed and process.poll() is None:
            if parts(folder) - before:
                kill(process.pid)
                process.wait()
                return "", process.returncode == -signal.SIGKILL
            time.sleep(0.005)
        if process.wait():
            raise SystemExit(f"{folder.name}: {(folder / 'err').read_text()}")
        return (folder / "out").read_text(), False


def kill(process: int) -> None:
    """Kill a process and all that it started: torchrun starts each in a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        own = psutil.Process(process)
        for each in (own, *own.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def parts(folder: Path) -> set[Path]:
    """Return the files that hold a part of what a command computes."""
    found = {*(folder / "run").glob("*/.*.parts/[!.]*"), *(folder / "run").glob("*/.*.state")}
    return found | {*(folder / "run/tuned").glob("[!.]*.safetensors")}


def plain(value: Any) -> Any:  # noqa: ANN401 - of JSON
    """Leave out names and places."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in PLACES}
    return [plain(v) for v in value] if isinstance(value, list) else value


def known(found: Any, wanted: Any) -> Any:  # noqa: ANN401 - of JSON
    """Keep what is measured in both: COCO's boxes give measures that class folders lack."""
    if isinstance(wanted, dict):
        return {k: known(found[k], v) for k, v in wanted.items() if v is not None}
    if isinstance(wanted, list):
        return [known(*each) for each in zip(found, wanted, strict=True)]
    return found


def chain(folder: Path, data: Path, processes: int) -> dict[str, Any]:
    """Run the commands; what they give, without names, and which of them were killed."""
    folder.mkdir()
    start, stopped, said = time.monotonic(), [], ""
    for command, options in COMMANDS.items():
        words = [command, *([str(data)] if command == "gen-masks" else []), *options]
        count = 1 if command in ALONE else processes
        if processes > 1 and aft(folder, count, True, *words)[1]:
            stopped.append(command)
        said, _ = aft(folder, count, False, *words)
    (store,) = (folder / "run/masks").glob("[!.]*.h5")
    with MaskStore(store) as masks:
        rows = masks.rows(0, len(masks))._asdict()
        assert not masks.broken
    (tuned,) = (folder / "run/tuned").glob("[!.]*.safetensors")
    weights = sorted(load_file(tuned).items())
    found = json.loads(said)
    return {
        "images": len(rows["path"]),
        "columns": {k: v.tobytes() for k, v in rows.items() if k not in NAMES},
        "weights": hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in weights)).hexdigest(),
        "tables": {k: plain(v) for k, v in found.items() if k.startswith("table")},
        "killed": stopped,
        "seconds": round(time.monotonic() - start),
    }


def compared(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Say which results of two chains are equal."""
    tables, same = found["tables"], wanted["tables"]
    return {
        "images": found["images"],
        "masks and tau* equal": found["columns"] == wanted["columns"],
        "tuned networks equal": found["weights"] == wanted["weights"],
        "tables equal": known(tables, same) == known(same, same),
        "further measures": tables != same,
        "killed": found["killed"],
        "seconds": found["seconds"],
    }


def measure(data: Path, images: int, work: Path) -> dict[str, Any]:
    """Pack the images in every format, run the chain on each, and compare with class folders."""
    plain_folders = copied(data.resolve(), work / "folders", images)
    places = {"folders": plain_folders}
    places |= {name: pack(plain_folders, work / name) for name, pack in PACKED.items()}
    found: dict[str, Any] = {}
    wanted = None
    for name, path in places.items():
        for processes in (1, 2):
            own = chain(work / f"{name}-{processes}", path, processes)
            wanted = wanted or own
            found[f"{name}, {processes}"] = compared(own, wanted)
            print(f"{name}, {processes}: {json.dumps(found[f'{name}, {processes}'])}", flush=True)
    return found


def main() -> int:
    """Print what is equal, by format and number of processes; exit with 1 if anything is not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--work", type=Path, help="an empty folder; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(args.data, args.images, (args.work or Path(temporary)).resolve())
    print(json.dumps(found, indent=2))
    checks = ("masks and tau* equal", "tuned networks equal", "tables equal")
    return 0 if all(each[check] for each in found.values() for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
