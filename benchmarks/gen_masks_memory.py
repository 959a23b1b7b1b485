"""Peak memory of gen-masks for few and for many images, each in a process of its own.

    python benchmarks/gen_masks_memory.py DATA/imagenet [--counts 200 2000]

One threshold instead of eleven: the memory is that of a batch, and does not depend on |T|'s cost.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path


def peak(data: Path, count: int, thresholds: str) -> float:
    """Peak MB of the largest process of a run."""
    code = (
        "import resource, sys; from aftcli.cli.app import app; "
        "\ntry: app(sys.argv[1:])\nexcept SystemExit as end: assert not end.code"
        "\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    with tempfile.TemporaryDirectory() as run:
        arguments = ["gen-masks", str(data), "--limit", str(count), "--run", run, "--json"]
        command = [sys.executable, "-c", code, *arguments, "--thresholds", thresholds]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output.split()[-1]) / 1024


def main() -> None:
    """Print a row a count, and the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--counts", type=int, nargs=2, default=[185, 1850])
    parser.add_argument("--thresholds", default="0.5")
    args = parser.parse_args()
    few, many = (peak(args.data, count, args.thresholds) for count in args.counts)
    print(f"{args.counts[0]} images: {few:.0f} MB; {args.counts[1]} images: {many:.0f} MB")
    print(f"ratio {many / few:.3f}")


if __name__ == "__main__":
    main()
