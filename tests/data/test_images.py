"""Pictures and maps: what is read is what people see; x is what torchvision and timm make."""

import io
import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aftcli.core.cam import normalise, upsample
from aftcli.core.classes import Preprocessing
from aftcli.data.images import LONGEST, read_image, to_input, view_of
from aftcli.data.maps import fit_map, read_map
from aftcli.errors import AftError
from aftcli.networks.sources import find_source

IMAGES = Path(__file__).parents[2] / "docs/images"
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def photograph():
    """Coffee, small: wide, and different in every corner."""
    with Image.open(IMAGES / "coffee.jpg") as image:
        return image.convert("RGB").resize((120, 80), Image.Resampling.BICUBIC)


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image):
    return np.asarray(image).astype(int)


RGB = pixels(photograph())
GREY = pixels(photograph().convert("L"))
THREE_GREYS = np.repeat(GREY[..., None], 3, 2)
RAMP = np.broadcast_to(np.linspace(0, 255, 120).round().astype(np.uint8), (80, 120))


def over_white(values):
    opacity = RAMP[..., None] / 255
    return values * opacity + 255 * (1 - opacity)


def saved(image, path, **options):
    image.save(path, **options)


def png(path, values, colour_type):
    """Write a PNG of 16 bits, which Pillow reads but can't write in colour."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def as_image(values, dtype):
    return Image.fromarray(values.astype(dtype))


def with_alpha(mode):
    image = photograph().convert(mode)
    image.putalpha(Image.fromarray(RAMP))
    return image


def stack(*arrays):
    return np.dstack(arrays) * 257


# File: how it is written, what people see, the mean difference that the format itself makes.
ODD = {
    "rgb.png": (lambda p: saved(photograph(), p), RGB, 0),
    "rgb16.png": (lambda p: png(p, RGB * 257, 2), RGB, 0),
    "rgba16.png": (lambda p: png(p, stack(RGB, RAMP.astype(int)), 6), over_white(RGB), 1),
    "la16.png": (lambda p: png(p, stack(GREY, RAMP.astype(int)), 4), over_white(THREE_GREYS), 1),
    "grey.png": (lambda p: saved(as_image(GREY, np.uint8), p), THREE_GREYS, 0),
    "grey16.png": (lambda p: saved(as_image(GREY * 257, np.uint16), p), THREE_GREYS, 0),
    "grey16.tif": (lambda p: saved(as_image(GREY * 257, np.uint16), p), THREE_GREYS, 0),
    "dark16.tif": (lambda p: saved(as_image(GREY, np.uint16), p), THREE_GREYS / 257, 0.5),
    "grey32.tif": (lambda p: saved(as_image(GREY * 257, np.int32), p), THREE_GREYS, 0),
    "float1.tif": (lambda p: saved(as_image(GREY / 255, np.float32), p), THREE_GREYS, 0),
    "float255.tif": (lambda p: saved(as_image(GREY, np.float32), p), THREE_GREYS, 0),
    "palette.png": (
        lambda p: saved(photograph().quantize(200), p),
        pixels(photograph().quantize(200).convert("RGB")),
        0,
    ),
    "bit.png": (
        lambda p: saved(as_image(GREY > 99, bool), p),
        np.where(THREE_GREYS > 99, 255, 0),
        0,
    ),
    "la.png": (lambda p: saved(with_alpha("L"), p), over_white(THREE_GREYS), 1),
    "rgba.png": (lambda p: saved(with_alpha("RGB"), p), over_white(RGB), 1),
    "rgba.webp": (lambda p: saved(with_alpha("RGB"), p, lossless=True), over_white(RGB), 1),
    "cmyk.tif": (lambda p: saved(photograph().convert("CMYK"), p), RGB, 0),
    # Pillow writes the inverted values of Adobe's.
    "cmyk.jpg": (lambda p: saved(photograph().convert("CMYK"), p, quality=98), RGB, 2),
    "lab.tif": (lambda p: saved(photograph().convert("LAB"), p), RGB, 2),
    "grey.jpg": (lambda p: saved(as_image(GREY, np.uint8), p, quality=98), THREE_GREYS, 2),
}


@pytest.mark.parametrize("name", ODD)
def test_every_mode_is_read_as_people_see_it(tmp_path, name):
    write, expected, tolerance = ODD[name]
    write(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    assert np.abs(pixels(image) - expected).mean() <= tolerance


def test_a_transparent_colour_is_white(tmp_path):
    values = np.zeros((4, 6, 3), np.uint8)
    values[:, 3:] = (10, 200, 30)
    expected = values.copy()
    expected[:, :3] = 255
    image = Image.fromarray(values)
    image.save(tmp_path / "colour.png", transparency=(0, 0, 0))
    palette = image.quantize(2)
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    palette.save(tmp_path / "palette.gif", transparency=palette.getpixel((0, 0)))
    for name in ("colour.png", "palette.png", "palette.gif"):
        np.testing.assert_array_equal(pixels(read_image(tmp_path / name)), expected, name)


# How a camera that was turned stores an upright picture, by EXIF orientation.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    method = STORED[orientation]
    return (image if method is None else image.transpose(method)), exif


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_x_is_upright_whatever_the_exif_orientation(tmp_path, suffix, orientation):
    image, exif = turned(photograph(), orientation)
    path = tmp_path / f"turned.{suffix}"
    options = {"webp": {"lossless": True}, "jpg": {"quality": 98, "subsampling": 0}}
    image.save(path, exif=exif, **options.get(suffix, {}))
    prep = Preprocessing((64, 64), 72)
    difference = (to_input(read_image(path), prep) - to_input(photograph(), prep)).abs()
    assert difference.mean() <= (0.05 if suffix == "jpg" else 0)


@pytest.mark.parametrize("orientation", STORED)
def test_sixteen_bits_are_turned_too(tmp_path, orientation):
    image, exif = turned(as_image(GREY, np.uint8), orientation)
    as_image(pixels(image) * 257, np.uint16).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(pixels(read_image(tmp_path / "turned.png")), THREE_GREYS)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"])
def test_damaged_exif_does_not_spoil_a_picture(tmp_path, exif):
    photograph().save(tmp_path / "x.jpg", quality=98, subsampling=0, exif=exif)
    assert np.abs(pixels(read_image(tmp_path / "x.jpg")) - RGB).mean() < 2


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp"])
def test_the_first_frame_of_an_animation(tmp_path, name):
    first, second = (Image.new("RGB", (30, 20), colour) for colour in ("#ff0000", "#0000ff"))
    options = {"lossless": True} if name == "x.webp" else {}
    first.save(tmp_path / name, save_all=True, append_images=[second], **options)
    assert (pixels(read_image(tmp_path / name)) == (255, 0, 0)).all()


def test_profile_of_another_colour_space_is_dropped(tmp_path):
    photograph().convert("CMYK").save(tmp_path / "x.jpg", icc_profile=b"cmyk")
    photograph().save(tmp_path / "y.jpg", icc_profile=b"rgb")
    assert "icc_profile" not in read_image(tmp_path / "x.jpg").info
    assert read_image(tmp_path / "y.jpg").info["icc_profile"] == b"rgb"


FORMATS = {
    "jpeg": {},
    "progressive jpeg": {"progressive": True},
    "png": {},
    "gif": {},
    "webp": {},
    "bmp": {},
    "ppm": {},
    "tiff": {},
    "lzw tiff": {"compression": "tiff_lzw"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_picture_is_an_error_and_never_grey(tmp_path, name):
    whole = io.BytesIO()
    photograph().save(whole, name.split()[-1], **FORMATS[name])
    data = whole.getvalue()
    # The last bytes of PNG and GIF only say that the picture, complete by then, is over.
    cuts = {*range(1, len(data) - 24, len(data) // 40), len(data) // 2, len(data) - 24}
    if "jpeg" in name:
        cuts |= {*range(len(data) - 24, len(data))}
    path = tmp_path / "cut"
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        with pytest.raises(AftError, match=r"cut: .*damaged"):
            read_image(path)
    path.write_bytes(data)
    assert read_image(path).size == (120, 80)


def test_what_is_no_picture(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not a picture\n" * 99)
    with pytest.raises(AftError, match=r"empty\.jpg: the file is empty"):
        read_image(tmp_path / "empty.jpg")
    with pytest.raises(AftError, match=r"text\.jpg: is not a picture"):
        read_image(tmp_path / "text.jpg")
    with pytest.raises(AftError, match=r"gone\.jpg: .*No such file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(AftError, match=r"Is a directory"):
        read_image(tmp_path)


def test_pillows_limit_is_an_error_its_warning_is_not(tmp_path, monkeypatch):
    photograph().save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120 * 80 - 1)
    np.testing.assert_array_equal(pixels(read_image(tmp_path / "x.png")), RGB)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120 * 40 - 1)
    with pytest.raises(AftError, match=r"x\.png: is too large .* scale it down"):
        read_image(tmp_path / "x.png")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_large_picture_is_in_memory_about_twice(tmp_path):
    noise(60, 45).resize((6000, 4500)).save(tmp_path / "large.jpg")
    script = """
