"""The commands of `python -m parity`."""

from parity.cli.main import main as main
