"""The end of `aft gen-masks`: what it prints, and its exit code."""

import json

import pytest
from PIL import Image

from tests.helpers.command import aft
from tests.helpers.stored import make_images, small_float


@pytest.mark.parametrize("json_", [False, True])
def test_masks_of_no_image_are_a_failure(tmp_path, monkeypatch, json_):
    monkeypatch.setattr("aftcli.models.load.load_classifier", lambda *_, **__: small_float())
    data = make_images(tmp_path / "data", each=2)
    broken = sorted(path for path in data.rglob("*") if path.is_file())
    for path in broken:
        path.write_bytes(b"no picture")
    options = ("--workers", "0", "--thresholds", "0.3", "--val-share", "0", *["--json"] * json_)
    command = ("gen-masks", data, "--run", tmp_path / "run", *options)
    for _ in range(2):  # also where it was done before
        done = aft(*command)
        *left_out, last = done.err.splitlines()
        assert done.code == 1 and len(left_out) == len(broken) == 6
        assert last.endswith(
            "small-gradcam.h5: holds no image, for none could be read; mend or replace them, then "
            "run the same command with --overwrite"
        )
        if json_:
            assert json.loads(done.out)["stores"][0]["images"] == 0
    Image.new("RGB", (40, 40), "red").save(broken[0])
    done = aft(*command, "--overwrite")
    assert done.code in (0, None) and len(done.err.splitlines()) == 5
