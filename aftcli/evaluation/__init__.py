"""Evaluation (§5): measures, tables, sanity, timing."""
