"""`python -m trl_ext` is `trl-ext`, for `accelerate launch --module trl_ext`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
