"""The command `thoughtbubbles`: a module for each family of commands, which import what they need when they run."""

from thoughtbubbles.cli.application import app as app
from thoughtbubbles.cli.application import main as main
