"""
Time and peak memory of one training step of each method, beside `trl.DPOTrainer` on the same batch.

All trainers live in one process and take turns, so that whatever else the machine does falls on all of them alike; the
ratio of a method is the median over rounds of its time over DPO's in the same round, with a bootstrap interval. Peak
memory is measured apart: on CUDA as the allocator's peak above what was allocated before the step, on CPU as the peak
resident size during a step of a process that trains this one method, its models and everything else included.

The model has random weights and a real model's shape, so nothing is downloaded.

    python recipes/benchmarks/step_cost.py --shape smollm2-135m --mode lora --rounds 10

With `--mixes`, f-DPO's step on packed rows (`share_prompts`, the default) beside the same step on padded rows and
beside `trl.DPOTrainer`, for mixes of prompt and response lengths: time, peak memory, and what a loss keeps for its
backward. Numbers stand for `PROMPT:RESPONSE`; `hh-N` are N pairs a micro-batch of human preference data
(`--pairs_file`, else the pairs that the recipes ship); `hh-NxA` are A such micro-batches an optimizer step, and
`hh-NxA-grouped` the same with pairs of like length together within the step.

    python recipes/benchmarks/step_cost.py --mixes 384:64 hh-1 hh-8 --model FOLDER --rounds 8
    python recipes/benchmarks/step_cost.py --mixes 384:64 hh-4 --reference cached
"""

import argparse
import json
import os
import statistics
import tempfile

from layout_cost import compare_layouts, measure_memory
from measuring import (
    SHAPES,
    device_name,
    interval,
    make_model,
    make_trainer,
    measure_in_own_process,
    peak_memory,
    quiet,
    reset_peak_memory,
    take_step,
    take_turns,
)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--mode", choices=["full", "lora", "qlora"], default="lora")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--prompt_length", type=int, default=128)
    parser.add_argument("--response_length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--no_gradient_checkpointing", action="store_true")
    parser.add_argument(
        "--attention",
        choices=["eager", "sdpa", "flash_attention_2", "flash_attention_3"],
        help="attention implementation; by default the one that Transformers chooses",
    )
    parser.add_argument("--methods", nargs="+", default=None, help="names printed by a run without this option")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--mixes", nargs="+", metavar="MIX", help="compare layouts: 384:64, hh-1, hh-8x4-grouped, ...")
    parser.add_argument(
        "--reference",
        choices=["live", "cached", "none"],
        default="live",
        help="for `--mixes`: f-DPO with its reference live or cached, or SimPER, which has none",
    )
    parser.add_argument("--model", help="folder of a real model for `--mixes`, in place of random weights")
    parser.add_argument(
        "--pairs_file", help="JSON lines with `chosen` and `rejected`, whole dialogues; may be gzipped"
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: seconds that the process computes, which other processes disturb little; with `--threads 1`",
    )
    parser.add_argument("--no_memory", action="store_true", help="measure time alone")
    parser.add_argument("--no_time", action="store_true", help="with `--mixes`: measure memory alone")
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # used by the run itself, for the CPU's memory
    return parser.parse_args()


def methods() -> dict:
    """Name -> trainer class, config class, options. The first is what the others are compared with."""
    from trl import DPOConfig, DPOTrainer

    from trl_ext import (
        FDPOConfig,
        FDPOTrainer,
        MallowsDPOConfig,
        MallowsDPOTrainer,
        RainbowPOConfig,
        RainbowPOTrainer,
        SimPERConfig,
        SimPERTrainer,
        TDPOConfig,
        TDPOTrainer,
    )

    cached = {"precompute_ref_log_probs": True}
    kappa = {"kappa": 0.29}  # a number: the estimate is made once a run, before the first step

    return {
        "trl.DPOTrainer": (DPOTrainer, DPOConfig, {}),
        "f-DPO (reverse KL)": (FDPOTrainer, FDPOConfig, {}),
        "f-DPO (JS)": (FDPOTrainer, FDPOConfig, {"divergence": "js"}),
        "Mallows-DPO": (MallowsDPOTrainer, MallowsDPOConfig, kappa),
        "Mallows-DPO (cached reference)": (MallowsDPOTrainer, MallowsDPOConfig, {**kappa, **cached}),
        "RainbowPO": (RainbowPOTrainer, RainbowPOConfig, kappa),
        "RainbowPO (cached reference)": (RainbowPOTrainer, RainbowPOConfig, {**kappa, **cached}),
        "SimPER": (SimPERTrainer, SimPERConfig, {}),
        "TDPO2": (TDPOTrainer, TDPOConfig, {}),
    }


