"""Messages of `aft finetune` beside its table."""

from pathlib import Path

import pytest

# Imported here, before it is replaced.
import aftcli.engine.export  # noqa: F401
from aftcli.report.tuned import export


@pytest.mark.parametrize("quiet", [False, True])
def test_an_export_is_said_unless_quiet(tmp_path, monkeypatch, capsys, quiet):
    def write(checkpoint, path, model):
        assert (checkpoint, model) == (tmp_path / "a.safetensors", "net.py:make")
        Path(path).write_bytes(b"graph")

    monkeypatch.setattr("aftcli.engine.export.export_onnx", write)
    target = export(tmp_path / "a.safetensors", "net.py:make", quiet)
    assert target == tmp_path / "a.onnx" and target.read_bytes() == b"graph"
    said = "" if quiet else f"exporting {target}\n"
    assert capsys.readouterr() == ("", said)
