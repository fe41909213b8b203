"""`python -m nexactor`: the command line."""

from nexactor.cli.main import main

if __name__ == "__main__":
    main()
