"""``python -m aero``: the command line, for launchers that start a module."""

from aero.cli import main

main()
