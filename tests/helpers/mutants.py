"""Damaged files: real ones, with bytes flipped, cut off, repeated, or claims of headers changed."""

import io
import json
import re
import struct
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

PHOTO = Path(__file__).parents[2] / "docs/images/chelsea.jpg"
# What sizes and offsets may claim.
NUMBERS = (0, 1, 2, 255, 256, 4095, 9999, 16383, 20000, 65535, 2**20, 2**31 - 1, 2**31, 2**32 - 1)
# Values of one picture that another program would take for its depth, size, colours.
TIFF_TAGS = (256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 320, 339)


def photograph(size=(150, 100)):
    with Image.open(PHOTO) as image:
        return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def _translucent():
    image = photograph()
    image.putalpha(image.convert("L"))
    return image


def _grey(dtype, scale):
    grey = np.asarray(photograph().convert("L"), dtype=np.float64)
    return Image.fromarray((grey * scale).astype(dtype))


def _saved(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def _animated(form):
    frames = [photograph().rotate(angle) for angle in (0, 30, 60)]
    return _saved(frames[0], format=form, save_all=True, append_images=frames[1:], duration=50)


def _tiff(image, compression=None):
    return _saved(image, format="TIFF", compression=compression)


PICTURES = {
    "jpeg.jpg": lambda: _saved(photograph(), format="JPEG", exif=photograph().getexif()),
    "progressive.jpg": lambda: _saved(photograph(), format="JPEG", progressive=True),
    "cmyk.jpg": lambda: _saved(photograph().convert("CMYK"), format="JPEG"),
    "rgb.png": lambda: _saved(photograph(), format="PNG"),
    "rgba.png": lambda: _saved(_translucent(), format="PNG"),
    "palette.png": lambda: _saved(photograph().quantize(64), format="PNG", transparency=3),
    "16bit.png": lambda: _saved(_grey(np.uint16, 257), format="PNG"),
    "plain.gif": lambda: _saved(photograph().quantize(64), format="GIF"),
    "animated.gif": lambda: _animated("GIF"),
    "lossy.webp": lambda: _saved(photograph(), format="WEBP"),
    "lossless.webp": lambda: _saved(_translucent(), format="WEBP", lossless=True),
    "animated.webp": lambda: _animated("WEBP"),
    "strips.tif": lambda: _tiff(photograph()),
    "lzw.tif": lambda: _tiff(photograph(), "tiff_lzw"),
    "deflate.tif": lambda: _tiff(photograph(), "tiff_adobe_deflate"),
    "float.tif": lambda: _tiff(_grey(np.float32, 1 / 255)),
    "plain.bmp": lambda: _saved(photograph(), format="BMP"),
    "plain.ppm": lambda: _saved(photograph((60, 40)), format="PPM"),
    "j2k.jp2": lambda: _saved(photograph(), format="JPEG2000"),
    "plain.avif": lambda: _saved(photograph(), format="AVIF"),
}


def _npy(dtype, save=np.save):
    buffer = io.BytesIO()
    down, across = np.mgrid[:32, :32]
    save(buffer, (np.exp(-((down - 14) ** 2 + (across - 12) ** 2) / 60) * 100).astype(dtype))
    return buffer.getvalue()


MAPS = {
    "float64.npy": lambda: _npy(np.float64),
    "float16.npy": lambda: _npy(np.float16),
    "uint8.npy": lambda: _npy(np.uint8),
    "stored.npz": lambda: _npy(np.float32, np.savez),
    "deflated.npz": lambda: _npy(np.float32, np.savez_compressed),
    "16bit.png": PICTURES["16bit.png"],
    "float.tif": PICTURES["float.tif"],
}


def mutate(data, name, rng):
    """A damaged copy of a file; `name` tells its format; what was done to it."""
    aware = FORMATS.get(Path(name).suffix, [])
    change = rng.choice([*GENERIC, *aware, *aware])
    try:
        return change(data, rng), change.__name__.strip("_")
    except (
        IndexError,
        ValueError,
        KeyError,
        TypeError,
        OSError,
        struct.error,
    ):  # nothing there to change
        return _flip(data, rng), "flip"


def _at(data, rng):
    # Headers are short, pictures long.
    return rng.randrange(min(len(data), rng.choice((16, 64, 512, len(data)))))


def _put(data, place, new):
    return data[:place] + new + data[place + len(new) :]


def _flip(data, rng):
    place = _at(data, rng)
    return _put(data, place, bytes([data[place] ^ (1 << rng.randrange(8))]))


def _flips(data, rng):
    for _ in range(rng.randrange(2, 20)):
        place = _at(data, rng)
        data = _put(data, place, bytes([rng.randrange(256)]))
    return data


def _cut(data, rng):
    return data[: rng.randrange(len(data))]


def _cut_tail(data, rng):
    return data[: -rng.randrange(1, min(64, len(data)))]


def _span(data, rng):
    start = _at(data, rng)
    return start, start + rng.randrange(1, min(2000, len(data) - start) + 1)


def _remove(data, rng):
    start, stop = _span(data, rng)
    return data[:start] + data[stop:]


def _double(data, rng):
    start, stop = _span(data, rng)
    return data[:stop] + data[start:]


def _blank(data, rng):
    start, stop = _span(data, rng)
    return _put(data, start, bytes([rng.choice((0, 255))]) * (stop - start))


def _append(data, rng):
    return data + rng.randbytes(rng.randrange(1, 200))


def _number(data, rng):
    form = rng.choice(("<H", ">H", "<I", ">I", "<Q"))
    value = rng.choice(NUMBERS) & (2 ** (8 * struct.calcsize(form)) - 1)
    return _put(data, _at(data, rng), struct.pack(form, value))[: len(data)]


GENERIC = [_flip, _flips, _cut, _cut_tail, _remove, _double, _blank, _append, _number]


def png_chunks(data):
    place, chunks = 8, []
    while place + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, place)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    return chunks


