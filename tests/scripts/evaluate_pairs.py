"""
Evaluates trained weights in several processes; started by `torch.distributed.run`.

    evaluate_pairs.py <model folder> <weights> <output folder> <batch size> <number of pairs>
"""

import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest  # noqa: E402, F401 - sets the environment
import harness  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from methods import BY_ID  # noqa: E402


def main(model: str, weights: str, folder: str, batch_size: str, count: str):
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    dataset = tiny.dataset(int(count), seed=3)
    labels = []

    def compute_metrics(given):
        labels.append(given.label_ids)
        return {"rows": len(given.label_ids)}

    trainer = harness.trainer(
        BY_ID["fdpo"],
        model,
        folder,
        eval_dataset=dataset,
        compute_metrics=compute_metrics,
        per_device_eval_batch_size=int(batch_size),
        ddp_backend="gloo",
    )
    trainer.model.load_state_dict(torch.load(weights))
    metrics = trainer.evaluate()
    predicted = len(trainer.predict(dataset).predictions)
    if trainer.is_world_process_zero():
        ignored = (*harness.MACHINE_KEYS, "preparation", "num_tokens")
        result = {
            name: v for name, v in metrics.items() if name.startswith("eval_") and not any(w in name for w in ignored)
        }
        result.update(rows=result.pop("eval_rows"), predicted=predicted)
        (folder / "result.json").write_text(json.dumps(result))
        np.save(folder / "labels.npy", labels[0])
    trainer.accelerator.wait_for_everyone()
    return trainer


if __name__ == "__main__":
    trainer = main(*sys.argv[1:])  # kept, and not torn down: see `run_method.py`
    sys.stdout.flush()
    os._exit(0)
