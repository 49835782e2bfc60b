"""`python -m pipeline` is the command `fruits`."""

from pipeline.cli import main

main()
