"""Sealed files: tensors and plain values that come back as written, or not at all."""

import hashlib
import json
import struct

import pytest
import torch
from safetensors.torch import save

from aftcli.files import read_sealed, write_sealed, write_tensors

TENSORS = {"b/x": torch.tensor([[1.5, -2.0, float("nan")]]), "a": torch.tensor([3, 2**40])}
HEAD = {"identity": {"model": "é", "t": [0.5, None]}, "broken": [["a.png", "torn", 1]]}


def seal_by_hand(text):
    """The hash as docs/reference/files.md has it, with the bytes of the tensors written out."""
    a = b"a (2,) torch.int64" + struct.pack("<2q", 3, 2**40)
    b = b"b/x (1, 3) torch.float32" + struct.pack("<3f", 1.5, -2.0, float("nan"))
    return hashlib.sha256((text + hashlib.sha256(a + b).hexdigest()).encode()).hexdigest()


def test_what_is_written_comes_back(tmp_path):
    write_sealed(tmp_path / "s", TENSORS, "aft_result", HEAD)
    tensors, head = read_sealed(tmp_path / "s", "aft_result")
    assert head == HEAD and list(tensors) == ["a", "b/x"]
    for name, value in tensors.items():
        torch.testing.assert_close(value, TENSORS[name], rtol=0, atol=0, equal_nan=True)


def test_the_bytes_are_those_of_the_documented_form(tmp_path):
    write_sealed(tmp_path / "s", TENSORS, "aft_result", HEAD)
    text = json.dumps(HEAD)
    sealed = json.dumps({"head": text, "sha256": seal_by_hand(text)})
    assert (tmp_path / "s").read_bytes() == save(TENSORS, {"aft_result": sealed})


def test_a_file_that_lost_a_bit_or_its_end_is_not_read(tmp_path):
    path = tmp_path / "s"
    write_sealed(path, TENSORS, "aft_result", HEAD)
    whole = path.read_bytes()
    for i in range(len(whole)):
        for bit in (0, 5):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :])
            assert read_sealed(path, "aft_result") is None, i
        path.write_bytes(whole[:i])
        assert read_sealed(path, "aft_result") is None


@pytest.mark.parametrize("metadata", [{}, {"other": "{}"}, {"aft_result": "[]"}])
def test_a_file_without_the_head_is_not_read(tmp_path, metadata):
    write_tensors(tmp_path / "s", TENSORS, metadata)
    assert read_sealed(tmp_path / "s", "aft_result") is None
    assert read_sealed(tmp_path / "missing", "aft_result") is None
    assert read_sealed(tmp_path, "aft_result") is None
