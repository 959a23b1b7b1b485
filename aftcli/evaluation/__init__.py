"""Evaluation (§5): studies, results, tables, sanity, timing."""
