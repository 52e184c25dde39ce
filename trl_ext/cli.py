"""The command `trl-ext`."""

import sys


USAGE = """usage: trl-ext evaluate --model MODEL [MODEL ...] --reference MODEL --dataset DATASET [--judge JUDGE] [options]

commands:
  evaluate   measure aligned models against their reference: one JSON and one HTML report

`trl-ext evaluate --help` lists the options. To train from a clone of the project, launch a recipe, for example
accelerate launch recipes/tdpo.py --help"""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["evaluate"]:
        from .evaluation.command import main as evaluate

        return evaluate(arguments[1:])
    if arguments in ([], ["-h"], ["--help"]):
        print(USAGE)
        return 0
    if arguments == ["--version"]:
        from ._version import __version__

        print(__version__)
        return 0
    print(f"trl-ext: unknown command {arguments[0]!r}\n\n{USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
