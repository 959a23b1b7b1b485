"""A grid of one image's explanations, as rows of tiles."""

from aftcli.pictures.grid import Row, drawn, tile


def grid(shown):
    """Draw explanations of several methods or classes, each pair of them once."""
    methods = list(dict.fromkeys(each.explanation.cam for each in shown))
    classes = list(dict.fromkeys(each.explanation.class_index for each in shown))
    places = {(e.explanation.cam, e.explanation.class_index): tile(e) for e in shown}
    return drawn([Row("", [places.get((cam, c)) for cam in methods]) for c in classes])
