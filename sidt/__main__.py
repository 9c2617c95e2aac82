"""`python -m sidt`."""

from sidt.cli import main

main()
