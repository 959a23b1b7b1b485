"""The results of many images in few numbers: means, tau*, the most common classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

MOST_TAUS = 11  # columns of a distribution; more thresholds are counted in tenths

COMMON = 5  # classes that a summary names


class Numbers(NamedTuple):
    """The numbers of a result; None where it has none.

    Attributes:
        probability: y^c of the whole input.
        tau: tau*, or the fixed threshold.
        rpi: the RPI at tau*.
        masked: y_hat^c of what is kept.
        kept: the share of pixels kept.
    """

    probability: float
    tau: float | None = None
    rpi: float | None = None
    masked: float | None = None
    kept: float | None = None


def numbers_of(result: Mapping[str, Any]) -> Numbers:
    """Return the numbers of a result as `aftcli.report.explain.as_dict` gives it."""
    y = result["probability"]
    if found := result.get("tft"):
        at = found["thresholds"].index(found["tau"])
        return Numbers(y, found["tau"], found["rpi"][at], found["probability"], found["area"])
    if found := result.get("fixed"):
        return Numbers(y, found["threshold"], None, found["probability"], found["area"])
    return Numbers(y)


def increases_of(result: Mapping[str, Any]) -> str:
    """Write what each judge of a search gains at tau*; "" where none was asked."""
    judges = result.get("tft", {}).get("judges", ())
    said = ", ".join(
        f"{each['name']} not asked"
        if each["log_odds_increase"] is None
        else f"{each['name']} {each['log_odds_increase']:+.2f}"
        for each in judges
    )
    return f"log-odds at tau* {said}" if said else ""


def label_of(result: Mapping[str, Any]) -> str:
    """Name the class of a result for people: its name and its index, the class it is not."""
    named = f"{result['class_name']} ({result['class_index']})"
    if other := result.get("contrast"):
        named += f", not {other['class_name']} ({other['class_index']})"
    return named


Network = tuple[str, str]  # model and checkpoint, "" for published weights

Place = tuple[Network, str]  # a network and a method


def network_of(result: Mapping[str, Any]) -> Network:
    """Return the network of a result."""
    return result["model"], result.get("checkpoint", "")


def network_labels(networks: Sequence[Network]) -> list[str]:
    """Name networks as grids do."""
    from aftcli.report.compared import labels  # imports torch

    return labels(networks)


class Means:
    """Means over the results of one method; RPI without those of a probability of 0."""

    def __init__(self) -> None:
        self.results = 0
        self.sums: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def add(self, numbers: Numbers) -> None:
        """Add one result."""
        self.results += 1
        for name, value in numbers._asdict().items():
            # RPI divides by the probability.
            if value is not None and (name != "rpi" or numbers.probability):
                self.sums[name] += value
                self.counts[name] += 1

    def of(self, name: str) -> float | None:
        """Return the mean of a field of Numbers; None where no result has it."""
        return self.sums[name] / self.counts[name] if self.counts[name] else None


class Summary:
    """Sums and counts of results, of a size that does not grow with the number of images."""

    def __init__(self) -> None:
        self.results = 0
        self.images = 0
        self.files = 0
        self.means: dict[Place, Means] = {}
        self.taus: dict[Place, Counter[float]] = {}
        self.searched: set[float] = set()  # the thresholds of all searches
        self.classes: Counter[str] = Counter()
        self._last: str | None = None
        self._labels: set[str] = set()  # of the last image

    def add(self, results: Iterable[Mapping[str, Any]]) -> None:
        """Add results; those of one image follow each other."""
        for result in results:
            numbers, place = numbers_of(result), (network_of(result), result["cam"])
            self.results += 1
            if result["image"] != self._last:
                self.images += 1
                self._last, self._labels = result["image"], set()
            self.files += len(result["outputs"])
            self.means.setdefault(place, Means()).add(numbers)
            if (label := label_of(result)) not in self._labels:
                self.classes[label] += 1
                self._labels.add(label)
            if "tft" in result:
                self.taus.setdefault(place, Counter())[result["tft"]["tau"]] += 1
                self.searched.update(result["tft"]["thresholds"])

    def common(self) -> list[tuple[str, int]]:
        """Return the most common classes and in how many images each is explained."""
        return self.classes.most_common(COMMON)

    def networks(self) -> dict[Network, str]:
        """Return the networks with their names."""
        known = list(dict.fromkeys(network for network, _ in self.means))
        return dict(zip(known, network_labels(known), strict=True))

    def named(self) -> Iterator[tuple[Place, str]]:
        """Yield places with a name for each, the network's too where there are several."""
        networks = self.networks()
        for network, cam in self.means:
            name = f"{cam}, {networks[network]}" if len(networks) > 1 else cam
            yield (network, cam), name

    def thresholds(self) -> list[tuple[float, dict[Place, int]]]:
        """Return how many results of each place have each tau*, in tenths of many."""
        tenths = [i / 10 for i in range(11)]
        known = tenths if self.in_tenths else sorted(self.searched)
        found: dict[float, Counter[Place]] = {tau: Counter() for tau in known}
        for place, taus in self.taus.items():
            for tau, count in taus.items():
                # 0.3 is a little less than 3 tenths.
                found[int(tau * 10 + 1e-9) / 10 if self.in_tenths else tau][place] += count
        return [(tau, dict(counts)) for tau, counts in found.items()]

    @property
    def in_tenths(self) -> bool:
        """True where thresholds are counted in tenths: [0, 0.1), [0.1, 0.2) and so on."""
        return len(self.searched) > MOST_TAUS
