"""
Processes that are given different datasets, and one that waits for another that does not come; run in two processes.

    unequal_processes.py <model folder> <output folder>
"""

import os
import sys
import time
from pathlib import Path


sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "diffusion")]

import conftest  # noqa: E402, F401 - sets the environment
import diffusion_harness  # noqa: E402
import harness  # noqa: E402
import tiny  # noqa: E402
import tiny_pipelines  # noqa: E402
from methods import BY_ID  # noqa: E402
from transformers import TrainerCallback  # noqa: E402


RANK = int(os.environ["RANK"])
TIMEOUT = 3


def say(line: str) -> None:
    """Line and newline in one write: both processes print to one pipe."""
    print(line + "\n", end="", flush=True)


def attempt(name: str, run) -> None:
    try:
        run()
        say(f"{name}|{RANK}|passed")
    except ValueError as error:
        say(f"{name}|{RANK}|{error}")


def rows(short: bool, count: int = 8):
    return tiny.dataset(count - 2 if short and RANK == 1 else count)


def text(folder, *, method="fdpo", train=False, evaluation=None, **options):
    model = sys.argv[1]
    return harness.trainer(
        BY_ID[method], model, folder, train_dataset=rows(train), eval_dataset=evaluation, max_steps=1, **options
    )


class Hang(TrainerCallback):
    """The second process does not come to the second step until the first has given up, or far too much later."""

    def __init__(self, given_up: Path):
        self.given_up = given_up

    def on_step_begin(self, args, state, control, **kwargs):
        deadline = time.monotonic() + 20 * TIMEOUT
        while RANK == 1 and state.global_step == 1 and not self.given_up.exists() and time.monotonic() < deadline:
            time.sleep(0.1)


def main(model: str, output: str):
    folder, pipeline = Path(output), tiny_pipelines.pipeline("sd")
    attempt("train", lambda: text(folder, train=True))
    attempt("eval", lambda: text(folder, evaluation={"dev": rows(True), "test": rows(False)}))
    attempt("names", lambda: text(folder, evaluation={"dev": rows(False)} if RANK == 0 else None))
    attempt("d2po", lambda: text(folder, method="d2po", train=True, num_completions=2, per_device_train_batch_size=1))
    images = dict(train_dataset=diffusion_harness.dataset(6 - 2 * RANK))
    attempt("images", lambda: diffusion_harness.trainer(pipeline, folder, **images))
    cached = dict(precompute_ref_log_probs=True, reference_cache_dir=str(folder / "cache"))
    trainer = text(folder, **cached)
    attempt("evaluate", lambda: trainer.evaluate(rows(True)))
    attempt("predict", lambda: trainer.predict(rows(True)))
    # After the constructor, when rows of their own have been left out.
    trainer.train_dataset = trainer.train_dataset.select(range(8 - RANK))
    attempt("later", trainer.train)
    attempt("equal", lambda: text(folder, evaluation=rows(False), eval_strategy="epoch").train())

    given_up = folder / "given-up"
    callbacks = [Hang(given_up)]
    trainer = harness.trainer(BY_ID["fdpo"], model, folder, max_steps=3, ddp_timeout=TIMEOUT, callbacks=callbacks)
    began = time.monotonic()
    try:
        trainer.train()
    except RuntimeError as error:
        print(f"hang|{RANK}|{time.monotonic() - began:.1f}|{error}".replace("\n", " "), flush=True)
    given_up.touch()
    os._exit(0)  # without the other process there is no group to leave


if __name__ == "__main__":
    main(*sys.argv[1:])
