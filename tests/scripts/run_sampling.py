"""
Trains a method that samples from the command line and saves weights and logs; started in several processes, or killed
half way, by the tests.

    run_sampling.py <method id> <model folder> <output folder> [JSON of configuration options]

Options that are not the configuration's: `resume` (checkpoint folder or true), `stop_at` (step), `evaluate` (bool),
`fixed` (bool, default true: completions that do not depend on the process).
"""

import json
import sys
from pathlib import Path


TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

import conftest  # noqa: E402, F401 - sets the environment
import harness  # noqa: E402
import sampling  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def main(method: str, model: str, folder: str, options: str = "{}"):
    options = json.loads(options)
    resume, stop_at = options.pop("resume", None), options.pop("stop_at", None)
    evaluate, fixed = options.pop("evaluate", False), options.pop("fixed", True)
    method = sampling.BY_ID[method]
    trainer = sampling.trainer(
        method,
        model,
        Path(folder),
        train_dataset=sampling.prompts(10 if method in sampling.ROLLOUTS else 20),
        eval_dataset=sampling.prompts(3, seed=1) if evaluate else None,
        callbacks=[harness.StopAt(stop_at)] if stop_at else None,
        **options,
    )
    if fixed:
        sampling.fix_samples(trainer)
    trainer.train(resume_from_checkpoint=resume)
    if evaluate:
        trainer.evaluate()
    if trainer.is_world_process_zero():
        save_file(
            harness.weights(trainer.accelerator.unwrap_model(trainer.model)), Path(folder, "weights.safetensors")
        )
        result = {"logs": harness.logs(trainer), "processes": trainer.accelerator.num_processes}
        Path(folder, "result.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
