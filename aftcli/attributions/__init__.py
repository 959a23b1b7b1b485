"""Attribution methods beyond CAMs."""
