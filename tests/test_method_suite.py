"""
What every method promises, in numbers: the shared suite over `methods.METHODS`.

Tolerances. "Bitwise" means equality. Where the order of fp32 sums differs (padding, accumulation, processes), losses
must agree to 2e-6 and weights to 1e-6 after a few steps. Adam divides by the root of a squared gradient, so a gradient
of rounding noise moves a weight by the whole learning rate; comparisons across orders of summation therefore use
`adam_epsilon=1e-3`, above the noise.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import harness
import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from methods import METHODS, PRIMARY, WITH_REFERENCE
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig


TESTS = Path(__file__).resolve().parent
SMOOTH = dict(adam_epsilon=1e-3)  # see the top
LOSS_NOISE, WEIGHT_NOISE = 2e-6, 1e-6


def by_id(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.id)


every_method = by_id(METHODS)
every_trainer = by_id(PRIMARY)
every_reference_method = by_id(WITH_REFERENCE)


def lora(**kwargs):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", **kwargs})


def nearby(folder, seed: int = 7, scale: float = 0.02):
    """The tiny model a little displaced: a reference whose log ratios to the policy are not zero."""
    model = harness.load(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def displaced(method, folder, tmp_path, **options):
    """A trainer whose policy is not its reference, and the reference (both `None`-safe for reference-free methods)."""
    reference = nearby(folder)
    ref_model = nearby(folder) if method.needs_reference else None
    return harness.trainer(method, folder, tmp_path, ref_model=ref_model, **options), reference


# ---- The loss ----------------------------------------------------------------------------------------------------------


@every_method
def test_first_loss_is_the_equation(method, tiny_folder, tmp_path):
    """
    The first logged loss and rewards are the paper's, recomputed from full-vocabulary log-softmax of the very batch
    that the trainer took, with a reference that differs from the policy.
    """
    trainer, reference = displaced(method, tiny_folder, tmp_path, max_steps=1)
    policy, seen = harness.load(tiny_folder).eval(), []
    compute_loss = trainer.compute_loss

    def spy(model, inputs, *args, **kwargs):
        seen.append(inputs)
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    with torch.no_grad():
        losses, chosen, rejected = harness.evaluate_equation(
            method, policy.double(), reference.double(), seen[0], trainer.args.beta
        )
    assert losses.std() > 1e-6  # the pairs differ, so agreement of the mean means something
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(losses.mean().item(), rel=2e-5, abs=1e-8)
    assert entry["rewards/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-4, abs=1e-5)
    assert entry["rewards/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-4, abs=1e-5)
    assert entry["rewards/margins"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-4, abs=1e-5)
    assert entry["rewards/accuracies"] == (chosen > rejected).double().mean().item()


@every_method
def test_gradient_is_the_equation(method, tiny_folder, tmp_path):
    """
    The gradient of every parameter equals autograd through the plain float64 definition, to 1e-5 of the largest
    entry (the fused head and the model compute in fp32).
    """
    trainer, reference = displaced(method, tiny_folder, tmp_path)
    inputs = harness.batch(trainer)
    trainer.model.train()
    trainer.compute_loss(trainer.model, inputs).backward()
    plain = harness.load(tiny_folder).double().eval()
    losses, _, _ = harness.evaluate_equation(method, plain, reference.double(), inputs, trainer.args.beta)
    losses.mean().backward()
    largest = max(parameter.grad.abs().max().item() for parameter in plain.parameters())
    assert largest > 0
    for (name, parameter), expected in zip(trainer.model.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad.double() - expected.grad).abs().max().item() < 1e-5 * largest, name


@every_method
def test_training_raises_the_margin(method, tiny_folder, tmp_path):
    """
    Training moves the method's own margin up and its loss down on the training pairs, by the equation recomputed from
    full logits before and after: a loss of the wrong sign fails here.
    """
    trainer = harness.trainer(method, tiny_folder, tmp_path, max_steps=16, learning_rate=1e-4)
    initial, inputs = harness.load(tiny_folder).eval(), harness.batch(trainer, 32)
    trainer.train()
    with torch.no_grad():
        before = harness.evaluate_equation(method, initial, initial, inputs, trainer.args.beta)
        after = harness.evaluate_equation(method, trainer.model.eval(), initial, inputs, trainer.args.beta)
    losses, margins = (after[0] - before[0]), (after[1] - after[2]) - (before[1] - before[2])
    assert losses.mean() < 0 and (losses < 0).float().mean() > 0.9
    assert margins.mean() > 0.05 and (margins > 0).float().mean() > 0.9


@every_method
def test_pairs_are_independent_and_unordered(method, tiny_folder, tmp_path):
    """A pair's loss is its own: permuting the batch permutes the losses, and another pair's text changes nothing."""
    trainer, _ = displaced(method, tiny_folder, tmp_path)
    losses = {}

    def pair_losses(rows):
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in rows])
        with torch.no_grad():
            sides = trainer._score_responses(trainer.score_policy(trainer.model, inputs), inputs)
            return trainer.pair_loss(*sides).losses

    trainer.model.eval()
    order = [5, 0, 3, 2, 4, 1]
    losses = pair_losses(range(6))
    assert losses.std() > 1e-6
    torch.testing.assert_close(pair_losses(order), losses[order], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(pair_losses([0, 9, 17, 23])[0], losses[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(pair_losses([0])[0], losses[0], rtol=1e-5, atol=1e-7)


@every_method
def test_golden_trajectory(method, tiny_folder, tmp_path, request):
    """Eight steps give the losses and margins of `golden/<id>.json`, to 1e-4: numbers do not drift unnoticed."""
    trainer = harness.trainer(method, tiny_folder, tmp_path, max_steps=8)
    trainer.train()
    keys = ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "entropy")
    values = {key: harness.column(trainer, key) for key in keys}
    path = TESTS / "golden" / f"{method.id}.json"
    if request.config.getoption("--regen-golden"):
        harness.write_json(path, values)
    golden = json.loads(path.read_text())
    assert golden.keys() == values.keys()
    for key, expected in golden.items():
        assert len(expected) == 8
        assert values[key] == pytest.approx(expected, rel=1e-4, abs=1e-6), key


# ---- Models and data ---------------------------------------------------------------------------------------------------


@every_method
def test_trains_full_from_id_and_from_instance(method, tiny_folder, tmp_path):
    """A string and an instance give bitwise the same run, every weight moves, and the reference stays where it was."""
    runs = []
    for name, model in (("id", tiny_folder), ("instance", harness.load(tiny_folder))):
        trainer = harness.trainer(method, model, tmp_path / name)
        trainer.train()
        runs.append((harness.weights(trainer.model), harness.logs(trainer)))
        if method.needs_reference:
            initial = harness.weights(harness.load(tiny_folder))
            assert harness.largest_difference(harness.weights(trainer.ref_model), initial) == 0
        else:
            assert trainer.ref_model is None
    assert harness.largest_difference(runs[0][0], runs[1][0]) == 0
    harness.assert_same_logs(runs[0][1], runs[1][1])
    for name, before in harness.load(tiny_folder).named_parameters():
        assert not torch.equal(before, runs[0][0][name]), name


@every_method
def test_trains_lora(method, tiny_folder, tmp_path):
    """With LoRA the base is bitwise frozen, every adapter weight moves, and no second model is kept."""
    trainer = harness.trainer(method, tiny_folder, tmp_path, peft_config=lora(), max_steps=8)
    before = harness.weights(trainer.model)
    assert trainer.ref_model is None
    trainer.train()
    for name, after in trainer.model.named_parameters():
        assert torch.equal(before[name], after) == ("lora_" not in name), name
    margins = harness.column(trainer, "rewards/margins")
    assert sum(margins[-3:]) / 3 > margins[0]


@every_trainer
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_trains_qlora(method, dtype, tiny_folder, tmp_path):
    """4-bit NF4 with LoRA: linear layers are quantised and frozen, adapters move, the margin rises."""
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )
    trainer = harness.trainer(
        method,
        tiny_folder,
        tmp_path,
        peft_config=lora(),
        quantization_config=quantization,
        max_steps=8,
        model_init_kwargs={"dtype": dtype},
        learning_rate=5e-3,
    )
    before = harness.weights(trainer.model)
    quantized = [name for name, weight in before.items() if weight.dtype == torch.uint8]
    assert len(quantized) == 2 * 7  # the seven linear layers of each of two blocks
    assert trainer.ref_model is None
    trainer.train()
    moved = {name for name, after in trainer.model.named_parameters() if not torch.equal(before[name], after)}
    adapters = {name for name in before if "lora_" in name}
    assert moved == adapters
    margins = harness.column(trainer, "rewards/margins")
    assert all(torch.isfinite(torch.tensor(harness.column(trainer, "loss"))))
    assert sum(margins[-3:]) / 3 > margins[0]


@every_method
def test_conversational_and_plain_data_agree(method, tiny_folder, tmp_path):
    """Conversations are the same run as the text that the chat template makes of them."""
    plain = []
    for row in tiny.rows(conversational=True):
        (prompt,), (chosen,), (rejected,) = row["prompt"], row["chosen"], row["rejected"]
        plain.append(
            {
                "prompt": f"<|user|>{prompt['content']}<|end|><|assistant|>",
                "chosen": f"{chosen['content']}<|end|>",
                "rejected": f"{rejected['content']}<|end|>",
            }
        )
    runs = []
    for name, data in (("chat", tiny.dataset(conversational=True)), ("plain", Dataset.from_list(plain))):
        trainer = harness.trainer(method, tiny_folder, tmp_path / name, train_dataset=data)
        trainer.train()
        runs.append(harness.logs(trainer))
    harness.assert_same_logs(*runs)


@every_method
@pytest.mark.parametrize("conversational", [False, True], ids=["plain", "conversational"])
def test_implicit_prompt(method, conversational, tiny_folder, tmp_path):
    """Without a `prompt` column the common beginning is the prompt: the run is that of explicit prompts."""
    rows = tiny.rows(conversational=conversational)
    if not conversational:  # the common beginning must end where the prompt does
        rows = [{**row, "chosen": f"\n1{row['chosen']}", "rejected": f"\n2{row['rejected']}"} for row in rows]
        explicit = [
            {"prompt": r["prompt"] + "\n", "chosen": r["chosen"][1:], "rejected": r["rejected"][1:]} for r in rows
        ]
    else:
        explicit = rows
    implicit = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    runs = []
    for name, data in (("implicit", implicit), ("explicit", explicit)):
        trainer = harness.trainer(method, tiny_folder, tmp_path / name, train_dataset=Dataset.from_list(data))
        trainer.train()
        runs.append(harness.logs(trainer))
    harness.assert_same_logs(*runs)


@every_method
def test_streaming(method, tiny_folder, tmp_path):
    """A streamed dataset is the same run as the same rows in the same order."""
    rows = tiny.rows(16)
    streamed = IterableDataset.from_generator(lambda: iter(rows))
    runs = []
    for name, data in (("stream", streamed), ("map", Dataset.from_list(rows))):
        trainer = harness.trainer(
            method, tiny_folder, tmp_path / name, train_dataset=data, train_sampling_strategy="sequential"
        )
        trainer.train()
        runs.append(harness.logs(trainer))
    harness.assert_same_logs(*runs, ignore=("epoch",))


@every_method
def test_tokenized_data_is_accepted(method, tiny_folder, tmp_path):
    """Data that went through the trainer's tokenisation goes through it again unchanged, as TRL's does not."""
    first = harness.trainer(method, tiny_folder, tmp_path / "raw")
    only_ids = first.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    again = harness.trainer(method, tiny_folder, tmp_path / "again", train_dataset=only_ids)
    assert again.train_dataset.to_dict() == only_ids.to_dict()
    first.train()
    again.train()
    harness.assert_same_logs(harness.logs(first), harness.logs(again))


# ---- Invariances -------------------------------------------------------------------------------------------------------


def compare(method, folder, tmp_path, first: dict, second: dict, ignore=(), **common):
    """Runs under two configurations that must agree but for the order of fp32 sums."""
    runs = []
    for name, options in (("first", first), ("second", second)):
        trainer = harness.trainer(method, folder, tmp_path / name, **{**SMOOTH, **common, **options})
        trainer.train()
        runs.append((harness.weights(trainer.model), harness.logs(trainer)))
    initial = harness.weights(trainer.model.__class__.from_pretrained(folder))
    moved = harness.largest_difference(runs[0][0], initial)
    difference = harness.largest_difference(runs[0][0], runs[1][0])
    assert moved > 1e-4 and difference < min(WEIGHT_NOISE, 1e-2 * moved), (moved, difference)
    for (entry, other), key in ((pair, key) for pair in zip(runs[0][1], runs[1][1], strict=True) for key in pair[0]):
        if key not in ignore:
            assert entry[key] == pytest.approx(other[key], rel=1e-4, abs=LOSS_NOISE), key


@every_method
def test_accumulation(method, tiny_folder, tmp_path):
    """One pair a step accumulated over eight is eight pairs a step: losses and weights."""
    # The mean of means over tokens is not the mean over all tokens, so the token-weighted metrics may differ.
    weighted = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
    compare(
        method,
        tiny_folder,
        tmp_path,
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=8),
        dict(per_device_train_batch_size=8, gradient_accumulation_steps=1),
        ignore=weighted,
    )


@every_method
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_gradient_checkpointing(method, reentrant, tiny_folder, tmp_path, recwarn):
    """Recomputing activations changes nothing, and the reference's forward draws no warning about gradients."""
    kwargs = {"use_reentrant": reentrant}
    on = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    compare(method, tiny_folder, tmp_path, on, dict(gradient_checkpointing=False))
    assert not [w for w in recwarn if "None of the inputs have requires_grad" in str(w.message)]


