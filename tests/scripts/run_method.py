"""
Trains a method of the suite from the command line and saves weights and logs; started by `accelerate launch` or killed
half way by the tests.

    run_method.py <method id> <model folder> <output folder> [JSON of configuration options]

Options that are not the configuration's: `resume` (checkpoint folder or true), `stop_at` (step), `sleep` (seconds
before every step), `evaluate` (bool), `lora` (bool).
"""

import json
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest  # noqa: E402, F401 - sets the environment
import harness  # noqa: E402
import tiny  # noqa: E402
from methods import BY_ID  # noqa: E402
from peft import LoraConfig  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import TrainerCallback  # noqa: E402


class Sleep(TrainerCallback):
    def __init__(self, seconds):
        self.seconds = seconds

    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


def count_communications(trainer) -> list[int]:
    """Collectives of the accelerator in each call of `compute_loss` in training."""
    counts = []
    for name in ("gather", "gather_for_metrics", "reduce"):
        original = getattr(trainer.accelerator, name)

        def counted(*args, _original=original, **kwargs):
            counts[-1:] = [counts[-1] + 1] if counts else []
            return _original(*args, **kwargs)

        setattr(trainer.accelerator, name, counted)
    compute_loss = trainer.compute_loss

    def step(*args, **kwargs):
        counts.append(0)
        loss = compute_loss(*args, **kwargs)
        done.append(counts[-1])
        return loss

    done = []
    trainer.compute_loss = step
    return done


def main(method: str, model: str, folder: str, options: str = "{}"):
    options = json.loads(options)
    resume, stop_at = options.pop("resume", None), options.pop("stop_at", None)
    sleep, evaluate = options.pop("sleep", 0), options.pop("evaluate", False)
    peft_config = LoraConfig(r=4, lora_dropout=0.2) if options.pop("lora", False) else None
    folder = Path(folder)
    callbacks = [Sleep(sleep)] if sleep else []
    callbacks += [harness.StopAt(stop_at)] if stop_at else []
    eval_dataset = tiny.dataset(16, seed=1) if evaluate else None
    trainer = harness.trainer(
        BY_ID[method],
        model,
        folder,
        train_dataset=tiny.dataset(30),
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        peft_config=peft_config,
        **options,
    )
    if evaluate:  # before training, which must not change it
        trainer.evaluate()
    communications = count_communications(trainer)
    trainer.train(resume_from_checkpoint=resume)
    trained = list(communications)
    if evaluate:
        trainer.evaluate()
    if trainer.is_world_process_zero():
        save_file(harness.weights(trainer.accelerator.unwrap_model(trainer.model)), folder / "weights.safetensors")
        processes = trainer.accelerator.num_processes
        result = {"logs": harness.logs(trainer), "communications": trained, "processes": processes}
        result["distributed"] = trainer.accelerator.distributed_type.value
        (folder / "result.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
