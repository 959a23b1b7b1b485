"""Classifiers: networks loaded, cut, tuned (§4.2), and given other targets."""
