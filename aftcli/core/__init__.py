"""The shared core: classifiers, how they are cut, CAMs and the tuner (§2.4, §3.1)."""