@every_method
def test_padding(method, tiny_folder, tmp_path):
    """Padding every batch to a multiple of 64 changes nothing."""
    compare(method, tiny_folder, tmp_path, dict(pad_to_multiple_of=64), {})


@every_method
def test_padding_token_is_not_read(method, tiny_folder, tmp_path):
    """What stands in the padding does not matter: losses are the same with other ids there."""
    trainer, _ = displaced(method, tiny_folder, tmp_path)
    inputs = harness.batch(trainer)
    assert (inputs["attention_mask"] == 0).any()
    other = dict(inputs, input_ids=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 77))
    trainer.model.eval()
    with torch.no_grad():
        losses = [trainer.compute_loss(trainer.model, batch).item() for batch in (inputs, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6, abs=1e-9)


@every_method
def test_same_seed_same_run(method, tiny_folder, tmp_path):
    """Twice the same seed, with dropout in the adapter: logs and weights bitwise equal. Another seed differs."""
    runs = []
    for seed in (3, 3, 4):
        folder = tmp_path / f"{len(runs)}"
        dropout = lora(lora_dropout=0.3)
        trainer = harness.trainer(method, tiny_folder, folder, peft_config=dropout, seed=seed, disable_dropout=False)
        trainer.train()
        runs.append((harness.weights(trainer.model), harness.logs(trainer)))
    assert harness.largest_difference(runs[0][0], runs[1][0]) == 0
    harness.assert_same_logs(runs[0][1], runs[1][1])
    assert harness.largest_difference(runs[0][0], runs[2][0]) > 1e-3


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bf16-weights"])
def test_bf16_is_close_to_fp32(method, dtype, tiny_folder, tmp_path):
    """bf16, as autocast over fp32 weights and with bf16 weights: finite, and the first losses near those of fp32."""
    runs = []
    for name, options in (
        ("fp32", {}),
        ("bf16", {"bf16": True, "model_init_kwargs": {"dtype": str(dtype).split(".")[1]}}),
    ):
        trainer = harness.trainer(method, tiny_folder, tmp_path / name, learning_rate=1e-5, **options)
        trainer.train()
        runs.append(harness.column(trainer, "loss"))
    assert all(abs(value) < 10 for value in runs[1])
    assert runs[1] == pytest.approx(runs[0], rel=0.2, abs=0.02)


# ---- Processes, interruption, resuming ---------------------------------------------------------------------------------


def environment() -> dict:
    return dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(TESTS.parent), HF_HUB_OFFLINE="1")


