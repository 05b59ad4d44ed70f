"""`python -m treadle` is the console script `treadle`."""

from .frontend.cli import main

if __name__ == "__main__":
    main()