def png(chunks):
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, content in chunks:
        check = struct.pack(">I", zlib.crc32(name + content))
        parts += [struct.pack(">I", len(content)), name, content, check]
    return b"".join(parts)


def _png_header(data, rng):
    (name, header), *rest = png_chunks(data)
    fields = list(struct.unpack(">IIBBBBB", header))
    which = rng.randrange(7)
    fields[which] = rng.choice(NUMBERS) if which < 2 else rng.randrange(17)
    return png([(name, struct.pack(">IIBBBBB", *fields)), *rest])


def _png_content(data, rng):
    chunks = png_chunks(data)
    i = rng.randrange(len(chunks))
    chunks[i] = (chunks[i][0], _flips(chunks[i][1], rng))
    return png(chunks)


def _png_chunks(data, rng):
    chunks = png_chunks(data)
    i, j = rng.randrange(len(chunks)), rng.randrange(len(chunks))
    chunks.insert(j, chunks[i] if rng.random() < 0.5 else chunks.pop(i))
    return png(chunks)


def _jpeg_segments(data):
    return [m.start() for m in re.finditer(rb"\xff[\xc0-\xfe]", data)]


def _jpeg_frame(data, rng):
    place = re.search(rb"\xff[\xc0\xc1\xc2]\0", data).start()
    field, form = rng.choice(((5, ">H"), (7, ">H"), (4, "B"), (9, "B"), (11, "B"), (12, "B")))
    value = rng.choice(NUMBERS) & (0xFFFF if form == ">H" else 0xFF)
    return _put(data, place + field, struct.pack(form, value))


def _jpeg_segment(data, rng):
    place = rng.choice(_jpeg_segments(data))
    if rng.random() < 0.5:
        return _put(data, place + 2, struct.pack(">H", rng.choice(NUMBERS) & 0xFFFF))
    (size,) = struct.unpack_from(">H", data, place + 2)
    part = data[place : place + 2 + size]
    return data[:place] + part * rng.choice((0, 2, 50)) + data[place + len(part) :]


def _gif_size(data, rng):
    places = [6, 8, *(m.start() + k for m in re.finditer(b",\0\0\0\0", data) for k in (1, 3, 5, 7))]
    return _put(data, rng.choice(places), struct.pack("<H", rng.choice(NUMBERS) & 0xFFFF))


def _riff_number(data, rng):
    names = (b"RIFF", b"VP8 ", b"VP8L", b"VP8X", b"ANMF", b"ALPH", b"ANIM")
    places = [m.start() for name in names for m in re.finditer(name, data)]
    return _put(data, rng.choice(places) + 4 + rng.randrange(14), rng.randbytes(rng.choice((1, 4))))


def _tiff_tag(data, rng):
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    wanted = rng.choice(TIFF_TAGS)
    entries = [start + 2 + 12 * i for i in range(count)]
    fitting = [e for e in entries if struct.unpack_from("<H", data, e)[0] == wanted] or entries
    field, form = rng.choice(((8, "<I"), (8, "<I"), (8, "<H"), (4, "<I"), (2, "<H"), (0, "<H")))
    value = rng.choice((*NUMBERS, *range(3, 9), 32773, 34712))
    value &= 2 ** (8 * struct.calcsize(form)) - 1
    return _put(data, rng.choice(fitting) + field, struct.pack(form, value))