def script(method, folder, output, **options) -> list[str]:
    output.mkdir(parents=True, exist_ok=True)
    return [str(TESTS / "scripts" / "run_method.py"), method.id, folder, str(output), json.dumps(options)]


def launch(arguments: list[str]) -> None:
    """Runs a script in two processes, as the README says to."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", str(TESTS.parent / "recipes" / "accelerate" / "cpu_2proc.yaml")]
    done = subprocess.run(
        [*launcher, "--main_process_port", "0", *arguments],
        env=environment(),
        timeout=300,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def run_here(arguments: list[str]) -> None:
    sys.path.insert(0, str(TESTS / "scripts"))
    import run_method

    run_method.main(*arguments[1:])


def result(folder) -> tuple[dict, dict]:
    return load_file(folder / "weights.safetensors"), json.loads((folder / "result.json").read_text())


@every_trainer
def test_two_processes(method, tiny_folder, tmp_path):
    """
    Two processes on one global batch are one process on it: weights, every logged value, the evaluation. Metrics cost
    one communication a step. Stopped in the middle of a logging window and resumed, two processes are bitwise what
    they are uninterrupted.
    """
    options = dict(SMOOTH, max_steps=5, logging_steps=3, evaluate=True)
    two = dict(options, per_device_train_batch_size=2, per_device_eval_batch_size=2)
    launch(script(method, tiny_folder, tmp_path / "two", **two))
    run_here(script(method, tiny_folder, tmp_path / "one", **options))
    (weights, one), (two_weights, both) = result(tmp_path / "one"), result(tmp_path / "two")
    assert (one["processes"], both["processes"]) == (1, 2)
    assert harness.largest_difference(weights, two_weights) < WEIGHT_NOISE
    # To the run's `train_loss` transformers adds the steps since the last log of the first process only.
    harness.assert_same_logs(one["logs"], both["logs"], rtol=1e-4, atol=LOSS_NOISE, ignore=("train_loss",))
    assert one["communications"] == [0] * 5 and both["communications"] == [1] * 5

    launch(script(method, tiny_folder, tmp_path / "resumed", **dict(two, evaluate=False, stop_at=2)))
    checkpoint = str(tmp_path / "resumed" / "checkpoint-2")
    launch(script(method, tiny_folder, tmp_path / "resumed", **dict(two, resume=checkpoint)))
    resumed_weights, resumed = result(tmp_path / "resumed")
    assert harness.largest_difference(two_weights, resumed_weights) == 0
    harness.assert_same_logs(both["logs"], resumed["logs"])


@every_method
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora-dropout"])
@pytest.mark.parametrize("step", [5, 6], ids=["inside-a-window", "at-a-log"])
def test_resume_is_bitwise(method, peft, step, tiny_folder, tmp_path):
    """
    Stopped in the middle of an epoch and resumed by a new trainer, a run is bitwise the uninterrupted one: weights and
    every logged value, `num_tokens` and `train_loss` among them. Accumulation of 2 leaves half a step at the epoch's
    end; dropout in the adapter makes the random state count.
    """

    def build(name, **options):
        return harness.trainer(
            method,
            tiny_folder,
            tmp_path / name,
            train_dataset=tiny.dataset(14),
            peft_config=lora(lora_dropout=0.3) if peft else None,
            disable_dropout=not peft,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=10,
            logging_steps=3,
            learning_rate=1e-4,
            **options,
        )

    whole = build("whole")
    summary = whole.train()
    build("stopped", callbacks=[harness.StopAt(step)]).train()
    for restore in (False, True):
        resumed = build("stopped", restore_callback_states_from_checkpoint=restore)
        resumed_summary = resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / f"checkpoint-{step}"))
        assert harness.largest_difference(harness.weights(whole.model), harness.weights(resumed.model)) == 0
        harness.assert_same_logs(harness.logs(whole), harness.logs(resumed))
        assert resumed_summary.training_loss == summary.training_loss
    tokens = harness.column(resumed, "num_tokens")
    assert len(tokens) == 4 and tokens == sorted(tokens) and tokens[0] > 0  # three windows and the rest


@every_trainer
def test_resume_after_a_kill(method, tiny_folder, tmp_path):
    """A process killed with SIGKILL between checkpoints, then resumed: bitwise the uninterrupted run."""
    options = dict(max_steps=7, logging_steps=3, save_strategy="steps", save_steps=2)
    run_here(script(method, tiny_folder, tmp_path / "whole", **options))
    arguments = script(method, tiny_folder, tmp_path / "killed", **dict(options, sleep=1.0))
    with open(tmp_path / "output.txt", "w") as output:
        process = subprocess.Popen([sys.executable, *arguments], env=environment(), stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / "killed" / "checkpoint-4" / "trainer_state.json").exists():
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
                time.sleep(0.05)
            time.sleep(0.3)  # the state is written last; now the process sleeps before step 5
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert not (tmp_path / "killed" / "result.json").exists()
    run_here(script(method, tiny_folder, tmp_path / "killed", **dict(options, resume=True)))
    (weights, whole), (resumed_weights, resumed) = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert harness.largest_difference(weights, resumed_weights) == 0
    harness.assert_same_logs(whole["logs"], resumed["logs"])


@every_trainer
def test_a_second_training_counts_afresh(method, tiny_folder, tmp_path):
    """`train()` again on the same trainer starts `num_tokens` at zero, as its step does."""
    trainer = harness.trainer(method, tiny_folder, tmp_path)
    trainer.train()
    first = harness.column(trainer, "num_tokens")
    trainer.train()
    assert harness.column(trainer, "num_tokens") == first


@every_trainer
def test_resume_in_the_same_trainer(method, tiny_folder, tmp_path):
    """Resuming with the trainer that was interrupted, as in a notebook, does not count its last window twice."""
    options = dict(max_steps=7, logging_steps=4)
    whole = harness.trainer(method, tiny_folder, tmp_path / "whole", **options)
    whole.train()
    stopped = harness.trainer(method, tiny_folder, tmp_path / "same", callbacks=[harness.StopAt(2)], **options)
    stopped.train()
    stopped.train(resume_from_checkpoint=True)
    harness.assert_same_logs(harness.logs(whole), harness.logs(stopped))


@every_trainer
def test_saving_and_evaluating_leave_no_trace(method, tiny_folder, tmp_path):
    """Checkpoints and evaluations in the middle of logging windows change neither the run nor what it logs."""
    plain = harness.trainer(method, tiny_folder, tmp_path / "plain", logging_steps=3, max_steps=7)
    busy = harness.trainer(
        method,
        tiny_folder,
        tmp_path / "busy",
        logging_steps=3,
        max_steps=7,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=tiny.dataset(8, seed=1),
    )
    plain.train()
    busy.train()
    training = [entry for entry in harness.logs(busy) if not any(key.startswith("eval_") for key in entry)]
    assert len(training) < len(harness.logs(busy))
    # As in TRL, metrics of a half-filled last window are in the summary unless an evaluation ended the run.
    assert training[-1]["train_loss"] == harness.logs(plain)[-1]["train_loss"]
    harness.assert_same_logs(harness.logs(plain)[:-1], training[:-1])
    assert harness.largest_difference(harness.weights(plain.model), harness.weights(busy.model)) == 0
