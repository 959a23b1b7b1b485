"""`python -m aftcli` is `aft`."""

from __future__ import annotations

from aftcli.cli.app import main

main()
