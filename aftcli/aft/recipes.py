"""Default training recipes, chosen by the number of images per class (docs/aft-study.md)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from aftcli.aft.jobs import Job
from aftcli.aft.loss import ZERO_LEVEL, Recipe, check_settings

# From so many training images a class on, training generalises; it memorises fewer.
MANY = 50

STEPS = 420

# Settings that decide a zero level; others say nothing there.
ZERO_LEVEL_TAKES = {
    *("objective", "gauge", "learning_rate", "epochs", "batch", "held_out", "seed"),
}


class Situation(NamedTuple):
    """A situation in words, and its settings, fields of `Recipe`.

    A small data set gets more epochs than these, for so many `steps`.
    """

    title: str
    settings: dict[str, Any]
    steps: int = 0


SITUATIONS = {
    ZERO_LEVEL: Situation(
        "the zero level",
        {"lam": None, "learning_rate": 2e-3, "epochs": 15, "patience": 0},
    ),
    "new": Situation("a new last layer", {"learning_rate": 3e-4, "epochs": 30}),
    "many": Situation(
        f"{MANY} or more images a class",
        {
            "lam": 0.1,
            "learning_rate": 3e-4,
            "epochs": 10,
            "consistency": 4.0,
            "classification": "labels",
        },
        STEPS,
    ),
    "few": Situation(
        f"fewer than {MANY} images a class",
        {
            "lam": 0.1,
            "learning_rate": 3e-4,
            "epochs": 8,
            "consistency": 1.0,
            "classification": "distillation",
            "blend": 0.7,
        },
        STEPS,
    ),
}


def situation_of(job: Job, objective: str = Recipe.objective) -> Situation:
    """Return the situation that a job with an objective is in."""
    if objective == ZERO_LEVEL and job.masks is not None:
        return SITUATIONS[ZERO_LEVEL]
    if job.new_head:
        return SITUATIONS["new"]
    labels = [sample.label for sample in job.data_set.samples]
    return SITUATIONS["many" if len(labels) >= MANY * len(set(labels)) else "few"]


def in_situation(**asked: Any) -> Callable[[Job], Recipe]:  # noqa: ANN401
    """Return a function that gives a job's settings: those asked for, and its situation's.

    A job without masks has the learning rate and the epochs of one with masks, and plain
    cross-entropy.

    Args:
        asked: fields of `Recipe`; None leaves one to the situation.

    Raises:
        AftError: a value is out of range.
    """
    given = {name: value for name, value in asked.items() if value is not None}

    def settings(job: Job) -> Recipe:
        situation = situation_of(job, given.get("objective", Recipe.objective))
        if situation is SITUATIONS[ZERO_LEVEL]:
            kept = {name: given[name] for name in ZERO_LEVEL_TAKES & given.keys()}
            return Recipe(**{**situation.settings, **kept})
        found = Recipe(**{**situation.settings, **given})
        if "epochs" not in given:
            an_epoch = math.ceil(len(job.data_set.samples) * (1 - found.held_out) / found.batch)
            enough = math.ceil(situation.steps / max(an_epoch, 1))
            found = replace(found, epochs=max(found.epochs, enough))
        if job.masks is None:
            return replace(
                found,
                lam=None,
                consistency=0.0,
                classification=Recipe.classification,
                objective=Recipe.objective,
                blend=given.get("blend", 1.0),
            )
        return found

    check_settings(Recipe(**given))
    return settings
