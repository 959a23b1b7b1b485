"""Attribution methods beyond CAMs, and Quantus' metrics of maps (extras, both)."""
