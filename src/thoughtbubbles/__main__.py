"""Entry point of `python -m thoughtbubbles`."""

from thoughtbubbles.cli import main

if __name__ == "__main__":
    main()
