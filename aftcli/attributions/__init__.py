"""Attribution methods beyond CAMs (the optional extra `attributions`)."""
