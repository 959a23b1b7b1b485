"""Training images that are held out to choose the epoch."""

import numpy as np
import pytest

from aftcli.data.parts import choose_held_out


@pytest.mark.parametrize("seed", range(40))
def test_held_out_images_are_spread_over_the_classes_whatever_the_order(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, rng.integers(1, 60)).tolist()
    share = float(rng.uniform(0, 0.99))
    names = [f"{i}.jpg" for i in range(len(labels))]
    train, held_out = choose_held_out(names, labels, share, seed)
    assert sorted(train + held_out) == list(range(len(labels)))
    assert len(held_out) == int(len(labels) * share)
    # In the order of the classes each gets its share, but for rounding at both ends.
    for c in set(labels):
        of_class = labels.count(c)
        held = sum(labels[i] == c for i in held_out)
        assert abs(held - of_class * len(held_out) / len(labels)) <= 2
    turned = choose_held_out(names[::-1], labels[::-1], share, seed)[1]
    assert {names[::-1][i] for i in turned} == {names[i] for i in held_out}


@pytest.mark.parametrize("seed", range(10))
def test_all_labels_of_an_image_are_held_out_or_none(seed):
    rng = np.random.default_rng(seed)
    rows = [(f"{i}.jpg", c) for i in range(30) for c in range(4) if rng.uniform() < 0.5]
    names, labels = zip(*rows, strict=True)
    train, held_out = choose_held_out(names, labels, 0.1, seed)
    assert sorted(train + held_out) == list(range(len(rows)))
    assert held_out and not {names[i] for i in train} & {names[i] for i in held_out}
    one = choose_held_out(["a.jpg"] * 20, list(range(20)), 0.1, seed)
    assert one == (list(range(20)), [])
