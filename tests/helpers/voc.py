"""Small data sets in the layout of Pascal VOC, for tests."""

from pathlib import Path

from PIL import Image

FOLDERS = ("ImageSets/Segmentation", "JPEGImages", "Annotations", "SegmentationClass")


def make_voc(root, annotations, split="val"):
    """Grey pictures of 64 x 64 with these annotations, by their stems; all are listed."""
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
    for stem, text in annotations.items():
        Image.new("RGB", (64, 64), "grey").save(root / f"JPEGImages/{stem}.jpg")
        (root / f"Annotations/{stem}.xml").write_text(text)
    (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(annotations))
    return Path(root)


def annotation(boxes, size=None):
    """An annotation's XML: (name, left, top, right, bottom), pixels counted from 1."""
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax>"
        f"<ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in boxes
    )
    return f"<annotation>{sides}{objects}</annotation>"
