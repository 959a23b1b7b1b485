"""Models, attribution maps and the tuner: everything that the commands share."""