def random_rows(options) -> list[dict]:
    import torch

    generator = torch.Generator().manual_seed(0)

    def words(count):
        return " ".join(f"w{i}" for i in torch.randint(2, 1000, (count,), generator=generator).tolist())

    return [
        {
            "prompt": words(options.prompt_length),
            "chosen": f" {words(options.response_length - 1)} <eos>",
            # Responses differ in length in real data; here by a quarter.
            "rejected": f" {words(options.response_length * 3 // 4 - 1)} <eos>",
        }
        for _ in range(options.pairs)
    ]


def make_step(name: str, options, model: str, output_dir: str):
    trainer, wrapped = make_trainer(*methods()[name], options, model, output_dir, random_rows(options))
    batch = next(iter(trainer.get_train_dataloader()))
    return lambda: take_step(trainer, wrapped, [batch])


def measure_memory_of(options) -> None:
    with tempfile.TemporaryDirectory() as output_dir:
        step = make_step(options.memory_of, options, os.environ["STEP_COST_MODEL"], output_dir)
        step()
        reset_peak_memory()
        step()
        print(json.dumps({"peak": peak_memory()}))


def main() -> None:
    options = parse_args()
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    quiet()
    if options.memory_of:
        return measure_memory(options.memory_of, options) if options.mixes else measure_memory_of(options)
    if options.mixes:
        return compare_layouts(options)

    names = list(methods())
    if options.methods:
        names = [names[0], *(name for name in names[1:] if name in options.methods)]
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(options.shape, folder)
        steps, held = {}, {}
        with tempfile.TemporaryDirectory() as output_dir:
            for name in names:
                before = torch.cuda.memory_allocated() if cuda else 0
                steps[name] = make_step(name, options, model, output_dir)
                held[name] = torch.cuda.memory_allocated() - before if cuda else 0
        times, peaks = take_turns(names, options, lambda name, index: steps[name]())
        steps.clear()
        if not cuda and not options.no_memory:
            peaks = {name: measure_in_own_process(name, model)["peak"] for name in names}

    baseline = names[0]
    checkpointing = "off" if options.no_gradient_checkpointing else "on"
    print(
        f"{options.shape}, {options.mode}, {options.pairs} pairs of {options.prompt_length} + "
        f"{options.response_length} tokens, gradient checkpointing {checkpointing}, {device_name()}, torch "
        f"{torch.__version__}"
    )
    columns = [f"step, median of {options.rounds}", "ratio to DPO (95% interval)"]
    columns += [] if options.no_memory else ["step's peak GPU memory" if cuda else "peak resident memory", "ratio"]
    print(f"| method | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    results = {}
    for name in names:
        ratios = [t / b for t, b in zip(times[name], times[baseline], strict=True)]
        low, high = interval(ratios)
        found = results[name] = {
            "seconds": statistics.median(times[name]),
            "ratio": statistics.median(ratios),
            "interval": [low, high],
        }
        cells = [f"{found['seconds']:.3f} s", f"{found['ratio']:.3f} ({low:.3f} to {high:.3f})"]
        if not options.no_memory:
            found |= {"peak_bytes": peaks[name], "memory_ratio": peaks[name] / peaks[baseline]}
            cells += [f"{peaks[name] / 2**30:.2f} GiB", f"{found['memory_ratio']:.2f}"]
            if cuda:
                found["held_bytes"] = held[name]  # the trainer's model, which the step's peak comes on top of
        print(f"| {name} | {' | '.join(cells)} |")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"options": vars(options), "device": device_name(), "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
