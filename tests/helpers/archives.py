"""Class folders packed as other formats of data sets, in the same order."""

import io
import json
import tarfile
from pathlib import Path


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
