"""
Trains one run after another under an engine, in every process that it is started in, and saves weights and logs.

    run_engine.py <JSON of the plan>

The plan has `engine` (`none`, `fsdp2`, `zero2`, `zero3`, or `launched` for what `accelerate launch` asks for) and `runs`: objects with `kind` (`paired`, `sampling`,
`online`, `images`, `rewards`), `method`, `model` and `folder`, and optionally

- `lora` (bool): an adapter; `reference` (folder): a separate reference; `storage` (dtype): of weights in
  4 bit;
- `stop_at` (step), `resume` (folder of a checkpoint), `evaluate`, `save` (bool);
- `leaves_at` (step): the second process is gone after it, and the first says how long it waited;
- `ends` (a list of ids for each process): tokens that end a completion, for `sampling`;
- `unsynchronized` (bool): each process generates for itself;
- `fixed` (bool, default true): completions that do not depend on the process, for `sampling`;
- `options`: of the configuration.
"""

import json
import os
import sys
import time
from pathlib import Path


TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "diffusion"), str(TESTS / "d2po")]

import conftest  # noqa: E402, F401 - sets the environment
import engines  # noqa: E402
import harness  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import BitsAndBytesConfig, TrainerCallback  # noqa: E402

from trl_ext._patches import generation_apart  # noqa: E402


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def paired(run: dict, **given):
    from methods import BY_ID

    if run.get("reference"):
        given["ref_model"] = harness.load(run["reference"])
    if run.get("storage"):
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_storage=getattr(torch, run["storage"]),
        )
    return harness.trainer(
        BY_ID[run["method"]],
        run["model"],
        run["folder"],
        train_dataset=tiny.dataset(run.get("rows", 16)),
        eval_dataset=tiny.dataset(5, seed=1),
        peft_config=lora() if run.get("lora") else None,
        **given,
    )


def sampling(run: dict, **given):
    import sampling

    trainer = sampling.trainer(
        sampling.BY_ID[run["method"]],
        run["model"],
        Path(run["folder"]),
        train_dataset=sampling.prompts(10),
        eval_dataset=sampling.prompts(3, seed=1),
        peft_config=lora() if run.get("lora") else None,
        **given,
    )
    if run.get("ends"):
        trainer.generation_config.eos_token_id = run["ends"][trainer.accelerator.process_index]
    if run.get("fixed", True):
        sampling.fix_samples(trainer)
    return trainer


def online(run: dict, **given):
    import online

    if run.get("resume"):  # with the labels that had been bought by then
        state = json.loads(Path(run["resume"], "d2po_state.json").read_text())
        lines = Path(run["resume"]).with_name("gold_labels.jsonl").read_text().splitlines()
        Path(run["folder"]).mkdir(exist_ok=True)
        Path(run["folder"], "gold_labels.jsonl").write_text(
            "".join(f"{line}\n" for line in lines[: len(state["gold"]["used"])])
        )
    return online.trainer(
        run["model"],
        run["folder"],
        labeller=online.CountedLabeller(),
        eval_dataset=online.prompts(5),
        peft_config="lora" if run.get("lora") else None,
        **given,
    )


def images(run: dict, **given):
    import diffusion_harness

    import trl_ext

    name = run["method"]
    return diffusion_harness.trainer(
        run["model"],
        run["folder"],
        trainer_class=getattr(trl_ext, f"{name}Trainer"),
        config_class=getattr(trl_ext, f"{name}Config"),
        peft_config="lora" if run.get("lora") else None,
        eval_dataset=diffusion_harness.dataset(5, start=20),
        **given,
    )


def rewards(run: dict, **given):
    import reward_harness

    return reward_harness.trainer(
        run["model"],
        run["folder"],
        train_dataset=reward_harness.prompts(8),
        peft_config="lora" if run.get("lora") else None,
        eval_dataset=reward_harness.prompts(3),
        **given,
    )


BUILDERS = {builder.__name__: builder for builder in (paired, sampling, online, images, rewards)}
LAYERS = dict.fromkeys(("images", "rewards"), ["BasicTransformerBlock", "ResnetBlock2D"])


class Unsynchronized(TrainerCallback):
    """Takes away what makes processes generate in step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.apart = generation_apart(model)
        self.apart.__enter__()


class Leaves(TrainerCallback):
    """Ends the second process after a step, as if it had been killed."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if args.process_index == 1:
                os._exit(0)
            self.left = time.monotonic()


def train(run: dict, engine: str):
    options = {
        **engines.arguments_of(engine, LAYERS.get(run["kind"], ["Qwen2DecoderLayer"])),
        **run.get("options", {}),
    }
    callbacks = [harness.StopAt(run["stop_at"])] if run.get("stop_at") else []
    trainer = BUILDERS[run["kind"]](run, callbacks=callbacks, **options)
    if run.get("leaves_at"):
        callback = Leaves(run["leaves_at"])
        trainer.add_callback(callback)
        try:
            trainer.train()
        except RuntimeError as error:
            waited = time.monotonic() - callback.left
            print(f"left alone for {waited:.1f} s: {type(error).__name__}", flush=True)
            os._exit(0)
        raise AssertionError("trained on alone")
    if run.get("unsynchronized"):
        trainer.add_callback(Unsynchronized())
    trainer.train(resume_from_checkpoint=run.get("resume"))
    # Evaluation leaves some parameters whole until the next backward.
    sharded = sum(map(engines.is_sharded, trainer.model.parameters()))
    if run.get("evaluate"):
        trainer.evaluate()
    if run.get("save"):
        trainer.save_model(str(Path(run["folder"], "final")))
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = engines.weights(model)
    reference = getattr(trainer, "ref_model", None)
    result = {
        "logs": [{k: v for k, v in entry.items() if k != "step_time"} for entry in harness.logs(trainer)],
        "processes": trainer.accelerator.num_processes,
        "engine": trainer.accelerator.distributed_type.value,
        "parameters": len(weights),
        "sharded": sharded,
        "sharded_reference": None if reference is None else all(map(engines.is_sharded, reference.parameters())),
    }
    if trainer.is_world_process_zero():
        folder = Path(run["folder"])
        save_file(weights, folder / "weights.safetensors")
        (folder / "result.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    return trainer


def main(plan: str) -> None:
    plan = json.loads(plan)
    engines.start(plan["engine"])
    for run in plan["runs"]:
        trainer = train(run, plan["engine"])
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1])
