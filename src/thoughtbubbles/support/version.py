"""The version of the package, where everything can read it."""

VERSION = "0.1.0"
