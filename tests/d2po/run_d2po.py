"""
Trains D2PO in every process it is launched in and saves what each has; started by `accelerate launch`.

    run_d2po.py <model folder> <output folder> [JSON of options]
"""

import json
import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import conftest  # noqa: E402, F401 - sets the environment
import harness  # noqa: E402
import online  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from trl_ext.d2po import LabellerError  # noqa: E402


def main(model: str, folder: str, options: str = "{}") -> None:
    options, folder = json.loads(options), Path(folder)
    resume, fail_at = options.pop("resume", None), options.pop("fail_at", None)
    labeller = online.CountedLabeller()
    if fail_at is not None:
        compare = labeller._compare

        def failing(a, b):
            if len(labeller.asked) >= fail_at:
                raise ConnectionError("the judge is away")
            return compare(a, b)

        labeller._compare = failing
    trainer = online.trainer(model, folder, labeller=labeller, eval_dataset=online.prompts(8), **options)
    error = None
    try:
        trainer.train(resume_from_checkpoint=resume)
        trainer.evaluate()
    except LabellerError as raised:
        error = str(raised)
    rank = trainer.accelerator.process_index
    weights = harness.weights(trainer.accelerator.unwrap_model(trainer.model))
    weights |= {f"discriminator/{name}": value for name, value in trainer.discriminator.state_dict().items()}
    save_file(weights, folder / f"weights-{rank}.safetensors")
    result = {
        "asked": len(labeller.asked),
        "used": trainer.gold.used,
        "keys": [entry["key"] for entry in trainer.gold.entries],
        "logs": harness.logs(trainer),
        "error": error,
        "processes": trainer.accelerator.num_processes,
    }
    (folder / f"result-{rank}.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
