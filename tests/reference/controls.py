"""Controls of equal amount, cell by cell and pixel by pixel, in float64."""

import math

import torch

ROUNDING = 2.0**-20


def shifted(cells, t):
    """ReLU(I - t), the largest score one again."""
    if t == 0:
        return cells
    left = [[v - t if v >= t + ROUNDING else 0.0 for v in line] for line in cells]
    low = min(v for line in left for v in line)
    high = max(v for line in left for v in line)
    return [[(v - low) / (high - low) if high > low else 0.0 for v in line] for line in left]


def stretched(cells, size):
    """Bilinear between the centres of cells, lines of pixels."""
    h, w = len(cells), len(cells[0])

    def place(pixel, count, side):
        at = min(max((pixel + 0.5) * (count / side) - 0.5, 0), count - 1)
        low = math.floor(at)
        return low, min(low + 1, count - 1), at - low

    found = []
    for i in range(size[0]):
        top, bottom, down = place(i, h, size[0])
        line = []
        for j in range(size[1]):
            left, right, across = place(j, w, size[1])
            one, two = (
                cells[row][left] + (cells[row][right] - cells[row][left]) * across
                for row in (top, bottom)
            )
            line.append(one + (two - one) * down)
        found.append(line)
    return found


def _highest(scores, share):
    """One for the highest scores, the first of equal ones, zero for the others."""
    pixels = [(i, j) for i in range(len(scores)) for j in range(len(scores[0]))]
    kept = sorted(pixels, key=lambda at: -scores[at[0]][at[1]])[: round(share * len(pixels))]
    return [[float((i, j) in kept) for j in range(len(scores[0]))] for i in range(len(scores))]


def random_cells(cells, size, share, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, *cells, generator=generator, dtype=torch.double)[0].tolist()
    # Rounded, as what lies between equal corners rounds in its own way.
    return _highest([[round(v, 12) for v in line] for line in stretched(scores, size)], share)


def disc(size, share):
    """Nearest to the centre in units of the sides; in whole numbers, so that equals are equal."""
    h, w = size
    return _highest(
        [
            [-(((2 * i + 1 - h) * w) ** 2) - ((2 * j + 1 - w) * h) ** 2 for j in range(w)]
            for i in range(h)
        ],
        share,
    )
