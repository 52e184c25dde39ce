"""What the benchmarks here measure with: a model of a real shape, a trainer's step, its time, memory and intervals."""

import contextlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable


SHAPES = {  # hidden, intermediate, layers, heads, kv heads, vocabulary, tied head
    "tiny": (64, 128, 2, 4, 2, 1024, True),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
    "llama-1b": (2048, 8192, 16, 32, 8, 128256, True),
    "llama-8b": (4096, 14336, 32, 32, 8, 128256, False),
}


def quiet() -> None:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


# ---- Models, trainers, steps ----------------------------------------------------------------------------------------


def make_model(shape: str, folder: str) -> str:
    """Saves a model of random weights with the shape asked for, and a word tokenizer beside it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
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


def make_trainer(trainer_class, config_class, method_options: dict, options, model: str, output_dir: str, rows):
    """A trainer that is ready to take a step, and its wrapped model."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    cuda = torch.cuda.is_available()
    model_init_kwargs = {"dtype": "bfloat16" if cuda or options.mode == "qlora" else "float32"}
    if options.attention is not None:
        model_init_kwargs["attn_implementation"] = options.attention
    args = config_class(
        output_dir=output_dir,
        per_device_train_batch_size=len(rows),
        max_length=None,
        max_steps=1,
        gradient_checkpointing=not options.no_gradient_checkpointing,
        bf16=cuda,
        use_cpu=not cuda,
        model_init_kwargs=model_init_kwargs,
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
    if args.gradient_checkpointing:  # as `Trainer.train` does, which is not called
        trainer.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    trainer.create_optimizer()
    wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = wrapped
    wrapped.train()
    trainer.current_gradient_accumulation_steps = 1  # set by the training loop, which this is not
    return trainer, wrapped


def take_step(trainer, wrapped, batches: list[dict]) -> None:
    """One optimizer step, which accumulates the gradients of its micro-batches."""
    import torch

    for batch in batches:
        trainer.training_step(wrapped, dict(batch))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    for metrics in (*trainer._metrics.values(), *(w._steps for w in getattr(trainer, "_window", {}).values())):
        metrics.clear()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- Time -----------------------------------------------------------------------------------------------------------


def take_turns(names: list[str], options, step: Callable[[str, int], None]) -> tuple[dict, dict]:
    """
    Runs `step(name, round)` for all names in turn, so that whatever else the machine does falls on all of them alike.
    With `--clock cpu`, seconds are those that this process computes, not those that it waits for a core.

    Returns:
        `tuple[dict, dict]`: Seconds of each round by name, without those of the warm-up; and on CUDA each name's
        peak of the allocator above what was allocated before a step, in bytes.
    """
    import torch

    cuda = torch.cuda.is_available()
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0)
    for index in range(options.warmup + options.rounds):
        # The order changes from round to round, so that no method always follows the same one.
        for offset in range(len(names)):
            name = names[(index + offset) % len(names)]
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = clock()
            step(name, index)
            if index >= options.warmup:
                times[name].append(clock() - start)
            if cuda:
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() - before)
    return times, peaks


def interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    generator = random.Random(seed)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


# ---- Memory ---------------------------------------------------------------------------------------------------------


def reset_peak_memory() -> None:
    """Forgets the peak of loading the model, where the kernel allows it (Linux); elsewhere the peak includes it."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_memory() -> int:
    """Peak resident size in bytes since `reset_peak_memory`."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def kept_for_backward(trainer, wrapped, batch: dict) -> int:
    """Bytes of activations that a loss holds for its backward: tensors that autograd has saved, weights left out."""
    import torch

    own = {p.untyped_storage().data_ptr() for p in (*wrapped.parameters(), *wrapped.buffers())}
    kept: dict[int, int] = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = trainer.compute_loss(wrapped, trainer._prepare_inputs(dict(batch)))
    del loss
    return sum(kept.values())


def measure_in_own_process(what: str, model: str) -> dict:
    """Runs this command again with `--memory_of`, in a process that holds nothing else, and returns what it prints."""
    command = [sys.executable, *sys.argv, "--memory_of", what]
    result = subprocess.run(command, env={**os.environ, "STEP_COST_MODEL": model}, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])
