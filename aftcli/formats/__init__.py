"""Formats of data sets, one a file: `aftcli.data.sets.FORMATS` lists them."""
