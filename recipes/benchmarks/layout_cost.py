"""The `--mixes` of `step_cost.py`: a step on packed rows beside padded rows and `trl.DPOTrainer`, mix by mix."""

import gzip
import json
import os
import statistics
import tempfile
from pathlib import Path

from measuring import (
    device_name,
    interval,
    kept_for_backward,
    make_model,
    make_trainer,
    measure_in_own_process,
    peak_memory,
    reset_peak_memory,
    take_step,
    take_turns,
)


BASELINE, PADDED, PACKED = "trl.DPOTrainer", "padded rows", "packed rows"
SEGMENTS = f"{PACKED}, by segments"
LONGEST = 512  # tokens; longer pairs of a file are left out


def layouts(reference: str) -> dict:
    """Name -> trainer class, config class, options; with a live or cached reference, or with SimPER, which has none."""
    from trl import DPOConfig, DPOTrainer

    from trl_ext import FDPOConfig, FDPOTrainer, SimPERConfig, SimPERTrainer

    classes = (SimPERTrainer, SimPERConfig) if reference == "none" else (FDPOTrainer, FDPOConfig)
    cached = {"precompute_ref_log_probs": True} if reference == "cached" else {}
    return {
        BASELINE: (DPOTrainer, DPOConfig, cached),
        PADDED: (*classes, {**cached, "share_prompts": False}),
        PACKED: (*classes, {**cached, "share_prompts": True}),
        SEGMENTS: (*classes, {**cached, "share_prompts": True, "attention_by_segments": True}),
    }


# ---- Batches --------------------------------------------------------------------------------------------------------


def pairs_of_file(options, tokenizer) -> list[dict]:
    """Tokenized pairs, in the file's order."""
    from trl import extract_prompt

    path = Path(options.pairs_file or Path(__file__).parents[1] / "data" / "sentiment_pairs" / "train.jsonl")
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    with opened as file:
        rows = [json.loads(line) for line in file]
    pairs = []
    for row in rows:
        row = row if "prompt" in row else extract_prompt(row)
        texts = {side: row[side] for side in ("prompt", "chosen", "rejected")}
        if not all(isinstance(text, str) and text.strip() for text in texts.values()):
            continue
        pair = {f"{side}_ids": tokenizer(text)["input_ids"] for side, text in texts.items()}
        if length(pair) <= LONGEST:
            pairs.append(pair)
    return pairs


def length(pair: dict) -> int:
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def steps_of_mix(mix: str, options, tokenizer) -> list[list[dict]]:
    """The micro-batches of one optimizer step a round; see `--mixes` for the names of mixes."""
    import torch

    from trl_ext._trl import DataCollatorForPreference

    count = options.warmup + options.rounds
    is_grouped = mix.endswith("-grouped")
    mix, _, accumulated = mix.removesuffix("-grouped").partition("x")
    accumulated = int(accumulated or 1)
    if mix.startswith("hh-"):
        size, pairs = int(mix.removeprefix("hh-")), pairs_of_file(options, tokenizer)
        size *= accumulated
        steps = [[pairs[(i * size + j) % len(pairs)] for j in range(size)] for i in range(count)]
    else:
        prompt, response = map(int, mix.split(":"))
        generator = torch.Generator().manual_seed(0)

        def ids(count):
            return torch.randint(10, 1000, (count,), generator=generator).tolist()

        lengths = {"prompt_ids": prompt, "chosen_ids": response, "rejected_ids": response}
        steps = [[{name: ids(n) for name, n in lengths.items()} for _ in range(accumulated)] for _ in range(count)]
    if is_grouped:
        steps = [sorted(step, key=length) for step in steps]
    if options.reference == "cached":
        for pair in (pair for step in steps for pair in step):
            pair.update({f"ref_{side}_logps": -4.0 * len(pair[f"{side}_ids"]) for side in ("chosen", "rejected")})
    collate = DataCollatorForPreference(pad_token_id=0)
    size = len(steps[0]) // accumulated
    return [[collate(step[i : i + size]) for i in range(0, len(step), size)] for step in steps]


def token_ratio(steps: list[list[dict]]) -> float:
    """Tokens of the padded batches over those of the packed rows."""
    from trl_ext.training.shared_prompt import pack

    batches = [batch for step in steps for batch in step]
    rows = [pack(batch) for batch in batches]
    padded = [batch["input_ids"].numel() for batch in batches]
    packed = [p if row is None else row.input_ids.size(1) for p, row in zip(padded, rows, strict=True)]
    return sum(padded) / sum(packed)


