"""Folders and files that the system refuses to read, also to root, whom modes do not stop."""

import errno
import os
from pathlib import Path


def refuse_to_read(monkeypatch, *paths):
    """Answer that these folders and files may not be read."""
    refused = {os.path.realpath(path) for path in paths}

    def refusing(usual):
        def call(path=".", *rest, **options):
            if not isinstance(path, int) and os.path.realpath(path) in refused:
                raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
            return usual(path, *rest, **options)

        return call

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    monkeypatch.setattr(Path, "read_bytes", refusing(Path.read_bytes))
