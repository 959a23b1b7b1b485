"""Coverage: which networks can be explained, and whether what is shown is right."""
