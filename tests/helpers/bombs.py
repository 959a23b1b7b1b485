"""Files that claim more than they hold, and pictures of 100 megapixels."""

import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.mutants import PHOTO, PICTURES, png

SIDE = 10_000  # 100 megapixels
CLAIM = 60_000
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n40 40 moveto\nshowpage\n"


def png_claim(path, width=CLAIM, height=CLAIM, bits=8, colours=2, rows=100):
    """A PNG of zeros, a thousand pixels a byte, of which so many rows are there."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    packer = zlib.compressobj(1)
    row = bytes(1 + width * bits // 8 * {0: 1, 2: 3, 4: 2, 6: 4}[colours])
    packed = b"".join(packer.compress(row) for _ in range(rows)) + packer.flush()
    path.write_bytes(png([(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]))


def jpeg_claim(path, name="jpeg.jpg", side=CLAIM):
    data = PICTURES[name]()
    place = max(data.find(b"\xff" + bytes([mark]) + b"\0") for mark in (0xC0, 0xC2))
    size = struct.pack(">HH", side, side)
    path.write_bytes(data[: place + 5] + size + data[place + 9 :])


def jpeg_scans(path, scans=2000):
    """A progressive JPEG whose last scan comes again and again."""
    jpeg_claim(path, "progressive.jpg", SIDE)
    data = path.read_bytes()
    last = data.rfind(b"\xff\xda")
    path.write_bytes(data[:last] + data[last:-2] * scans + data[-2:])


def gif_claim(path):
    data = PICTURES["plain.gif"]()
    path.write_bytes(data[:6] + struct.pack("<HH", CLAIM, CLAIM) + data[10:])


def tiff_claim(path, name="lzw.tif"):
    data = bytearray(PICTURES[name]())
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, entry)[0] in (256, 257, 278):
            struct.pack_into("<HII", data, entry + 2, 4, 1, CLAIM)
    path.write_bytes(data)


def webp_claim(path):
    """The canvas of an animation, 2^14 pixels a side and more."""
    data = bytearray(PICTURES["animated.webp"]())
    place = data.find(b"VP8X") + 12
    data[place : place + 6] = b"\xfe\xff\0\xfe\xff\0"
    path.write_bytes(data)


def npy_claim(path, shape=(10**6, 10**6), kind="<f8"):
    header = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


def npz_header(path):
    """A header of 4 GB, zipped."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w", force_zip64=True) as member,
    ):
        member.write(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1))
        for _ in range(100):
            member.write(bytes(10**6))


def npz_zeros(path, side=9_000):
    """Zeros, a thousand values a byte."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w", force_zip64=True) as member,
    ):
        npy_claim(path.with_suffix(".header"), (side, side), "|u1")
        member.write(path.with_suffix(".header").read_bytes())
        for _ in range(side):
            member.write(bytes(side))
    path.with_suffix(".header").unlink()


BOMBS = {
    "claim.png": png_claim,
    "16bit-claim.png": lambda p: png_claim(p, 20_000, 20_000, 16, 6),
    "wide.png": lambda p: png_claim(p, 2**20, 1, rows=1),
    "zeros.png": lambda p: png_claim(p, SIDE, SIDE, rows=SIDE),
    "claim.jpg": jpeg_claim,
    "claim-within.jpg": lambda p: jpeg_claim(p, side=SIDE),
    "scans.jpg": jpeg_scans,
    "claim.gif": gif_claim,
    "claim.tif": tiff_claim,
    "strips-claim.tif": lambda p: tiff_claim(p, "strips.tif"),
    "claim.webp": webp_claim,
    "claim.npy": npy_claim,
    "strings.npy": lambda p: npy_claim(p, (1, 1), "<U500000000"),
    "header.npz": npz_header,
    "zeros.npz": npz_zeros,
}


def large_photograph(side=SIDE):
    with Image.open(PHOTO) as image:
        return image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)


def _large_rgba(path):
    image = large_photograph()
    image.putalpha(image.convert("L"))
    image.save(path, compress_level=1)


def _large_palette(path):
    image = large_photograph().quantize(64, method=Image.Quantize.FASTOCTREE, dither=0)
    image.save(path, transparency=3, compress_level=1)


def _large_grey(path, dtype, scale):
    grey = np.asarray(large_photograph().convert("L")).astype(dtype) * dtype(scale)
    Image.fromarray(grey).save(path)


def _large(side=SIDE, mode="RGB", **options):
    def make(path: Path):
        large_photograph(side).convert(mode).save(path, **options)

    return make


def _plain(side, mode, **options):
    """Return a maker of plain pictures: some encoders take minutes for a large photograph."""
    colour = (10, 200, 30, 99)[: len(mode)]
    return lambda path: Image.new(mode, (side, side), colour).save(path, **options)


LARGE = {
    "rgb.jpg": _large(),
    "turned.jpg": _large(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
    "progressive.jpg": _large(progressive=True, subsampling=0),
    "cmyk.jpg": _large(mode="CMYK"),
    "progressive-cmyk.jpg": _large(mode="CMYK", progressive=True, subsampling=0),
    "rgba.png": _large_rgba,
    "palette.png": _large_palette,
    "16bit.png": lambda p: _large_grey(p, np.uint16, 257),
    "float.tif": lambda p: _large_grey(p, np.float32, 1 / 255),
    "lab.tif": _large(mode="LAB", compression="tiff_lzw"),
    "grey-alpha.tif": _large(mode="LA", compression="tiff_lzw"),
    "rgb.gif": _large(),
    "rgb.webp": _plain(7700, "RGB", method=0),
    "lossless.webp": _plain(7700, "RGBA", lossless=True, quality=0, method=0),
    "rgb.jp2": _plain(6300, "RGB"),
    "rgb.avif": _plain(7700, "RGB", speed=10),
    "map.png": _large(5000, "L"),
    "map.npy": lambda p: np.save(p, np.asarray(large_photograph(5000).convert("L"), np.float64)),
}
