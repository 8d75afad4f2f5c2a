"""`python -m mmopd`: the command line, where the `mmopd` script is not on the path."""

from mmopd.cli import main

main()
