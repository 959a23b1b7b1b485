"""Pictures, maps, data sets, and how they are read."""
