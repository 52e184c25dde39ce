"""
Trains and evaluates D2PO on sets that do not divide; started with one process or several.

    run_uneven.py <model folder> <output folder> [JSON of options]
"""

import json
import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import conftest  # noqa: E402, F401 - sets the environment
import harness  # noqa: E402
import online  # noqa: E402


def main(model: str, folder: str, options: str = "{}") -> None:
    trainer = online.trainer(
        model,
        folder,
        labeller=online.CountedLabeller(),
        train_dataset=online.prompts(10),
        eval_dataset={"prompts": online.prompts(5), "pairs": harness.tiny.dataset(5)},
        **json.loads(options),
    )
    trainer.train()
    metrics = trainer.evaluate()
    rank = trainer.accelerator.process_index
    windows = [[entry["window"], entry["prompt"]] for entry in trainer.gold.entries]
    result = {
        "metrics": {name: value for name, value in metrics.items() if isinstance(value, float)},
        "logs": harness.logs(trainer),
        "asked": windows,
        "processes": trainer.accelerator.num_processes,
    }
    Path(folder, f"result-{rank}.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
