"""Measures of maps (§5.2 and beyond): by name, their formulas, controls, intervals."""
