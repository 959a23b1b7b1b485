"""Slow, literal measures of maps: plain Python floats, one image and one pixel at a time."""

import math


def cells(values):
    """The pixels of a map, row by row, as floats."""
    return [float(v) for row in values.tolist() for v in row]


def increase(y_hat, y):
    return 1.0 if y_hat > y else 0.0


def drop(y_hat, y):
    return max(y - y_hat, 0.0) / y


def gain(y_hat, y):
    return max(y_hat - y, 0.0) / (1 - y)


def complexity(attribution):
    found = cells(attribution)
    return sum(abs(v) for v in found) / len(found)


def pearson(one, two):
    a, b = cells(one), cells(two)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    top = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
    spread_a = math.sqrt(sum((p - mean_a) ** 2 for p in a))
    spread_b = math.sqrt(sum((q - mean_b) ** 2 for q in b))
    return top / (spread_a * spread_b)


def adcc(coherency, complexity, drop):
    return 3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop))


def arcc(coherency, complexity, road, road_last):
    """0 where a part is 0: there the mean has no other limit."""
    parts = (coherency, 1 - complexity, max(road_last - road, 0))
    return 3 / sum(1 / part for part in parts) if min(parts) > 0 else 0.0


def in_order(attribution):
    """Places (row, column) from the highest score to the lowest; of equal ones the first first."""
    values = [[round(v * 2**20) for v in row] for row in attribution.tolist()]
    places = [(r, c) for r in range(len(values)) for c in range(len(values[0]))]
    return sorted(places, key=lambda place: -values[place[0]][place[1]])


def area(start, attribution, goal, probability, steps):
    """Trapezoids under the probability while pixel after pixel of goal is put into start."""
    places, image, put, curve = in_order(attribution), start.clone(), 0, []
    for step in range(steps + 1):
        while put < round(step / steps * len(places)):
            r, c = places[put]
            image[:, r, c] = goal[:, r, c]
            put += 1
        curve.append(probability(image))
    return sum((a + b) / 2 for a, b in zip(curve, curve[1:], strict=False)) / steps


def energy(attribution, region):
    values, inside = cells(attribution), cells(region)
    return sum(v for v, i in zip(values, inside, strict=True) if i) / sum(values)


def iou(mask, region, counted):
    triples = list(zip(cells(mask), cells(region), cells(counted), strict=True))
    both = sum(1 for m, r, k in triples if m and r and k)
    return both / sum(1 for m, r, k in triples if (m or r) and k)
