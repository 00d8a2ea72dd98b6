"""``python -m gradshield``: the command, for launchers that start modules."""

from gradshield.cli import main

if __name__ == "__main__":
    main()