# ---- Measuring ------------------------------------------------------------------------------------------------------


# What the trainers are made with, and warmed up on: it makes the optimizer's state and compares the layouts.
DUMMY = [{"prompt": "w1 w2", "chosen": " w3", "rejected": " w4 w5"}]


def trainer_of(name: str, options, model: str, folder: str):
    trainer_class, config_class, own = layouts(options.reference)[name]
    if options.reference == "cached" and name != BASELINE:
        own = {**own, "reference_cache_dir": folder}
    return make_trainer(trainer_class, config_class, own, options, model, folder, DUMMY)


def measure_memory(what: str, options) -> None:
    """
    Peak resident size of a step on the mix's longest batch and what its loss keeps for the backward, in a process that
    holds this one trainer.
    """
    from transformers import AutoTokenizer

    mix, name = what.split("/")
    model = os.environ["STEP_COST_MODEL"]
    batches = [b for step in steps_of_mix(mix, options, AutoTokenizer.from_pretrained(model)) for b in step]
    batch = max(batches, key=lambda batch: batch["input_ids"].numel())
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(name, options, model, folder)
        take_step(*trainer, [next(iter(trainer[0].get_train_dataloader()))])
        reset_peak_memory()
        take_step(*trainer, [batch])
        peak = peak_memory()
        print(json.dumps({"peak": peak, "kept": kept_for_backward(*trainer, batch)}))


def compare_layouts(options) -> None:
    import torch
    from transformers import AutoTokenizer

    every = layouts(options.reference)
    names = [name for name in every if not options.methods or name in (PADDED, *options.methods)]
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_model(options.shape, folder)
        tokenizer = AutoTokenizer.from_pretrained(model)
        name = options.shape if options.model is None else Path(model).name
        checkpointing = "off" if options.no_gradient_checkpointing else "on"
        print(
            f"{name}, {options.mode}, reference: {options.reference}, gradient checkpointing {checkpointing},", end=""
        )
        print(f" {device_name()}, torch {torch.__version__}")
        results = measure(options, names, model, tokenizer, folder)
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), "results": results}, indent=1))


def measure(options, names: list[str], model: str, tokenizer, folder: str) -> dict:
    """Prints a row for each mix and layout, and returns the numbers."""
    import torch

    is_timed = not options.no_time
    trainers = {name: trainer_of(name, options, model, folder) for name in names if is_timed}
    columns = ["mix", "tokens, padded / packed", "layout"]
    if is_timed:
        columns += ["step", *(f"beside {name}" for name in (PADDED, BASELINE) if name in names)]
    columns += [] if options.no_memory else ["peak memory of a step", "kept for the backward"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    results = {}
    for mix in options.mixes:
        steps = steps_of_mix(mix, options, tokenizer)
        found = results[mix] = {"token_ratio": token_ratio(steps[options.warmup :])}
        if is_timed:

            def step(name, index, steps=steps):
                take_step(*trainers[name], steps[index])

            found["seconds"], peaks = take_turns(names, options, step)
            if torch.cuda.is_available():
                found["peaks"] = peaks
        if not options.no_memory:
            found["memory"] = {name: measure_in_own_process(f"{mix}/{name}", model) for name in names}
            if torch.cuda.is_available() and is_timed:
                for name in names:
                    found["memory"][name]["peak"] = peaks[name]
        for name in names:
            print("|", " | ".join([mix, f"{found['token_ratio']:.2f}", name, *cells(name, found)]), "|", flush=True)
    return results


def cells(name: str, found: dict) -> list[str]:
    made = []
    if "seconds" in found:
        times = found["seconds"]
        made.append(f"{statistics.median(times[name]):.2f} s")
        for other in (name for name in (PADDED, BASELINE) if name in times):
            factors = [b / t for t, b in zip(times[name], times[other], strict=True)]
            low, high = interval(factors)
            made.append("1.00" if name == other else f"{statistics.median(factors):.2f} ({low:.2f} to {high:.2f})")
    if "memory" in found:
        own, padded = found["memory"][name], found["memory"][PADDED]
        made.append(f"{own['peak'] / 2**30:.2f} GiB")
        made.append(f"{own['kept'] / 2**20:,.0f} MiB ({own['kept'] / padded['kept']:.2f})")
    return made
