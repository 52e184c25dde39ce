"""
Trains a tiny Stable Diffusion from the command line and saves weights and logs; started by `accelerate launch` in the
tests.

    run_diffusion.py <output folder> [JSON of configuration options] [JSON of the images' heights and widths]

`"pairs"` among the options is the number of training pairs, `"order"` lists the pairs of every step.
"""

import faulthandler
import json
import sys
from pathlib import Path


TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "diffusion")]

import conftest  # noqa: E402, F401 - sets the environment
import diffusion_harness as harness  # noqa: E402
import torch  # noqa: E402
from accelerate.utils import gather_object  # noqa: E402


def main(folder: str, options: str = "{}", sizes: str = "[[16, 16]]") -> None:
    given = json.loads(options)
    pairs, order = given.pop("pairs", 8), given.pop("order", None)
    data = [harness.dataset(count, start, json.loads(sizes)) for count, start in ((pairs, 0), (5, 20))]
    trainer = harness.trainer("sd", folder, train_dataset=data[0], eval_dataset=data[1], **given)
    if order is not None:
        trainer._get_train_sampler = lambda dataset=None: [pair for step in order for pair in step]
    trained, step = [], trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: (
        trained.append(inputs["index"].tolist()),
        step(model, inputs, *rest),
    )[1]
    reductions, original = [], trainer.accelerator.reduce
    trainer.accelerator.reduce = lambda *args, **kwargs: (reductions.append(1), original(*args, **kwargs))[1]
    trainer.train()
    communications = [len(reductions) // trainer.state.global_step] * trainer.state.global_step
    trainer.evaluate()
    trainer.save_model()
    total = sum(p.double().sum() for p in harness.trained(trainer).values()).reshape(1)
    totals = trainer.accelerator.gather(total)
    shares = gather_object([trained])
    if trainer.is_world_process_zero():
        skip = ("runtime", "per_second", "total_flos", "grad_norm")
        logs = [{k: v for k, v in e.items() if not any(s in k for s in skip)} for e in trainer.state.log_history]
        result = {
            "logs": logs,
            "processes": trainer.accelerator.num_processes,
            "communications": communications,
            "pairs": [sum(parts, []) for parts in zip(*shares, strict=True)],
            "equal_on_all": bool(torch.all(totals == totals[0])),
        }
        (Path(folder) / "result.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(200, exit=True)  # a process that waits for the other says where
    main(*sys.argv[1:])
