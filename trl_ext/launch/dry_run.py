"""`--dry_run`: describes what a run would do, before its first step."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


GIB = 2**30

# Bytes of optimizer state per trained element, beside the element's own type: (multiples of its size, fixed bytes).
_OPTIMIZER_STATE = {
    "adamw": (2, 0),
    "paged_adamw_32bit": (0, 8),
    "8bit": (0, 2),
    "adafactor": (0, 0),
    "rmsprop": (1, 0),
    "adagrad": (1, 0),
    "lion": (1, 0),
    "sgd": (0, 0),
}


def without_long_work(training_args) -> None:
    """Turns off what a constructor would compute over the whole dataset; the description mentions it."""
    training_args._dry_run_postponed = [
        name for name in ("precompute_ref_log_probs", "cache_latents") if getattr(training_args, name, False)
    ]
    for name in training_args._dry_run_postponed:
        setattr(training_args, name, False)


# ---- Data -----------------------------------------------------------------------------------------------------------


@dataclass
class Lengths:
    """Lengths of many sequences, in tokens."""

    values: np.ndarray

    def __str__(self) -> str:
        if not len(self.values):
            return "none"
        half, most = np.percentile(self.values, [50, 95])
        return f"mean {self.values.mean():.0f}, median {half:.0f}, 95% up to {most:.0f}, longest {self.values.max()}"


def token_lengths(dataset) -> dict[str, np.ndarray]:
    """Tokens of each prompt and response of a tokenized dataset."""
    names = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
    return {
        name: np.array([len(ids) for ids in dataset.with_format(None)[column]])
        for name, column in names.items()
        if column in dataset.column_names
    }


def describe_text_data(trainer, raw) -> list[str]:
    """Lines about the training data of a text trainer; `raw` is the dataset that it was given."""
    dataset, args = trainer.train_dataset, trainer.args
    if not hasattr(dataset, "column_names") or not hasattr(dataset, "__len__"):
        return ["training data      streamed, or collated as it is read: not described"]
    lengths = token_lengths(dataset)
    if not lengths:
        return [f"training data      {len(dataset):,} pairs with images, tokenized as they are read"]
    kept, total, online = len(dataset), len(raw), "chosen" not in lengths
    lines = [f"training data      {kept:,} of {total:,} {'prompts' if online else 'pairs'}"]
    lines += [
        f"  left out         {count:,}: {why}" for why, count in _left_out(args, raw, total - kept, online).items()
    ]
    lines += [f"  {name:<16} {Lengths(values)} tokens" for name, values in lengths.items()]
    if not online and args.max_length is not None:
        longest = lengths["prompt"] + np.maximum(lengths["chosen"], lengths["rejected"])
        cut = int((longest > args.max_length).sum())
        lines.append(f"  cut              {cut:,} pairs ({cut / max(1, kept):.1%}), to `max_length={args.max_length}`")
    return lines


def _left_out(args, raw, count: int, online: bool) -> dict[str, int]:
    """Reason -> the number of rows that the trainer left out for it."""
    from ..preference.rows import SIDES, is_empty, with_prompt

    if not count:
        return {}
    if online:
        limit = f"`max_completion_length={args.max_completion_length}` tokens in `max_length={args.max_length}`"
        return {f"the prompt leaves no room for {limit}": count}
    empty = 0
    if args.drop_empty_completions and set(SIDES) <= set(raw.column_names):
        columns = [name for name in ("prompt", *SIDES) if name in raw.column_names]
        rows = map(with_prompt, raw.select_columns(columns).with_format(None))
        empty = sum(any(is_empty(row[side]) for side in SIDES) for row in rows)
    found = {"a response is empty": empty, f"the prompt alone fills `max_length={args.max_length}`": count - empty}
    return {why: number for why, number in found.items() if number}


def pairs_per_step(trainer) -> int:
    """Pairs of an optimizer step over all processes."""
    args = trainer.args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def tokens_per_step(trainer) -> tuple[int, float]:
    """Pairs of an optimizer step over all processes, and the tokens that the policy reads for them, on average."""
    args, pairs = trainer.args, pairs_per_step(trainer)
    lengths = token_lengths(trainer.train_dataset)
    if "prompt" not in lengths:
        return pairs, math.nan
    if "chosen" in lengths:
        rows = np.concatenate([lengths["prompt"] + lengths[side] for side in ("chosen", "rejected")])
    else:
        rows = lengths["prompt"] + args.max_completion_length
    if args.max_length is not None:
        rows = np.minimum(rows, args.max_length)
    return pairs, 2 * pairs * float(rows.mean())


def rendered_example(trainer, limit: int = 1200) -> list[str]:
    """The first pair as the model reads it, its special tokens included."""
    if not hasattr(trainer.train_dataset, "column_names") or not token_lengths(trainer.train_dataset):
        return []
    row = trainer.train_dataset[0]
    decode = getattr(trainer.processing_class, "tokenizer", trainer.processing_class).decode
    lines = ["first example, as the model reads it"]
    for name in ("prompt", "chosen", "rejected"):
        if f"{name}_ids" in row:
            text = decode(row[f"{name}_ids"])
            shown = text if len(text) <= limit else f"{text[: limit // 2]} [...] {text[-limit // 2 :]}"
            lines += [
                f"  {name:<9}| {line}" if i == 0 else f"           | {line}"
                for i, line in enumerate(shown.split("\n"))
            ]
    return lines


# ---- Parameters, memory and disk ------------------------------------------------------------------------------------


def parameter_counts(model) -> tuple[int, int]:
    """Number of trained and of all parameters; 4-bit weights count as the parameters that they encode."""
    trained = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count = math.prod(parameter.quant_state.shape) if parameter.quant_state is not None else 2 * count
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


def _bytes(parameters) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _optimizer_bytes(args, trained: list) -> int:
    name = str(getattr(args.optim, "value", args.optim))
    key = next((key for key in ("8bit", "paged_adamw_32bit", *_OPTIMIZER_STATE) if key in name), "adamw")
    factor, fixed = _OPTIMIZER_STATE[key]
    return sum(p.numel() * (factor * p.element_size() + fixed) for p in trained)


def memory(trainer) -> dict[str, float]:
    """
    Bytes that each process holds in training, without sharding: weights, gradients, optimizer and an estimate of the
    activations.

    The activations are those of a transformer layer, 34 times tokens times hidden size in 16 bits (Korthikanti et al.,
    https://huggingface.co/papers/2205.05198, without the attention matrix, which fused attention does not keep); with
    gradient checkpointing one layer's, and every layer's input.
    """
    model, args = trainer.model, trainer.args
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts: dict[str, float] = {"weights": _bytes(model.parameters())}
    reference = getattr(trainer, "ref_model", None)
    if reference is not None:
        parts["reference"] = _bytes(reference.parameters())
    parts["gradients"] = _bytes(trained)
    parts["optimizer"] = _optimizer_bytes(args, trained)
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else None
    if all(hasattr(text, name) for name in ("hidden_size", "num_hidden_layers")):
        length = _row_length(trainer)
        tokens = 2 * args.per_device_train_batch_size * length
        width = 1 if args.bf16 or args.fp16 else 2
        layer = 34 * tokens * text.hidden_size * width
        stored = 2 * width * tokens * text.hidden_size * text.num_hidden_layers
        parts["activations"] = layer + stored if args.gradient_checkpointing else layer * text.num_hidden_layers
    return parts


def _row_length(trainer) -> int:
    """Tokens of the longest row of a batch."""
    limit = getattr(trainer.args, "max_length", None)
    if hasattr(trainer.train_dataset, "column_names"):
        lengths = token_lengths(trainer.train_dataset)
        if "chosen" in lengths:
            longest = int((lengths["prompt"] + np.maximum(lengths["chosen"], lengths["rejected"])).max())
            return longest if limit is None else min(limit, longest)
    return limit or 1024


def checkpoint_bytes(trainer) -> tuple[int, int]:
    """Bytes of the final model and of a checkpoint: what is trained, or the whole model, and the optimizer's state."""
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    whole = not any(not parameter.requires_grad for parameter in trainer.model.parameters())
    saved = _bytes(trainer.model.parameters()) if whole else _bytes(trained)
    return saved, saved + _optimizer_bytes(trainer.args, trained)


def steps_per_epoch(trainer) -> int:
    """Optimizer steps of a pass over the data, the last of which may have fewer pairs."""
    return max(1, math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps))


