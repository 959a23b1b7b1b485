"""Run the test suite with the lowest or the newest versions of the dependencies.

    python -m benchmarks versions --lowest --venv .venv-lowest --json versions.json
    python3.13 -m benchmarks versions --newest --venv .venv-newest --json versions.json

`--lowest` takes of each dependency of pyproject.toml, those of the dev extra too, the very version
that its `>=` names; what they depend on is the newest that fits. AFT_SHARED tells the tests where
the real images are. Each run takes the place of the like run in the JSON file. A set that was
installed before is not installed again with `--installed`; what follows `--` goes to pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
LOWEST, _ = SETS = ("lowest", "newest")
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)>=(?P<version>[\w.]+)")


def requirements() -> list[str]:
    """Return what the package and its dev extra require, as pyproject.toml has it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["dev"]]


def lowest(requirement: str) -> str:
    """Return the lowest version that a requirement admits, pinned.

    >>> lowest("h5py>=3.12.1")
    'h5py==3.12.1'
    """
    found = REQUIREMENT.fullmatch(requirement)
    if not found:
        raise SystemExit(f"pyproject.toml: {requirement}: not of the form name>=version")
    return f"{found['name']}=={found['version']}"


def call(*command: str | Path) -> None:
    """Run a command in the repository's root; its failure is ours."""
    subprocess.run(command, cwd=ROOT, check=True)


def install(python: Path, which: str, pins: Iterable[str]) -> None:
    """Install the package, editable, and its dev extra with one set of versions."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("\n".join(pins if which == LOWEST else ()))
        pip = (python, "-m", "pip", "install", "--quiet", "--upgrade")
        call(*pip, "--upgrade-strategy", "eager", "-c", constraints, "-e", ".[dev]")


def installed(python: Path) -> dict[str, str]:
    """Return each package's version, by its name in lower case."""
    command = (python, "-m", "pip", "list", "--format", "json", "--exclude-editable")
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {package["name"].lower(): package["version"] for package in json.loads(out)}


def run_tests(python: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Return counts, names of what failed, and minutes of a run of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        start = time.perf_counter()
        command = (python, "-m", "pytest", "-q", f"--junit-xml={report}", *arguments)
        code = subprocess.run(command, cwd=ROOT).returncode
        minutes = (time.perf_counter() - start) / 60
        if not report.exists():
            raise SystemExit(f"pytest made no report: exit code {code}")
        suite = ElementTree.parse(report).getroot()[0]
    counts = {key: int(suite.get(key, 0)) for key in ("failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {
        "passed": int(suite.get("tests", 0)) - sum(counts.values()),
        "failed": counts["failures"] + counts["errors"],
        "skipped": counts["skipped"],
        "minutes": round(minutes, 1),
        "failing": failed,
        "exit_code": code,
    }


def main() -> int:
    """Install, run, print, and keep the figures."""
    parser = argparse.ArgumentParser(description="The suite with old and new dependencies.")
    which = parser.add_mutually_exclusive_group(required=True)
    for name in SETS:
        which.add_argument(f"--{name}", dest="which", action="store_const", const=name)
    parser.add_argument("--python", default=sys.executable, help="what the new environment runs")
    parser.add_argument("--venv", type=Path, required=True, help="folder of the environment")
    parser.add_argument("--installed", action="store_true", help="take the environment as it is")
    parser.add_argument("--json", type=Path, help="file for the figures; other runs in it stay")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    args = parser.parse_args()

    python = args.venv.absolute() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pins = [lowest(requirement) for requirement in requirements()]
    if not python.exists():
        call(args.python, "-m", "venv", args.venv.absolute())
    if not args.installed:
        install(python, args.which, pins)
    command = (python, "-c", "import platform; print(platform.python_version())")
    version = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    packages = installed(python)
    print(f"Python {version}, {args.which}:")
    for pin in pins:
        name = pin.partition("==")[0]
        print(f"  {name} {packages[name]}", flush=True)
    run = {
        "python": version,
        "set": args.which,
        **run_tests(python, args.pytest),
        "versions": packages,
    }
    print(json.dumps({key: value for key, value in run.items() if key != "versions"}, indent=2))
    if args.json:
        runs = json.loads(args.json.read_text()) if args.json.exists() else []
        like = (version, args.which)
        runs = [other for other in runs if (other["python"], other["set"]) != like]
        args.json.write_text(json.dumps([*runs, run], indent=2) + "\n")
    return run["exit_code"]
