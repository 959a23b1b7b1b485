"""`python -m aftcli` is `aft`."""

from aftcli.cli import main

main()
