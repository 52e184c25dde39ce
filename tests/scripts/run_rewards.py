"""
Trains a tiny Stable Diffusion on rewards from the command line and saves weights and logs; started in two processes.

    run_rewards.py <output folder> [JSON of configuration options]
"""

import faulthandler
import json
import sys
from pathlib import Path


TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "diffusion")]

import conftest  # noqa: E402, F401 - sets the environment
import reward_harness as harness  # noqa: E402
import torch  # noqa: E402
from diffusion_harness import trained  # noqa: E402


def main(folder: str, options: str = "{}") -> None:
    trainer = harness.trainer("sd", folder, eval_dataset=harness.prompts(3), **json.loads(options))
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    total = sum(p.double().sum() for p in trained(trainer).values()).reshape(1)
    totals = trainer.accelerator.gather(total)
    if trainer.is_world_process_zero():
        logs = [{k: v for k, v in e.items() if k != "grad_norm"} for e in harness.comparable(trainer)]
        result = {
            "logs": logs,
            "processes": trainer.accelerator.num_processes,
            "equal_on_all": bool(torch.all(totals == totals[0])),
        }
        (Path(folder) / "result.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(200, exit=True)  # a process that waits for the other says where
    main(*sys.argv[1:])
