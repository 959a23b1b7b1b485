"""Masks of data sets (§4.1, §4.2): made, stored in HDF5, found again for a run."""
