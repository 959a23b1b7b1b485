"""Pictures that do not lie in files of their own, delivered by a format from outside."""

import shutil
import zipfile
from io import BytesIO

import pytest

from aftcli import AftError, MaskStore, read_image
from aftcli.data.blocks import content_of, stamp_of
from aftcli.data.names import DATA_FILES, FORMATS, check_data_set
from aftcli.data.parts import Reading
from aftcli.data.picture import FilePicture, Picture
from aftcli.data.sets import DataSet, Format, Sample, open_data_set
from tests.helpers.command import aft, usage_error
from tests.helpers.stored import NAMES, generate, make_images, small_float


class Member(Picture):
    """A member of a zip file."""

    def __init__(self, path, name):
        self.path, self.member, self.name = path, name, str(path.parent / name)

    def open(self):
        with zipfile.ZipFile(self.path) as archive:
            return BytesIO(archive.read(self.member))

    def stat(self):
        with zipfile.ZipFile(self.path) as archive:
            return archive.getinfo(self.member).file_size, self.path.stat().st_mtime_ns


class Zipped(Format):
    """Class folders in a folder's images.zip."""

    named_by_folder = True

    def open(self, path, split, classes, default):
        if not (path / "images.zip").is_file():
            return None
        with zipfile.ZipFile(path / "images.zip") as archive:
            names = sorted(n for n in archive.namelist() if n.endswith(".png"))
        samples = [Sample(name, NAMES.index(name.split("/")[0])) for name in names]
        return DataSet("zipped", path, "", classes.names, True, samples)

    def picture(self, data_set, name):
        found = Member(data_set.beside("images.zip"), name)
        with zipfile.ZipFile(found.path) as archive:
            if name not in archive.namelist():
                raise AftError(f"{found}: there is no such member")
        return found


@pytest.fixture
def zipped(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "zipped", f"{__name__}:Zipped")
    make_images(tmp_path / "plain", each=2)
    shutil.make_archive(str(tmp_path / "zipped/images"), "zip", tmp_path / "plain")
    return tmp_path / "zipped"


def test_a_picture_is_read_as_from_a_file(zipped, tmp_path):
    data = open_data_set(zipped, None, small_float().classes)
    plain = open_data_set(tmp_path / "plain", None, small_float().classes)
    assert [s.name for s in data.samples] == [s.name for s in plain.samples]
    for member, file in zip(data.pictures(), plain.pictures(), strict=True):
        assert isinstance(file, FilePicture) and not isinstance(member, FilePicture)
        assert read_image(member).tobytes() == read_image(file).tobytes()
        assert content_of(member) == content_of(file) == content_of(file.path)
        assert stamp_of(member)[0] == stamp_of(file)[0] == file.path.stat().st_size


def test_masks_do_not_depend_on_where_pictures_lie(zipped, tmp_path):
    (tmp_path / "plain/pear/1.png").write_bytes(b"no picture")
    shutil.make_archive(str(zipped / "images"), "zip", tmp_path / "plain")
    stores = []
    for root in (zipped, tmp_path / "plain"):
        for workers in (0, 2):
            run = tmp_path / f"{root.name}-{workers}"
            generate(root, run, ("gradcam",), workers=workers)
            stores.append(MaskStore(run / "masks/small-gradcam.h5"))
    for store in stores:
        assert store.settings["digest"] == stores[0].settings["digest"]
        assert store.broken == stores[0].broken and len(store.broken) == 1
        assert "is not a picture in a known format" in store.broken[0].reason
        assert str(tmp_path) not in store.broken[0].reason
    # The names that a store keeps find their pictures again.
    assert stores[0].changed(open_data_set(zipped, None, small_float().classes), range(5)) == []
    (tmp_path / "plain/apple/0.png").write_bytes((tmp_path / "plain/plum/0.png").read_bytes())
    shutil.make_archive(str(zipped / "images"), "zip", tmp_path / "plain")
    data = open_data_set(zipped, None, small_float().classes)
    assert stores[0].changed(data, range(5)) == ["apple/0.png"]


def test_a_format_may_be_named(zipped, tmp_path):
    classes = small_float().classes
    assert open_data_set(zipped, None, classes, reading=Reading("zipped")).kind == "zipped"
    for kind, root in (("voc", zipped), ("zipped", tmp_path / "plain")):
        with pytest.raises(AftError, match=f"{root.name}: is no data set of the format {kind}"):
            open_data_set(root, None, classes, reading=Reading(kind))
    with pytest.raises(AftError, match="zipped: is no data set: it has no class folders"):
        open_data_set(zipped, None, classes, reading=Reading("folders"))


@pytest.mark.parametrize("command", ["gen-masks", "finetune", "evaluate"])
def test_an_unknown_format_is_a_usage_error(command):
    said = usage_error(aft(command, "data", "--data-format", "lmdb"))
    assert f"unknown format of data sets 'lmdb'; there are {', '.join(FORMATS)}" in said


def test_what_is_no_data_set_is_told_at_once(tmp_path):
    (tmp_path / "picture.png").touch()
    for name in ("picture.png", "gone", *(f"gone{ending}" for ending in DATA_FILES)):
        with pytest.raises(AftError, match=f"{name}: there is no such folder"):
            check_data_set(tmp_path / name)
