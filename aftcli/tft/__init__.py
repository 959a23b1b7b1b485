"""Threshold fine-tuning (§4.1): equations, search, one image explained."""