def _npy_header(data, rng):
    (size,) = struct.unpack_from("<H", data, 8)
    header = data[10 : 10 + size].decode("latin-1")
    shapes = (
        "()",
        "(1024,)",
        "(1, 32, 32)",
        "(0, 32)",
        "(-1, 32)",
        "(32, 33)",
        "(1000000, 1000000)",
    )
    kinds = (
        "<f8",
        ">f4",
        "<c16",
        "|O",
        "<U9",
        "|V8",
        "<M8[s]",
        "|b1",
        "<f2",
        "<i8",
        "<f16",
        "V999",
    )
    header = rng.choice(
        (
            lambda: re.sub(r"\(.*?\)", rng.choice(shapes), header, count=1),
            lambda: re.sub(r"'descr': '.*?'", f"'descr': '{rng.choice(kinds)}'", header),
            lambda: header.replace("False", "True"),
            lambda: header.replace("'shape'", "'form'"),
            lambda: "(" * rng.choice((50, 9000)) + header,
            lambda: "__import__('os').mkdir('EXECUTED')" + header,
        )
    )()
    return data[:8] + struct.pack("<H", len(header)) + header.encode("latin-1") + data[10 + size :]


def _zip_member(data, rng):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (info,) = archive.infolist()
        content = archive.read(info)
    content = rng.choice((_npy_header, _flips, _cut, _append))(content, rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice((0, 8, 12, 14))) as archive:
        for name in rng.choice(((info.filename,), ("a", "b"), ("../x.npy",), ("",))):
            archive.writestr(name, content)
    return buffer.getvalue()


def _safetensors_header(data, rng):
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    rng.choice(
        (
            lambda: header.pop(rng.choice(names)),
            lambda: header.pop("__metadata__", None),
            lambda: header.update(extra=entry),
            lambda: entry.update(dtype=rng.choice(("F16", "BF16", "I64", "BOOL", "X"))),
            lambda: entry.update(shape=[rng.choice(NUMBERS), *entry["shape"][1:]]),
            lambda: entry.update(shape=entry["shape"][::-1]),
            lambda: entry["data_offsets"].reverse(),
            lambda: entry.update(data_offsets=header[rng.choice(names)]["data_offsets"]),
        )
    )()
    if "__metadata__" in header and rng.random() < 0.5:
        key, text = rng.choice(list(header["__metadata__"].items()))
        header["__metadata__"][key] = _flips(text.encode(), rng).decode("latin-1")
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _torch_member(data, rng):
    """A file of torch.save with one of its members damaged and its checksum right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(buffer, "w") as out:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("data.pkl")]
        wanted = rng.choice([*pickles, rng.choice(names)])
        for name in names:
            content = archive.read(name)
            if name == wanted:
                content = rng.choice(GENERIC)(content, rng)
            out.writestr(name, content)
    return buffer.getvalue()


def _hdf5_objects(data, rng):
    """An HDF5 file that is sound, but holds something else."""
    buffer = io.BytesIO(data)
    with h5py.File(buffer, "r+") as file:
        column = rng.choice(sorted(file))
        attribute = rng.choice(sorted(file.attrs))
        values = file[column][:]

        def replace(new):
            del file[column]
            file[column] = new

        rng.choice(
            (
                lambda: file.pop(column),
                lambda: file.attrs.pop(attribute),
                lambda: file.attrs.create(attribute, rng.choice(("", "x", "[", 3, -1.5, np.nan))),
                lambda: replace(values[:-1]),
                lambda: replace(values[::-1].copy()),
                lambda: replace(np.zeros(values.shape, rng.choice(("f4", "i1", "S3", "?")))),
                lambda: replace(values[..., None]),
                lambda: file[column].resize(2**31, axis=0),
                lambda: file.create_group("group"),
            )
        )()
    return buffer.getvalue()


FORMATS = {
    ".png": [_png_header, _png_content, _png_chunks],
    ".jpg": [_jpeg_frame, _jpeg_segment],
    ".gif": [_gif_size],
    ".webp": [_riff_number],
    ".tif": [_tiff_tag],
    ".npy": [_npy_header],
    ".npz": [_zip_member],
    ".safetensors": [_safetensors_header],
    ".pth": [_torch_member],
    ".h5": [_hdf5_objects],
}
