"""Chromium without a window and without a network, for pages of HTML."""

import shutil
import subprocess

import pytest


def chromium():
    """Return the path of Chromium; without one the test is skipped."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no chromium here")


def browse(address, folder, *options):
    """Run Chromium on a page; no name of a machine is resolved.

    Args:
        address: of the page.
        folder: where it may keep its files.
        options: such as --dump-dom.
    """
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--user-data-dir={folder}/profile", "--hide-scrollbars"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", *options, address]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