def steps(trainer) -> int:
    """Optimizer steps of the run."""
    args = trainer.args
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch(trainer))


def gib(count: float) -> str:
    """A number of bytes in readable units."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


# ---- The whole ------------------------------------------------------------------------------------------------------


def describe(trainer, script: Any) -> str:
    """
    Describes, as text, what the run would do.

    Args:
        trainer:
            The trainer, ready to train.
        script ([`~trl_ext.launch.scripts.Script`]):
            The method's script, which has the data as they were before the trainer prepared them.
    """
    args = trainer.args
    trained, total = parameter_counts(trainer.model)
    number = steps(trainer)
    lines = [f"{script.method.title}: what this run would do", ""]
    lines += script.describe_data(trainer)
    pairs, tokens = script.step_size(trainer)
    about = "at most" if script.unit == "prompts" else "about"
    per_step = f"{pairs:g} {script.unit}" + ("" if math.isnan(tokens) else f", {about} {tokens:,.0f} tokens")
    lines.append(
        f"optimizer step     {per_step} ({args.per_device_train_batch_size} a device x "
        f"{args.gradient_accumulation_steps} accumulated x {args.world_size} process{'es' * (args.world_size > 1)})"
    )
    epochs = number / steps_per_epoch(trainer)
    passes = f"{epochs:,.{0 if epochs >= 100 else 2}f}".removesuffix(".00")
    lines.append(
        f"length             {number:,} step{'s' * (number != 1)}, {passes} epoch{'s' * (passes != '1')}, "
        f"learning rate {args.learning_rate:g}"
    )
    lines += ["", f"parameters         {trained:,} trained of {total:,} ({trained / total:.2%})"]
    parts = memory(trainer)
    unknown = "" if "activations" in parts else "; activations come on top"
    lines.append(f"memory             about {gib(sum(parts.values()))} a process, without sharding{unknown}")
    lines += [f"  {name:<16} {gib(size)}" for name, size in parts.items()]
    model, checkpoint = checkpoint_bytes(trainer)
    kept = _checkpoints(args, number)
    lines.append(
        f"disk               about {gib(model + kept * checkpoint)} in {args.output_dir}: the model {gib(model)}"
        + (f", {kept} checkpoint{'s' * (kept > 1)} of {gib(checkpoint)}" if kept else ", no checkpoints")
    )
    if "precompute_ref_log_probs" in args._dry_run_postponed:
        lines.append(
            "before step 1      `precompute_ref_log_probs` scores every pair with the reference; not done here"
        )
    example = script.example_row(trainer)
    if example:
        lines += ["", *example]
    lines += ["", "Nothing was trained. Leave out `--dry_run` to start."]
    return "\n".join(lines)


def _checkpoints(args, number: int) -> int:
    """Checkpoints on disk at the end of the run."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    if strategy == "epoch":
        count = math.ceil(args.num_train_epochs)
    else:
        every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * number)
        count = math.ceil(number / every)  # the last step is saved too
    return min(count, args.save_total_limit or count)
