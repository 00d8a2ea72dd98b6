"""``python -m gradshield``: the command."""

from gradshield.cli import main

if __name__ == "__main__":
    main()
