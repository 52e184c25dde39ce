"""The command `trl-ext`."""

import difflib
import sys

from .launch.commands import COMMANDS


def usage() -> str:
    """Text of `trl-ext --help`: every command in one line."""
    lines = ["usage: trl-ext COMMAND [options]"]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {c.name:<17}{c.summary}" for c in COMMANDS.values() if c.group == group]
    lines += [
        "",
        "`trl-ext COMMAND --help` shows the options of a command. For example:",
        "",
        "  trl-ext data my_pairs.jsonl",
        "  trl-ext fdpo --config lora --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my_pairs.jsonl "
        "--dry_run",
        "  trl-ext fdpo --config lora --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my_pairs.jsonl",
        "  trl-ext evaluate --model outputs/fdpo-lora --reference Qwen/Qwen2.5-0.5B-Instruct --dataset my_test_pairs.jsonl",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from ._version import __version__

        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name.replace("-", "_"), COMMANDS, n=1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        print(f"trl-ext: unknown command {name!r}.{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    return COMMANDS[name].run(rest)


if __name__ == "__main__":
    sys.exit(main())
