"""The console script `thoughtbubbles`.

It stands outside of the package, which imports no model where this module is loaded: so help and version answer at
once, and commands import what they need when they run.
"""


def main() -> None:
    """Run the command."""
    from thoughtbubbles.cli import main as run

    run()
