"""`python -m abliterate`."""

from abliterate.cli.app import main

if __name__ == "__main__":
    main()
