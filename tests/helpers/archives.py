"""Class folders packed as other formats of data sets, in the same order."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image


def pictures_below(root):
    """The pictures below a folder, in the order in which class folders are read."""
    return sorted(p for p in Path(root).rglob("*") if p.is_file())


def add(tar, name, content, **header):
    """Add a member to an open tar file."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in header.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def make_shards(root, out, each=4, label="cls", stem="shard"):
    """Pack class folders into shards of so many pictures, labelled by their folders' names."""
    found = pictures_below(root)
    out.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, start in enumerate(range(0, len(found), each)):
        shards.append(out / f"{stem}-{number:03}.tar")
        with tarfile.open(shards[-1], "w") as tar:
            for path in found[start : start + each]:
                key = f"{path.parent.name}-{path.stem}"
                said = path.parent.name
                if label == "json":
                    said = json.dumps({"width": 52, "label": said})
                if label == "folder":
                    key = f"{path.parent.name}/{path.stem}"
                else:
                    add(tar, f"{key}.{label}", said.encode())
                add(tar, f"{key}{path.suffix}", path.read_bytes())
    return shards


def table_of(rows, names=None, features=None, **columns):
    """A table as `datasets` writes it: (content, label) of each row, the names of the classes."""
    import pyarrow as pa

    pictures = [{"bytes": content, "path": None} for content, _ in rows]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    label = pa.array([label for _, label in rows], pa.int64() if names else pa.string())
    columns = {"image": pa.array(pictures, kind), "label": label, **columns}
    if features is None:
        features = {"image": {"_type": "Image"}, "label": {"dtype": "string", "_type": "Value"}}
        if names:
            features["label"] = {"names": list(names), "_type": "ClassLabel"}
    said = {"huggingface": json.dumps({"info": {"features": features}})} if features else {}
    return pa.table(columns).replace_schema_metadata(said)


def save_table(path, table, each=3):
    """Write a table as parquet, so many rows a group, or as the arrow stream of save_to_disk."""
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=each)
        return path
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, each)
    files = [{"filename": each.name} for each in sorted(path.parent.glob("data-*.arrow"))]
    (path.parent / "state.json").write_text(json.dumps({"_data_files": files}))
    return path


def make_tables(root, out, ending, each=7, stem="train", names=None):
    """Pack class folders into files of so many rows, with labels by number."""
    found = pictures_below(root)
    names = names or sorted({path.parent.name for path in found})
    count = -(-len(found) // each)
    for number, start in enumerate(range(0, len(found), each)):
        part = found[start : start + each]
        rows = [(path.read_bytes(), names.index(path.parent.name)) for path in part]
        part_of = f"{number:05}-of-{count:05}"
        name = f"{stem}-{part_of}" if ending == ".parquet" else f"data-{part_of}"
        save_table(out / f"{name}{ending}", table_of(rows, names))
    return out


def as_shards(root, out):
    """Pack train/ and val/ of class folders into shards."""
    for split in ("train", "val"):
        make_shards(root / split, out, each=5, stem=f"colours-{split}")
    return out


def as_parquet(root, out):
    """Pack both splits as `datasets` pushes them."""
    for split in ("train", "val"):
        make_tables(root / split, out / "data", ".parquet", each=5, stem=split)
    return out


def as_saved(root, out):
    """Pack both splits as `datasets` saves them to a disk."""
    for split in ("train", "val"):
        make_tables(root / split, out / split, ".arrow")
    return out


def as_manifest(root, out):
    """List the pictures of both splits, where they lie, in a CSV file."""
    lines = ["path,label,split"]
    for path in pictures_below(root):
        relative = path.relative_to(out.parent).as_posix()
        lines.append(f"{relative},{path.parent.name},{path.parent.parent.name}")
    file = out.with_suffix(".csv")
    file.write_text("\n".join(lines))
    return file


def as_coco(root, out):
    """Copy the pictures of each split into one folder, as COCO has them, with a box of each."""
    names = sorted({path.parent.name for path in pictures_below(root)})
    (out / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (out / split).mkdir()
        images, objects = [], []
        for number, path in enumerate(pictures_below(root / split)):
            name = f"{path.parent.name}-{path.name}"
            (out / split / name).write_bytes(path.read_bytes())
            with Image.open(path) as picture:
                width, height = picture.size
            label = names.index(path.parent.name)
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            box = {"bbox": [0, 0, width, height], "area": width * height, "iscrowd": 0}
            objects.append({"id": number, "image_id": number, "category_id": label, **box})
        kinds = [{"id": i, "name": name} for i, name in enumerate(names)]
        said = {"images": images, "annotations": objects, "categories": kinds}
        (out / f"annotations/instances_{split}.json").write_text(json.dumps(said))
    return out


# Each packs a folder with train/ and val/; the path that opens it.
PACKED = {
    "shards": as_shards,
    "parquet": as_parquet,
    "saved": as_saved,
    "manifest": as_manifest,
    "coco": as_coco,
}
