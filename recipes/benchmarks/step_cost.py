"""
Time and peak memory of one training step of each method, beside `trl.DPOTrainer` on the same batch.

All trainers live in one process and take turns, so that whatever else the machine does falls on all of them alike; the
ratio of a method is the median over rounds of its time over DPO's in the same round, with a bootstrap interval. Peak
memory is measured apart: on CUDA as the allocator's peak above what was allocated before the step, on CPU as the peak
resident size during a step of a process that trains this one method, its models and everything else included.

The model has random weights and a real model's shape, so nothing is downloaded.

    python recipes/benchmarks/step_cost.py --shape smollm2-135m --mode lora --rounds 10

With `--mixes`, f-DPO's step on packed rows (`share_prompts`, the default) beside the same step on padded rows and
beside `trl.DPOTrainer`, for mixes of prompt and response lengths. Numbers stand for `PROMPT:RESPONSE`; `hh-N` are N pairs a
micro-batch of human preference data (`--pairs_file`, else the pairs that the recipes ship).

    python recipes/benchmarks/step_cost.py --mixes 384:64 hh-1 hh-8 --model FOLDER --rounds 8
"""

import argparse
import contextlib
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


SHAPES = {  # hidden, intermediate, layers, heads, kv heads, vocabulary, tied head
    "tiny": (64, 128, 2, 4, 2, 1024, True),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
    "llama-1b": (2048, 8192, 16, 32, 8, 128256, True),
    "llama-8b": (4096, 14336, 32, 32, 8, 128256, False),
}


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
    parser.add_argument("--methods", nargs="+", default=None, help="names printed by a run without this option")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--mixes", nargs="+", metavar="MIX", help="compare layouts: 384:64, hh-1, ...")
    parser.add_argument("--model", help="folder of a real model for `--mixes`, in place of random weights")
    parser.add_argument(
        "--pairs_file", help="JSON lines with `chosen` and `rejected`, whole dialogues; may be gzipped"
    )
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


def make_model(options, folder: str) -> str:
    """Saves a model of random weights with the shape asked for, and a word tokenizer beside it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[options.shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=1,
    )
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 1000)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return folder


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


def make_trainer(trainer_class, config_class, method_options: dict, options, model: str, output_dir: str, rows):
    """A trainer that is ready to take a step, and its wrapped model."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    cuda = torch.cuda.is_available()
    args = config_class(
        output_dir=output_dir,
        per_device_train_batch_size=len(rows),
        max_length=None,
        max_steps=1,
        gradient_checkpointing=not options.no_gradient_checkpointing,
        bf16=cuda,
        use_cpu=not cuda,
        model_init_kwargs={"dtype": "bfloat16" if cuda or options.mode == "qlora" else "float32"},
        report_to=[],
        save_strategy="no",
        **method_options,
    )
    quantization = None
    if options.mode == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    peft_config = None
    if options.mode != "full":
        peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        quantization_config=quantization,
        peft_config=peft_config,
    )
    trainer.create_optimizer()
    wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = wrapped
    wrapped.train()
    trainer.current_gradient_accumulation_steps = 1  # set by the training loop, which this is not
    return trainer, wrapped


def take_step(trainer, wrapped, batch: dict) -> None:
    import torch

    trainer.training_step(wrapped, dict(batch))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    for metrics in (*trainer._metrics.values(), *(w._steps for w in getattr(trainer, "_window", {}).values())):
        metrics.clear()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_step(name: str, options, model: str, output_dir: str):
    trainer, wrapped = make_trainer(*methods()[name], options, model, output_dir, random_rows(options))
    batch = next(iter(trainer.get_train_dataloader()))
    return lambda: take_step(trainer, wrapped, batch)


def quiet() -> None:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def reset_peak_memory() -> None:
    """Forgets the peak of loading the model, where the kernel allows it (Linux); elsewhere the peak includes it."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_memory() -> int:
    """Peak resident size in bytes since `reset_peak_memory`."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_memory_of(name: str, options) -> None:
    with tempfile.TemporaryDirectory() as output_dir:
        step = make_step(name, options, os.environ["STEP_COST_MODEL"], output_dir)
        step()
        reset_peak_memory()
        step()
        print(json.dumps({"peak": peak_memory()}))


# ---- Layouts --------------------------------------------------------------------------------------------------------

BASELINE, PADDED, PACKED = "trl.DPOTrainer", "padded rows", "packed rows"


def layouts() -> dict:
    from trl import DPOConfig, DPOTrainer

    from trl_ext import FDPOConfig, FDPOTrainer

    return {
        BASELINE: (DPOTrainer, DPOConfig, {}),
        PADDED: (FDPOTrainer, FDPOConfig, {"share_prompts": False}),
        PACKED: (FDPOTrainer, FDPOConfig, {"share_prompts": True}),
        f"{PACKED}, by segments": (FDPOTrainer, FDPOConfig, {"share_prompts": True, "attention_by_segments": True}),
    }


def pairs_of_file(options, tokenizer) -> list[dict]:
    """Tokenized pairs, in the file's order, of at most 512 tokens."""
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
        if len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) <= 512:
            pairs.append(pair)
    return pairs


