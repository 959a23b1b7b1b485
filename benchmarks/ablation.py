"""Time a map by Ablation-CAM against one by Grad-CAM, whole network included.

    python benchmarks/ablation.py [--runs 15]

The methods take turns, so that a drift of the machine's speed hits both; medians and the ratio
of each pair are printed. Weights are random: the time does not depend on them, but the share of
empty channels does, so VGG-16 is the cautious case (half of its channels at random weights).
"""

import argparse
import platform
import statistics
import time

import torch

from aftcli import attribution_map, load_classifier

METHODS = ("gradcam", "ablationcam")


def seconds(f: torch.nn.Module, x: torch.Tensor, c: torch.Tensor, method: str) -> float:
    """Seconds for one map."""
    start = time.perf_counter()
    attribution_map(f, x, c, method)
    return time.perf_counter() - start


def main() -> None:
    """Print a row a model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vgg16", "efficientnet_lite0"])
    runs, models = (args := parser.parse_args()).runs, args.models
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads,")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, median of {runs} runs\n")
    print("| model | Grad-CAM s | Ablation-CAM s | ratio: median (min .. max) |")
    print("|---|---|---|---|")
    for name in models:
        torch.manual_seed(0)
        f = load_classifier(name, weights=False)
        x = torch.randn(1, 3, *f.preprocessing.size)
        c = f(x).argmax(1)
        for method in METHODS:
            seconds(f, x, c, method)
        pairs = [[seconds(f, x, c, method) for method in METHODS] for _ in range(runs)]
        ratios = sorted(b / a for a, b in pairs)
        grad, ablation = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(
            f"| {name} | {grad:.4f} | {ablation:.4f} | {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} .. {ratios[-1]:.2f}) |"
        )


if __name__ == "__main__":
    main()
