"""
Code that every recipe shares: it calls the package's launcher, with an embedded default if there are no arguments.
"""

import os
import sys

from trl_ext.launch.configurations import CONFIGURATIONS
from trl_ext.launch.train import main


def embedded_default(method: str) -> list[str]:
    """
    Arguments of a run that needs nothing besides the project: SmolLM2-135M and the data that ship with it. If the Hub
    does not answer, the arguments name the folder of the quickstart's converted copy of the model.
    """
    import torch
    from quickstart_model import quickstart_model

    arguments = ["--config", str(CONFIGURATIONS / method / "quickstart.yaml")]
    arguments += ["--model_name_or_path", quickstart_model()]
    if torch.cuda.is_available():
        return arguments + ["--load_in_4bit", "true", "--dtype", "bfloat16", "--bf16", "true"]
    return arguments + ["--use_cpu", "true", "--bf16", "false"]


def run(method: str) -> None:
    """
    Runs a recipe with the arguments of the command line, or without any the embedded default, if the method has one.
    """
    arguments = sys.argv[1:]
    if not arguments and (CONFIGURATIONS / method / "quickstart.yaml").exists():
        arguments = embedded_default(method)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            from quickstart_model import describe_source

            print(f"No arguments: training the embedded default, {' '.join(arguments)}", flush=True)
            print(f"The model is {describe_source(arguments[3])}.", flush=True)
    main(method, arguments, f"{method}.py")