def batches_of_mix(mix: str, options, tokenizer) -> list[dict]:
    """One batch a round."""
    import torch

    from trl_ext._trl import DataCollatorForPreference

    count = options.warmup + options.rounds
    if mix.startswith("hh-"):
        size, pairs = int(mix.removeprefix("hh-")), pairs_of_file(options, tokenizer)
        chunks = [[pairs[(i * size + j) % len(pairs)] for j in range(size)] for i in range(count)]
    else:
        prompt, response = map(int, mix.split(":"))
        generator = torch.Generator().manual_seed(0)

        def ids(length):
            return torch.randint(10, 1000, (length,), generator=generator).tolist()

        lengths = {"prompt_ids": prompt, "chosen_ids": response, "rejected_ids": response}
        chunks = [[{name: ids(length) for name, length in lengths.items()}] for _ in range(count)]
    collate = DataCollatorForPreference(pad_token_id=0)
    return [collate(chunk) for chunk in chunks]


def tokens_of(batch: dict) -> tuple[int, int]:
    """Tokens of the padded batch, and of the packed row."""
    from trl_ext.training.shared_prompt import pack

    rows = pack(batch)
    return batch["input_ids"].numel(), batch["input_ids"].numel() if rows is None else rows.input_ids.size(1)


def compare_layouts(options) -> None:
    import torch
    from transformers import AutoTokenizer

    cuda, results = torch.cuda.is_available(), {}
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    names = [name for name in layouts() if not options.methods or name in (BASELINE, PADDED, *options.methods)]
    dummy = [{"prompt": "w1 w2", "chosen": " w3", "rejected": " w4"}]
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_model(options, folder)
        tokenizer = AutoTokenizer.from_pretrained(model)
        trainers = {name: make_trainer(*layouts()[name], options, model, folder, dummy) for name in names}
        print(f"{model if options.model is None else Path(model).name}, {options.mode}, {device}, torch", end=" ")
        print(torch.__version__)
        print("| mix | tokens, padded / packed | layout | step | beside padded rows | beside trl.DPOTrainer |")
        print("|---|---|---|---|---|---|")
        for mix in options.mixes:
            times = {name: [] for name in names}
            batches = batches_of_mix(mix, options, tokenizer)
            counts = [tokens_of(batch) for batch in batches[options.warmup :]]
            ratio = sum(padded for padded, _ in counts) / sum(packed for _, packed in counts)
            for round_index, batch in enumerate(batches):
                for offset in range(len(names)):
                    name = names[(round_index + offset) % len(names)]
                    start = time.perf_counter()
                    take_step(*trainers[name], batch)
                    if round_index >= options.warmup:
                        times[name].append(time.perf_counter() - start)
            results[mix] = {"token_ratio": ratio, "seconds": times}
            for name in names:
                cells = []
                for other in (PADDED, BASELINE):
                    factors = [b / t for t, b in zip(times[name], times[other], strict=True)]
                    low, high = interval(factors)
                    cells.append(f"{statistics.median(factors):.2f} ({low:.2f} to {high:.2f})")
                step = f"{statistics.median(times[name]):.2f} s"
                print(f"| {mix} | {ratio:.2f} | {name} | {step} | {' | '.join(cells)} |", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), "results": results}, indent=1))


def interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    import random

    generator = random.Random(seed)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


def main() -> None:
    options = parse_args()
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    quiet()
    if options.memory_of:
        return measure_memory_of(options.memory_of, options)
    if options.mixes:
        return compare_layouts(options)

    names = list(methods())
    if options.methods:
        names = [names[0], *(name for name in names[1:] if name in options.methods)]
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(options, folder)
        with tempfile.TemporaryDirectory() as output_dir:
            steps = {name: make_step(name, options, model, output_dir) for name in names}
        times, peaks = {name: [] for name in names}, dict.fromkeys(names, 0)
        for round_index in range(options.warmup + options.rounds):
            # The order changes from round to round, so that no method always follows the same one.
            for offset in range(len(names)):
                name = names[(round_index + offset) % len(names)]
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                start = time.perf_counter()
                steps[name]()
                elapsed = time.perf_counter() - start
                if round_index >= options.warmup:
                    times[name].append(elapsed)
                if cuda:
                    peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() - before)
        del steps
        if not cuda:
            for name in names:
                command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", name]
                result = subprocess.run(
                    command, env={**os.environ, "STEP_COST_MODEL": model}, capture_output=True, text=True
                )
                if result.returncode != 0:
                    sys.exit(result.stderr)
                peaks[name] = json.loads(result.stdout.splitlines()[-1])["peak"]

    baseline = names[0]
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    checkpointing = "off" if options.no_gradient_checkpointing else "on"
    print(
        f"{options.shape}, {options.mode}, {options.pairs} pairs of {options.prompt_length} + "
        f"{options.response_length} tokens, gradient checkpointing {checkpointing}, {device}, torch "
        f"{torch.__version__}"
    )
    memory = "step's peak GPU memory" if cuda else "peak resident memory"
    print(f"| method | step, median of {options.rounds} | ratio to DPO (95% interval) | {memory} | ratio |")
    print("|---|---|---|---|---|")
    results = {}
    for name in names:
        ratios = [t / b for t, b in zip(times[name], times[baseline], strict=True)]
        low, high = interval(ratios)
        ratio, memory_ratio = statistics.median(ratios), peaks[name] / peaks[baseline]
        results[name] = {
            "seconds": statistics.median(times[name]),
            "ratio": ratio,
            "interval": [low, high],
            "peak_bytes": peaks[name],
            "memory_ratio": memory_ratio,
        }
        print(
            f"| {name} | {statistics.median(times[name]):.3f} s | {ratio:.3f} ({low:.3f} to {high:.3f}) | "
            f"{peaks[name] / 2**30:.2f} GiB | {memory_ratio:.2f} |"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"options": vars(options), "device": device, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
