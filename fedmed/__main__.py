"""`python -m fedmed` is `fedmed`."""

from fedmed.cli import main

if __name__ == "__main__":
    main()
