"""`python -m sidt`."""

from sidt.cli.commands import main

main()
