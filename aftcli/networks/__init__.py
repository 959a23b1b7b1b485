"""Networks by name, before they are cut: sources, code, weights."""
