"""Run the command line as ``python -m pals``."""

from pals.cli.app import main

if __name__ == "__main__":
    main()
