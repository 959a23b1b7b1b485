"""Time gen-masks, and decoding alone, on class folders, tar shards and parquet.

    python -m benchmarks formats DATA [--images 60] [--rounds 3]

DATA are class folders, such as imagenette's train. The formats take turns, so that what else the
machine does meets all of them; the smallest of the rounds is printed, and its ratio to that of
class folders. CPU seconds, workers' included, hardly turn on what else the machine does.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from aftcli import load_classifier
from aftcli.core.classifier import Classifier
from aftcli.data.blocks import load_blocks, spans_of
from aftcli.data.sets import DataSet, open_data_set
from aftcli.masks.generate import generate_masks
from aftcli.settings import Search

EACH = 32  # pictures a shard


def pack_shards(data: DataSet, out: Path) -> Path:
    """Write the pictures as tar shards, with labels by name."""
    out.mkdir()
    found = [(sample.name, picture.read()) for sample, picture in _pairs(data)]
    for number, start in enumerate(range(0, len(found), EACH)):
        with tarfile.open(out / f"shard-{number:03}.tar", "w") as tar:
            for name, content in found[start : start + EACH]:
                folder, _, base = name.partition("/")
                key = f"{folder}-{Path(base).stem}"
                for ending, bytes_ in ((".cls", folder.encode()), (Path(base).suffix, content)):
                    member = tarfile.TarInfo(key + ending)
                    member.size = len(bytes_)
                    tar.addfile(member, io.BytesIO(bytes_))
    return out


def pack_parquet(data: DataSet, out: Path) -> Path:
    """Write the pictures as parquet, with labels by name, a hundred rows a group."""
    import pyarrow as pa
    from pyarrow import parquet

    out.mkdir()
    found = [(sample.name, picture.read()) for sample, picture in _pairs(data)]
    labels = [name.partition("/")[0] for name, _ in found]
    table = pa.table({"image": [content for _, content in found], "label": labels})
    parquet.write_table(table, out / "train-00000-of-00001.parquet", row_group_size=100)
    return out


def _pairs(data: DataSet) -> list[tuple]:
    return list(zip(data.samples, data.pictures(), strict=True))


def decoded(f: Classifier, path: Path) -> None:
    """Decode all pictures once, in a worker."""
    data = open_data_set(path, None, f.classes)
    spans = spans_of(len(data.samples))
    for _ in load_blocks(f.preprocessing, data, spans, range(len(spans)), workers=1):
        pass


def masked(f: Classifier, path: Path) -> None:
    """Make the masks of all pictures, with a worker."""
    data = open_data_set(path, None, f.classes)
    with tempfile.TemporaryDirectory() as run:
        for _ in generate_masks(f, data, ["gradcam"], Path(run), Search(), workers=1):
            pass


def main() -> None:
    """Print the seconds of each format, and their ratios to class folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    f = load_classifier()
    few = open_data_set(args.data, None, f.classes).limited(args.images)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for sample, picture in _pairs(few):
            path = folder / "folders" / sample.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture.read())
        plain = open_data_set(folder / "folders", None, f.classes)
        places = {
            "folders": folder / "folders",
            "shards": pack_shards(plain, folder / "shards"),
            "parquet": pack_parquet(plain, folder / "parquet"),
        }
        found = {
            name: measure(run, f, places, args.rounds)
            for name, run in (("decoding", decoded), ("gen-masks", masked))
        }
    print(json.dumps({"images": len(few.samples), **found}, indent=2))


def measure(
    run: Callable[[Classifier, Path], None], f: Classifier, places: dict[str, Path], rounds: int
) -> dict[str, dict[str, float]]:
    """Time a function on each format in turn: all seconds, and those of the CPU."""
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in places}
    for _ in range(rounds):
        for name, path in places.items():
            start, worked = time.perf_counter(), cpu()
            run(f, path)
            found[name]["seconds"].append(time.perf_counter() - start)
            found[name]["cpu"].append(cpu() - worked)
    best = {name: {k: min(v) for k, v in each.items()} for name, each in found.items()}
    plain = best["folders"]
    return {
        name: {
            **{key: round(value, 2) for key, value in each.items()},
            **{f"ratio of {key}": round(value / plain[key], 3) for key, value in each.items()},
        }
        for name, each in best.items()
    }


def cpu() -> float:
    """Return the CPU seconds of this process and of its workers that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    main()
