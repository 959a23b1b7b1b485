"""Engines: what runs passes without gradients."""
