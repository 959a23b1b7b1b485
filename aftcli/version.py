"""The version of aft."""

__version__ = "0.1.0"
