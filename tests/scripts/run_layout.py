"""
Trains f-DPO in several processes, one of which cannot pack its rows, and writes what each did.

    run_layout.py <model folder> <output folder> <what the second process has: nothing, batch, model, single>
                  [True, False or None] [fsdp2, zero2 or zero3]

The fourth argument is `share_prompts`, the fifth an engine of `tests/engines.py`. `batch` is a further argument of the
model in its batches; `model` a layer that mixes tokens without a mask; `single` pairs of one length that share nothing.
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest  # noqa: E402, F401 - sets the environment
import engines  # noqa: E402
import harness  # noqa: E402
import torch  # noqa: E402
from methods import BY_ID  # noqa: E402

from trl_ext.preference import layout  # noqa: E402


def give(trainer, what: str) -> None:
    """Gives this process what keeps its rows from being packed."""
    collate = trainer.data_collator

    def with_positions(examples):
        batch = collate(examples)
        positions = torch.arange(batch["input_ids"].size(1)).expand_as(batch["input_ids"])
        return {**batch, "position_ids": positions}

    def of_one_length(examples):
        return collate([{"prompt_ids": [9 + i], "chosen_ids": [5, 6], "rejected_ids": [7, 8]} for i in range(2)])

    if what == "batch":
        trainer.data_collator = with_positions
    if what == "single":
        trainer.data_collator = of_one_length
    if what == "model":
        for model in (trainer.model, trainer.ref_model):
            mlp = trainer.accelerator.unwrap_model(model).model.layers[0].mlp
            mlp.register_forward_hook(lambda module, inputs, output: output + 0.1 * output.roll(1, dims=1))


def main(model: str, folder: str, what: str, share: str = "None", engine: str = "none") -> None:
    engines.start(engine)
    packed, messages, score = [], [], layout.score_tokens

    def counted(model, inputs, request=None, output_router_logits=False, rows=None):
        packed.append(rows is not None)
        return score(model, inputs, request, output_router_logits, rows=rows)

    layout.score_tokens = counted
    layout.logger.warning = lambda message, *args, **kwargs: messages.append(message)
    options = dict(per_device_train_batch_size=2, max_steps=2, share_prompts={"True": True, "False": False}.get(share))
    options |= engines.arguments_of(engine, ["Qwen2DecoderLayer"])
    trainer = harness.trainer(BY_ID["fdpo"], model, folder, **options)
    rank = trainer.accelerator.process_index
    if rank == 1:
        give(trainer, what)
    error = None
    try:
        trainer.train()
    except ValueError as raised:
        error = str(raised)
    sharded = [all(map(engines.is_sharded, model.parameters())) for model in (trainer.model, trainer.ref_model)]
    done = {"sharded": sharded, "packed": packed, "messages": messages, "error": error, "logs": harness.logs(trainer)}
    (Path(folder) / f"layout-{rank}.json").write_text(json.dumps(done))
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