import resource, sys, torch
from pathlib import Path
from aftcli.core.classes import Preprocessing
from aftcli.data.images import read_image
from aftcli.data.images import to_input
from aftcli.data.images import view_of
from aftcli.pictures.overlay import overlay

def paint(path):
    image = read_image(path)
    to_input(image, Preprocessing())
    overlay(image, view_of(image.size, Preprocessing()), map_, map_ > 0.5)

map_ = torch.rand(224, 224)
small, large = (Path(path) for path in sys.argv[1:])
paint(small)
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
paint(large)
# Not ru_maxrss: a child starts with its parent's.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").open())
peak = int(status["VmHWM"].split()[0]) * 1024
print((peak - before) / (6000 * 4500 * 4))
"""
    command = [sys.executable, "-c", script, IMAGES / "rocket.jpg", tmp_path / "large.jpg"]
    copies = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 1.5 < copies < 2.6  # of four bytes a pixel: the picture, the painted one, the map's


SIZES = [(451, 300), (200, 300), (5, 7), (7, 5), (300, 301), (224, 224), (333, 500), (1, 9)]


def pictures():
    names = ("chelsea", "coffee", "rocket")
    return [read_image(IMAGES / f"{name}.jpg") for name in names] + [noise(*s) for s in SIZES]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "vgg16", "mobilenet_v3_large", "inception_v3"])
def test_x_equals_torchvisions(name):
    from torchvision.models import get_model_weights

    transform = get_model_weights(name).IMAGENET1K_V1.transforms()
    prep = find_source(name)(name, False, None).preprocessing
    for picture in pictures():
        assert torch.equal(to_input(picture, prep)[0], transform(picture)), picture.size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "interpolation"),
    [
        ("efficientnet_lite0", "bicubic"),
        ("efficientnet_lite1", "bicubic"),
        ("efficientnet_lite2", "bicubic"),
        ("timm:resnet18.tv_in1k", "bilinear"),
        ("timm:resnet18", "bicubic"),
        ("timm:convnext_atto", "bicubic"),
    ],
)
def test_x_equals_timms(name, interpolation):
    import timm
    from timm.data import create_transform, resolve_model_data_config

    known = name[5:] if name.startswith("timm:") else f"tf_{name}"
    config = resolve_model_data_config(timm.create_model(known))
    transform = create_transform(**config, is_training=False)
    prep = find_source(name)(name, False, None).preprocessing
    assert prep.interpolation == interpolation
    for picture in pictures():
        assert torch.equal(to_input(picture, prep)[0], transform(picture)), picture.size


def coordinates(width, height):
    """A picture that knows where it is: red grows to the right, green downwards."""
    across, down = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    values = [across / width * 255, down / height * 255, 0 * across]
    return Image.fromarray(np.dstack(values).round().astype(np.uint8))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (900, 120), (64, 1000), (224, 224)])
@pytest.mark.parametrize(
    "prep", [Preprocessing((64, 48), 80, **PLAIN), Preprocessing((48, 64), None, **PLAIN)]
)
def test_the_view_is_where_x_comes_from(size, prep):
    x = to_input(coordinates(*size), prep)[0]
    left, top, right, bottom = view_of(size, prep).box(size)
    across, down = x[0].mean(0) * size[0], x[1].mean(1) * size[1]
    step = (right - left) / x.shape[2], (bottom - top) / x.shape[1]
    # Half a step inside the edges; a grey level is 1/255 of the picture.
    off = [size[0] / 255 + 0.5, size[1] / 255 + 0.5]
    inner = slice(2, -2)
    expected = left + (torch.arange(x.shape[2]) + 0.5) * step[0]
    torch.testing.assert_close(across[inner], expected[inner], atol=off[0], rtol=0)
    expected = top + (torch.arange(x.shape[1]) + 0.5) * step[1]
    torch.testing.assert_close(down[inner], expected[inner], atol=off[1], rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (1, 5001), (3, 40000)])
def test_extreme_shapes_show_their_middle(monkeypatch, size):
    prep = Preprocessing((224, 224), 256, **PLAIN)
    resize, sides = Image.Image.resize, []

    def watched(self, size, *arguments, **options):
        sides.extend(size)
        return resize(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    x = to_input(coordinates(*size), prep)[0]
    assert x.shape == (3, 224, 224)
    # 3 x 40000 is 256 x 3413333 when all of it is scaled: gigabytes for its middle.
    assert max(sides) <= 256 * (LONGEST + 1)
    # Both coordinates are one half in the middle of the picture.
    assert x[0].mean().item() == pytest.approx(0.5, abs=0.005)
    assert x[1].mean().item() == pytest.approx(0.5, abs=0.005)


def test_cutting_a_long_picture_changes_nothing():
    prep = Preprocessing((32, 32), 36)
    for size in ((4 * LONGEST, 4), (4 * LONGEST + 40, 4), (4, 4 * LONGEST + 41)):
        picture = noise(*size)
        view = view_of(size, prep)
        whole = picture.resize(view.scaled, Image.Resampling.BILINEAR).crop(view.crop)
        expected = to_input(whole, Preprocessing((32, 32), None))
        # Half a pixel of x where rounding falls otherwise; noise would differ by about 1.
        assert (to_input(picture, prep) - expected).abs().mean() < 0.1, size


BLOB = np.exp(-((np.mgrid[:40, :40][0] - 10.0) ** 2) / 60 - (np.mgrid[:40, :40][1] - 26) ** 2 / 90)

# File: how it is written; its values are BLOB's but for scale, within the tolerance.
MAPS = {
    "x.npy": (lambda p: np.save(p, BLOB), 1e-12),
    "x.npz": (lambda p: np.savez(p, BLOB), 1e-12),
    "npz named.npy": (lambda p: np.savez(p.open("wb"), any_name=BLOB), 1e-12),
    "npy named.npz": (lambda p: np.save(p.open("wb"), BLOB), 1e-12),
    "half.npy": (lambda p: np.save(p, BLOB.astype(np.float16)), 1e-3),
    "big endian.npy": (lambda p: np.save(p, BLOB.astype(">f8")), 1e-12),
    "fortran.npy": (lambda p: np.save(p, np.asfortranarray(BLOB)), 1e-12),
    "long.npy": (lambda p: np.save(p, BLOB.astype(np.longdouble)), 1e-12),
    "bytes.npy": (lambda p: np.save(p, (BLOB * 255).astype(np.uint8)), 1 / 128),
    "words.npy": (lambda p: np.save(p, (BLOB * 2.0**63).astype(np.uint64)), 1e-6),
    "huge.npy": (lambda p: np.save(p, BLOB * 1.7e308), 1e-12),
    "tiny.npy": (lambda p: np.save(p, BLOB * 1e-300), 1e-6),
    "denormal.npy": (lambda p: np.save(p, BLOB * 1e-310), 1e-6),
    "grey.png": (lambda p: saved(as_image(BLOB * 255, np.uint8), p), 1 / 128),
    "words.png": (lambda p: saved(as_image(BLOB * 65535, np.uint16), p), 1e-4),
    "float.tif": (lambda p: saved(as_image(BLOB, np.float32), p), 1e-6),
    "grey rgb.png": (lambda p: saved(as_image(BLOB * 255, np.uint8).convert("RGB"), p), 1 / 128),
    "palette.png": (lambda p: saved(as_image(BLOB * 255, np.uint8).convert("P"), p), 1 / 128),
}


@pytest.mark.parametrize("name", MAPS)
def test_read_map(tmp_path, name):
    write, tolerance = MAPS[name]
    write(tmp_path / name)
    values = read_map(tmp_path / name)
    assert values.shape == (40, 40)
    values = values / values.max()
    np.testing.assert_allclose(values, BLOB / BLOB.max(), rtol=0, atol=tolerance)


def test_signs_survive_reading(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[-3e200, 1e200, 0.0]]))
    np.testing.assert_allclose(read_map(tmp_path / "x.npy"), [[-1, 1 / 3, 0]], rtol=1e-15)


X = torch.zeros(1, 3, 48, 64)
PREP = Preprocessing((48, 64), 80, **PLAIN)
SIZE = (300, 200)
VIEW = view_of(SIZE, PREP)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_negatives_are_cut_or_folded():
    values = tensor([[-4.0, 1.0], [0.0, 2.0]])
    cut = fit_map(values, X, SIZE, VIEW)
    folded = fit_map(values, X, SIZE, VIEW, absolute=True)
    corners = [0, 0, -1, -1], [0, -1, 0, -1]
    assert cut[0][corners].tolist() == [0, 0.5, 0, 1]
    assert folded[0][corners].tolist() == [1, 0.25, 0, 0.5]
    assert cut.dtype == folded.dtype == torch.float32


def test_one_negative_outlier_leaves_the_rest(tmp_path):
    values = BLOB.copy()
    values[0] = -1e300
    np.save(tmp_path / "x.npy", values)
    expected = fit_map(tensor(np.where(values < 0, 0, BLOB)), X, SIZE, VIEW)
    assert expected.max() == pytest.approx(1, abs=0.02)
    found = fit_map(read_map(tmp_path / "x.npy"), X, SIZE, VIEW)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("values", [np.zeros((7, 7)), np.full((7, 7), 3.0), np.full((1, 1), 9.0)])
def test_a_constant_map_is_zero(values):
    assert not fit_map(tensor(values), X, SIZE, VIEW).any()


def test_a_smaller_map_is_stretched_over_the_view():
    values = tensor(BLOB[::8, ::8])
    expected = upsample(normalise(values[None]), X.double()).float()
    torch.testing.assert_close(fit_map(values, X, SIZE, VIEW), expected)


def test_a_larger_map_is_averaged_not_sampled():
    fine = tensor(np.kron(BLOB, np.ones((4, 4))))
    # Every second pixel zero: sampling would see the pattern, averaging half of the map.
    striped = fine * (torch.arange(160) % 2 == 0)
    expected = normalise(fine[None])[0]
    expected = torch.nn.functional.adaptive_avg_pool2d(expected[None, None], (48, 64))[0].float()
    found = fit_map(fine, X, SIZE, VIEW)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.04)
    torch.testing.assert_close(fit_map(striped, X, SIZE, VIEW), expected / 2, rtol=0, atol=0.06)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (90, 1000)])
def test_a_map_of_the_pictures_size_is_cropped_with_it(size):
    down, across = np.mgrid[: size[1], : size[0]]
    values = 128 + 60 * np.sin(across / size[0] * 9) + 60 * np.cos(down / size[1] * 11)
    view = view_of(size, PREP)
    found = fit_map(tensor(values), X, size, view)
    # The same map as a grey picture goes the way of the picture.
    grey = Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
    expected = normalise(to_input(grey, PREP)[:, 0])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    # Transposed it is of another size: it covers the view as it is.
    other = fit_map(tensor(values.T), X, size, view)
    assert (other - expected).abs().mean() > 0.1


def test_sizes_of_views_are_torchvisions():
    """The scaled size is int(short * long / side), as Resize computes it."""
    from torchvision.transforms.functional import resize

    prep = Preprocessing((5, 5), 7)
    for width, height in [(w, h) for w in range(1, 40, 3) for h in range(1, 40, 5)]:
        scaled = resize(Image.new("L", (width, height)), 7).size
        assert view_of((width, height), prep).scaled == scaled
        assert math.prod(scaled) >= 49
