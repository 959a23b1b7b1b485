"""Threshold fine-tuning (§4.1): equations, search, masks of data sets."""
