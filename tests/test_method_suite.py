"""
What every paired method promises, in numbers: the shared suite over `methods.METHODS`. What is asked of any run,
whatever its data, and its tolerances are in `joint.py`.
"""

import math
import sys
import time

import harness
import joint
import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset, load_from_disk
from joint import LOSS_NOISE, SMOOTH, WEIGHT_NOISE, by_id, lora
from launching import fork, fork_and_kill, launch
from methods import METHODS, ONLINE, PRIMARY, WITH_PRECOMPUTE, WITH_REFERENCE
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model


every_method = by_id(METHODS)
every_trainer = by_id(PRIMARY)
# With the methods that sample their own pairs: what the loss is, whatever its data. The rest of what is asked of their
# runs is in the suite of methods that sample.
every_pair_loss = by_id(METHODS + ONLINE)
every_reference_method = by_id(WITH_REFERENCE)
every_precomputing_method = by_id(WITH_PRECOMPUTE)


def builder(method, model, tmp_path, **common):
    """What the checks of `joint.py` build trainers with."""

    def build(name, **options):
        given = {"model": model, **common, **options}
        return harness.trainer(method, given.pop("model"), tmp_path / name, **given)

    return build


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


# ---- The loss -------------------------------------------------------------------------------------------------------


@every_pair_loss
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


PAIR_KEYS = ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "entropy")


@every_method
def test_golden_trajectory(method, tiny_folder, tmp_path, request):
    trainer = harness.trainer(method, tiny_folder, tmp_path, max_steps=8)
    joint.check_golden(trainer, method.id, PAIR_KEYS, request.config.getoption("--regen-golden"))


# ---- Models and data ------------------------------------------------------------------------------------------------


@every_method
def test_trains_full_from_id_and_from_instance(method, tiny_folder, tmp_path):
    joint.check_full(builder(method, tiny_folder, tmp_path), tiny_folder)
    if not method.needs_reference:
        assert harness.trainer(method, tiny_folder, tmp_path / "none").ref_model is None


@every_method
def test_trains_lora(method, tiny_folder, tmp_path):
    """And the margin rises."""
    trainer = harness.trainer(method, tiny_folder, tmp_path, peft_config=lora(), max_steps=8)
    joint.check_lora(trainer)
    margins = harness.column(trainer, "rewards/margins")
    assert sum(margins[-3:]) / 3 > margins[0]


@every_trainer
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_trains_qlora(method, dtype, tiny_folder, tmp_path):
    """And the margin rises."""
    build = builder(method, tiny_folder, tmp_path, max_steps=8, model_init_kwargs={"dtype": dtype})
    margins = harness.column(joint.check_qlora(build, dtype), "rewards/margins")
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
    data = {"chat": tiny.dataset(conversational=True), "plain": Dataset.from_list(plain)}
    variants = {name: dict(train_dataset=rows) for name, rows in data.items()}
    joint.check_same_logs(builder(method, tiny_folder, tmp_path), variants)


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
    data = {"implicit": implicit, "explicit": explicit}
    variants = {name: dict(train_dataset=Dataset.from_list(rows)) for name, rows in data.items()}
    joint.check_same_logs(builder(method, tiny_folder, tmp_path), variants)


@every_method
def test_streaming(method, tiny_folder, tmp_path):
    """A streamed dataset is the same run as the same rows in the same order."""
    rows = tiny.rows(16)
    data = {"stream": IterableDataset.from_generator(lambda: iter(rows)), "map": Dataset.from_list(rows)}
    variants = {name: dict(train_dataset=rows) for name, rows in data.items()}
    build = builder(method, tiny_folder, tmp_path, train_sampling_strategy="sequential")
    joint.check_same_logs(build, variants, ignore=("epoch",))


@every_method
def test_tokenized_data_is_accepted(method, tiny_folder, tmp_path):
    """Data that went through the trainer's tokenization goes through it again unchanged, as TRL's does not."""
    first = harness.trainer(method, tiny_folder, tmp_path / "raw")
    only_ids = first.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    again = harness.trainer(method, tiny_folder, tmp_path / "again", train_dataset=only_ids)
    assert again.train_dataset.to_dict() == only_ids.to_dict()
    first.train()
    again.train()
    harness.assert_same_logs(harness.logs(first), harness.logs(again))


# ---- Invariances ----------------------------------------------------------------------------------------------------


def compare(method, folder, tmp_path, first: dict, second: dict, ignore=(), **common):
    """Runs under two configurations that must agree but for the order of fp32 sums."""
    build = builder(method, folder, tmp_path, **common)
    joint.check_equal_runs(build, harness.load(folder), first, second, lambda key: key not in ignore)


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


@every_pair_loss
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
    joint.check_same_seed(builder(method, tiny_folder, tmp_path, disable_dropout=False), apart=1e-3)


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


# ---- Processes, interruption, resuming ------------------------------------------------------------------------------


def run_here(arguments: list[str]) -> None:
    sys.path.insert(0, str(joint.TESTS / "scripts"))
    import run_method

    run_method.main(*arguments[1:])


def script(method, folder, output, **options) -> list[str]:
    return joint.script("run_method.py", method, folder, output, **options)


@every_trainer
def test_two_processes(method, tiny_folder, tmp_path):
    """
    Two processes on one global batch are one process on it: weights, every logged value, the evaluation, although a
    model was evaluated before it was trained. Metrics cost one communication a step. Stopped in the middle of a logging window and resumed, two processes are bitwise what
    they are uninterrupted.
    """
    options = dict(SMOOTH, max_steps=5, logging_steps=3, evaluate=True)
    two = dict(options, per_device_train_batch_size=2, per_device_eval_batch_size=2)
    # One method by the launcher, as the README says to.
    run = launch if method is PRIMARY[0] else fork
    run(*script(method, tiny_folder, tmp_path / "two", **two))
    run_here(script(method, tiny_folder, tmp_path / "one", **options))
    (weights, one), (two_weights, both) = joint.result(tmp_path / "one"), joint.result(tmp_path / "two")
    assert (one["processes"], both["processes"]) == (1, 2)
    assert harness.largest_difference(weights, two_weights) < WEIGHT_NOISE
    # To the run's `train_loss` transformers adds the steps since the last log of the first process only.
    harness.assert_same_logs(one["logs"], both["logs"], rtol=1e-4, atol=LOSS_NOISE, ignore=("train_loss",))
    # And in the first step one of a run with a reference, which is checked to start at it. The layouts of each model
    # were compared in the evaluation before.
    start = [1 if method.needs_reference else 0, 0, 0, 0, 0]
    assert one["communications"] == start and both["communications"] == [1 + count for count in start]

    fork(*script(method, tiny_folder, tmp_path / "resumed", **dict(two, evaluate=False, stop_at=2)))
    checkpoint = str(tmp_path / "resumed" / "checkpoint-2")
    fork(*script(method, tiny_folder, tmp_path / "resumed", **dict(two, resume=checkpoint)))
    joint.assert_bitwise(tmp_path / "two", tmp_path / "resumed")


@every_method
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora-dropout"])
@pytest.mark.parametrize("step", [5, 6], ids=["inside-a-window", "at-a-log"])
def test_resume_is_bitwise(method, peft, step, tiny_folder, tmp_path):
    """
    Stopped in the middle of an epoch and resumed by a new trainer, a run is bitwise the uninterrupted one: weights and
    every logged value, `num_tokens` and `train_loss` among them. Accumulation of 2 leaves half a step at the epoch's
    end; dropout in the adapter makes the random state count.
    """

    build = builder(
        method,
        tiny_folder,
        tmp_path,
        train_dataset=tiny.dataset(14),
        peft_config=lora(lora_dropout=0.3) if peft else None,
        disable_dropout=not peft,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=10,
        logging_steps=3,
        learning_rate=1e-4,
    )
    restored = [{"restore_callback_states_from_checkpoint": restore} for restore in (False, True)]
    tokens = harness.column(joint.check_resume(build, step, restored), "num_tokens")
    assert len(tokens) == 4 and tokens == sorted(tokens) and tokens[0] > 0  # three windows and the rest


@every_trainer
def test_resume_after_a_kill(method, tiny_folder, tmp_path):
    """A process killed with SIGKILL between checkpoints, then resumed: bitwise the uninterrupted run."""
    options = dict(max_steps=7, logging_steps=3, save_strategy="steps", save_steps=2)
    run_here(script(method, tiny_folder, tmp_path / "whole", **options))
    arguments = script(method, tiny_folder, tmp_path / "killed", **dict(options, sleep=0.5))
    state = tmp_path / "killed" / "checkpoint-4" / "trainer_state.json"
    fork_and_kill(
        lambda: state.exists() and not time.sleep(0.2), *arguments
    )  # it is written last; now the process sleeps
    assert not (tmp_path / "killed" / "result.json").exists()
    run_here(script(method, tiny_folder, tmp_path / "killed", **dict(options, resume=True)))
    joint.assert_bitwise(tmp_path / "whole", tmp_path / "killed")


@every_trainer
def test_a_second_training_counts_afresh(method, tiny_folder, tmp_path):
    first, second = joint.check_second_training(harness.trainer(method, tiny_folder, tmp_path))
    assert second == first


@every_trainer
def test_resume_in_the_same_trainer(method, tiny_folder, tmp_path):
    joint.check_resume_in_the_same_trainer(builder(method, tiny_folder, tmp_path, max_steps=7, logging_steps=4), 2)


@every_trainer
def test_saving_and_evaluating_leave_no_trace(method, tiny_folder, tmp_path):
    build = builder(method, tiny_folder, tmp_path, logging_steps=3, max_steps=8)
    joint.check_no_trace(build, tiny.dataset(8, seed=1), every=2)


# ---- Evaluation and metrics -----------------------------------------------------------------------------------------

TRL_KEYS = {"entropy", "num_tokens", "mean_token_accuracy", "logits/chosen", "logits/rejected"}
TRL_KEYS |= {"logps/chosen", "logps/rejected"}
TRL_KEYS |= {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
POLICY_KEYS = {"ranking_accuracy/policy", "ranking_accuracy/policy_norm"}
REFERENCE_KEYS = {"ranking_accuracy/reference", "ranking_accuracy/reference_norm"}
REFERENCE_KEYS |= {"logratios/chosen", "logratios/rejected"}


def greedy_pairs(model, count: int = 6) -> Dataset:
    """Tokenised pairs whose chosen side is partly what the model itself would say, so that accuracies are not zero."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(count):
        prompt = torch.randint(5, 300, (4,), generator=generator).tolist()
        ids = list(prompt)
        for position in range(4 + i):
            with torch.no_grad():
                best = model(torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append(best if (position + i) % 3 else 7)
        rejected = torch.randint(5, 300, (3 + 2 * (i % 3),), generator=generator).tolist()
        sides = [ids[4:], rejected] if i % 3 else [rejected, ids[4:]]
        rows.append({"prompt_ids": prompt, "chosen_ids": sides[0], "rejected_ids": sides[1]})
    return Dataset.from_list(rows)


@every_method
def test_metrics_mean_what_they_say(method, tiny_folder, tmp_path):
    """
    Every logged metric of one batch, recomputed in float64 from full logits: TRL's keys with TRL's meaning, ranking
    accuracies by summed and by mean log-probability, mean log ratios; no key of a reference where there is none.
    """
    policy, reference = harness.load(tiny_folder).eval().double(), nearby(tiny_folder).eval().double()
    data = greedy_pairs(harness.load(tiny_folder).eval())
    trainer, _ = displaced(
        method, tiny_folder, tmp_path, train_dataset=data, max_steps=1, per_device_train_batch_size=6
    )
    trainer.train()
    entry, inputs = trainer.state.log_history[0], harness.batch(trainer, 6)
    with torch.no_grad():
        chosen, rejected = harness.sides(policy, inputs, torch.float64)
        ref_chosen, ref_rejected = harness.sides(reference, inputs, torch.float64)
        logits = policy(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        equation = harness.evaluate_equation(method, policy, reference, inputs, trainer.args.beta)
    mask = torch.cat([chosen.mask, rejected.mask])
    logprobs = torch.cat([chosen.logprobs, rejected.logprobs])
    half = len(chosen.mask)

    def accuracy(first, second):
        return (first > second).double().mean().item()

    expected = {
        "entropy": -(logprobs.exp() * logprobs).sum(-1)[mask].mean().item(),
        "num_tokens": inputs["attention_mask"].sum().item(),
        "mean_token_accuracy": (chosen.logprobs.argmax(-1) == chosen.targets)[chosen.mask].double().mean().item(),
        "logits/chosen": logits.mean(-1)[:half][chosen.mask].mean().item(),
        "logits/rejected": logits.mean(-1)[half:][rejected.mask].mean().item(),
        "logps/chosen": chosen.logps.mean().item(),
        "logps/rejected": rejected.logps.mean().item(),
        "rewards/chosen": equation[1].mean().item(),
        "rewards/rejected": equation[2].mean().item(),
        "rewards/margins": (equation[1] - equation[2]).mean().item(),
        "rewards/accuracies": accuracy(equation[1], equation[2]),
        "ranking_accuracy/policy": accuracy(chosen.logps, rejected.logps),
        "ranking_accuracy/policy_norm": accuracy(chosen.mean_logps, rejected.mean_logps),
        "ranking_accuracy/reference": accuracy(ref_chosen.logps, ref_rejected.logps),
        "ranking_accuracy/reference_norm": accuracy(ref_chosen.mean_logps, ref_rejected.mean_logps),
        "logratios/chosen": (chosen.logps - ref_chosen.logps).mean().item(),
        "logratios/rejected": (rejected.logps - ref_rejected.logps).mean().item(),
    }
    assert 0 < expected["mean_token_accuracy"] < 1 and 0 < expected["ranking_accuracy/policy"] < 1
    assert TRL_KEYS | POLICY_KEYS <= set(entry)
    if not method.needs_reference:
        assert not {key for key in entry if key in REFERENCE_KEYS or "ref" in key}
        expected = {key: value for key, value in expected.items() if key not in REFERENCE_KEYS}
    for key, value in expected.items():
        assert entry[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


@every_method
def test_evaluate(method, tiny_folder, tmp_path):
    """
    A raw dataset, the same one prepared, and a dict of datasets give the same evaluation; its loss and margin are the
    equation's, and it changes neither the model nor the count of tokens.
    """
    raw = tiny.dataset(8, seed=1)
    trainer = harness.trainer(
        method, tiny_folder, tmp_path, eval_dataset={"own": raw, "more": tiny.dataset(4, seed=2)}
    )
    trainer.train()
    before = harness.weights(trainer.model)
    prepared = trainer.eval_dataset["own"]
    first = trainer.evaluate(raw)
    keys = {f"eval_{key}" for key in TRL_KEYS | POLICY_KEYS | (REFERENCE_KEYS if method.needs_reference else set())}
    logged = trainer.state.log_history[-1]
    assert keys <= set(logged) and logged["eval_num_tokens"] == harness.column(trainer, "num_tokens")[-1]
    other = trainer.evaluate(prepared)
    named = trainer.evaluate({"a": raw, "b": prepared})
    of_the_trainer = trainer.evaluate()
    losses = {first["eval_loss"], other["eval_loss"], named["eval_a_loss"], named["eval_b_loss"]}
    assert losses == {of_the_trainer["eval_own_loss"]} and "eval_more_loss" in of_the_trainer
    assert harness.largest_difference(before, harness.weights(trainer.model)) == 0

    inputs = trainer.data_collator([prepared[i] for i in range(8)])
    with torch.no_grad():
        initial = harness.load(tiny_folder).eval()
        expected = harness.evaluate_equation(method, trainer.model.eval(), initial, inputs, trainer.args.beta)
    assert first["eval_loss"] == pytest.approx(expected[0].mean().item(), rel=1e-4, abs=1e-7)
    margin = logged["eval_rewards/margins"]
    assert margin == pytest.approx((expected[1] - expected[2]).mean().item(), rel=1e-3, abs=1e-5)


@every_method
def test_predict(method, tiny_folder, tmp_path):
    """`predict` takes a raw dataset, returns logits of every row and the method's metrics, and leaks none of them."""
    raw = tiny.dataset(8, seed=1)
    trainer = harness.trainer(method, tiny_folder, tmp_path, eval_dataset=raw)
    trainer.train()
    evaluated = trainer.evaluate()
    output = trainer.predict(raw)
    assert output.predictions.shape[0] == 16 and output.predictions.shape[2] == 384  # chosen and rejected rows
    assert output.metrics["test_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-6)
    last = trainer.state.log_history[-1]
    for key in TRL_KEYS - {"num_tokens"}:
        assert output.metrics[f"test_{key}"] == pytest.approx(last[f"eval_{key}"], rel=1e-6, abs=1e-9), key
    again = trainer.evaluate()
    assert again["eval_loss"] == evaluated["eval_loss"]
    harness.assert_same_logs([harness.logs(trainer)[-1]], [harness.logs(trainer)[-2]])


@every_trainer
def test_compute_metrics(method, tiny_folder, tmp_path):
    """`compute_metrics` gets logits and ids of chosen and rejected rows, and its result is reported."""
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"rows": len(prediction.label_ids)}

    trainer = harness.trainer(
        method, tiny_folder, tmp_path, eval_dataset=tiny.dataset(8, seed=1), compute_metrics=compute_metrics
    )
    assert trainer.evaluate()["eval_rows"] == 16
    (logits, labels), *_ = seen
    assert logits[:2] == labels and logits[2] == 384


# ---- Options that the methods inherit -------------------------------------------------------------------------------


@every_method
def test_pretrained_adapter(method, tiny_folder, tmp_path):
    """
    A model that comes with a trained adapter: the reference is a frozen copy of that adapter, not the base, so the
    first log ratios are zero; a method without reference makes no copy.
    """
    model = get_peft_model(harness.load(tiny_folder), lora())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    trainer = harness.trainer(method, model, tmp_path, max_steps=3)
    copies = {name: w for name, w in harness.weights(trainer.model).items() if ".ref." in name}
    assert bool(copies) == method.needs_reference
    trainer.train()
    after = harness.weights(trainer.model)
    assert all(torch.equal(weight, after[name]) for name, weight in copies.items())
    assert all(not torch.equal(weight, after[name.replace(".ref.", ".default.")]) for name, weight in copies.items())
    if method.needs_reference:
        assert harness.column(trainer, "logratios/chosen")[0] == 0.0
        assert harness.column(trainer, "logratios/chosen")[1] != 0.0


@every_trainer
@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_prompt_learning(method, kind, tiny_folder, tmp_path):
    """
    Virtual tokens in front do not shift the scored positions: the summed log-probabilities are those of a plain
    forward of the same PEFT model. Only the prompt trains, and the margin rises.
    """
    peft_config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = harness.trainer(
        method, tiny_folder, tmp_path, peft_config=peft_config, max_steps=12, learning_rate=3e-2, max_grad_norm=0
    )
    inputs = harness.batch(trainer)
    trainer.model.eval()
    with torch.no_grad():
        logps = trainer.score_policy(trainer.model, inputs).log_probs.sum(1)
        logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        length = inputs["input_ids"].shape[1]
        logprobs = logits[:, -length:][:, :-1].log_softmax(-1)
        picked = logprobs.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
        expected = (picked * inputs["completion_mask"][:, 1:]).sum(1)
    torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-4)
    before = harness.weights(trainer.model)
    trainer.train()
    moved = {name for name, after in trainer.model.named_parameters() if not torch.equal(before[name], after)}
    assert moved == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    margins = harness.column(trainer, "rewards/margins")
    assert sum(margins[-4:]) > sum(margins[:4])


def moe_folder(tmp_path) -> str:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        router_aux_loss_coef=0.01,
        initializer_range=0.2,
    )
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    tiny.tokenizer().save_pretrained(tmp_path / "moe")
    return str(tmp_path / "moe")


@every_trainer
def test_mixture_of_experts(method, tmp_path):
    """The load-balancing loss is logged and added with its coefficient, as in `DPOTrainer`."""
    from trl import DPOConfig, DPOTrainer

    folder = moe_folder(tmp_path)
    with_aux = harness.trainer(method, folder, tmp_path / "with", router_aux_loss_coef=0.5)
    without = harness.trainer(method, folder, tmp_path / "without", router_aux_loss_coef=0.0)
    with_aux.train()
    without.train()
    aux = harness.column(with_aux, "aux_loss")
    assert len(aux) == 4 and min(aux) > 0.1 and not harness.column(without, "aux_loss")
    difference = harness.column(with_aux, "loss")[0] - harness.column(without, "loss")[0]
    assert difference == pytest.approx(0.5 * aux[0], rel=1e-5)
    dpo = DPOTrainer(
        model=folder,
        args=DPOConfig(**{**harness.defaults(tmp_path / "dpo"), "router_aux_loss_coef": 0.5}),
        train_dataset=tiny.dataset(),
    )
    dpo.train()
    assert aux[0] == pytest.approx(harness.column(dpo, "aux_loss")[0], rel=1e-6)
    if method.id == "fdpo":
        assert aux == pytest.approx(harness.column(dpo, "aux_loss"), rel=1e-5)
        assert harness.column(with_aux, "loss") == pytest.approx(harness.column(dpo, "loss"), rel=1e-5)


@every_trainer
def test_vision_language(method, tmp_path):
    """
    Pairs with images train a vision-language model, evaluate and predict; the images matter, and f-DPO's losses are
    `DPOTrainer`'s. Image tokens that `max_length` cuts are an error that names it.
    """
    from trl import DPOConfig, DPOTrainer

    folder, options = tiny.save_vision(tmp_path / "vision"), dict(max_length=None, max_steps=4)
    data, others = tiny.vision_dataset(), tiny.vision_dataset(seed=1)
    trainer = harness.trainer(
        method, folder, tmp_path / "own", train_dataset=data, eval_dataset=data.select(range(4)), **options
    )
    with torch.no_grad():
        trainer.model.eval()
        batches = [trainer.data_collator([rows[i] for i in range(4)]) for rows in (data, others)]
        first, second = (trainer.score_policy(trainer.model, inputs).log_probs.sum(1) for inputs in batches)
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"]) and not torch.allclose(first, second)
    before = harness.weights(trainer.model)
    trainer.train()
    after = harness.weights(trainer.model)
    assert any("vision" in name and not torch.equal(before[name], after[name]) for name in before)
    losses = harness.column(trainer, "loss")
    assert sum(losses[2:]) < sum(losses[:2])
    evaluated = trainer.evaluate()["eval_loss"]
    predicted = trainer.predict(data.select(range(4))).metrics
    assert predicted["test_loss"] == pytest.approx(evaluated, rel=1e-5) and "test_rewards/margins" in predicted
    if method.id == "fdpo":
        args = DPOConfig(**{**harness.defaults(tmp_path / "dpo"), **options})
        dpo = DPOTrainer(model=folder, args=args, train_dataset=data)
        dpo.train()
        assert losses == pytest.approx(harness.column(dpo, "loss"), rel=1e-5, abs=LOSS_NOISE)
    short = harness.trainer(method, folder, tmp_path / "short", train_dataset=data, max_length=3)
    with pytest.raises(
        ValueError, match="`max_length=3` is too short: it cuts image placeholders.*Raise `max_length`"
    ):
        short.train()


@every_reference_method
def test_sync_ref_model(method, tiny_folder, tmp_path):
    """Every two steps the reference becomes 0.6 of the policy and 0.4 of itself."""
    trainer = harness.trainer(
        method,
        tiny_folder,
        tmp_path,
        max_steps=2,
        sync_ref_model=True,
        ref_model_sync_steps=2,
        ref_model_mixup_alpha=0.6,
    )
    before = harness.weights(trainer.ref_model)
    trainer.train()
    policy, after = harness.weights(trainer.model), harness.weights(trainer.ref_model)
    expected = {name: 0.6 * policy[name] + 0.4 * before[name] for name in policy}
    assert harness.largest_difference(after, expected) < 1e-6
    assert harness.largest_difference(after, before) > 1e-4


@every_precomputing_method
def test_precomputed_reference(method, tiny_folder, tmp_path, monkeypatch):
    """
    Precomputed reference statistics are those of the reference's forward: same run, no reference kept. The same data
    at another `max_length` is computed anew, as far as it is cut there, instead of served stale, and the same run
    again is served. The evaluation set is a part of the training set, and of that nothing is computed twice.
    """
    tiny.dataset(16).save_to_disk(tmp_path / "data")
    data, calls = load_from_disk(tmp_path / "data"), []  # `datasets` caches nothing of what lives in memory
    compute = method.trainer.score_reference

    def counted(self, *args, **kwargs):
        calls.append(1)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(method.trainer, "score_reference", counted)

    def build(name, precompute, max_length, **options):
        return harness.trainer(
            method,
            tiny_folder,
            tmp_path / name,
            train_dataset=data,
            eval_dataset=data.select(range(8)),
            precompute_ref_log_probs=precompute,
            max_length=max_length,
            truncation_mode="keep_end",  # whose preparation does not depend on `max_length`
            ref_model=nearby(tiny_folder),
            **SMOOTH,
            **options,
        )

    computed = []
    for max_length in (1024, 24):
        calls.clear()
        precomputed = build(f"pre-{max_length}", True, max_length)
        computed.append(len(calls))
        plain = build(f"plain-{max_length}", False, max_length)
        rows = list(precomputed.train_dataset)
        precomputed.train()
        plain.train()
        assert precomputed.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4, abs=1e-6)
        for a, b in zip(harness.logs(precomputed), harness.logs(plain), strict=True):
            for key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=5e-5), key
        assert harness.largest_difference(harness.weights(precomputed.model), harness.weights(plain.model)) < 1e-6
    sides = [[len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for side in ("chosen", "rejected")] for row in rows]
    cut = sum(max(lengths) > 24 for lengths in sides)
    assert computed == [4, math.ceil(cut / 4)] and cut > 8
    calls.clear()
    build("again", True, 24, beta=0.2)
    assert calls == []


@every_precomputing_method
def test_precompute_keeps_no_reference(method, tiny_folder, tmp_path):
    """Without a `ref_model`, precomputing builds no second model, and training is that with one."""
    runs = []
    for name, precompute in (("pre", True), ("plain", False)):
        options = dict(precompute_ref_log_probs=precompute, eval_dataset=tiny.dataset(4, seed=1), **SMOOTH)
        trainer = harness.trainer(method, tiny_folder, tmp_path / name, **options)
        assert (trainer.ref_model is None) == precompute
        # The trainer's own data, reference values and all, is taken as it is.
        assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == trainer.evaluate()["eval_loss"]
        trainer.train()
        runs.append(harness.column(trainer, "loss"))
        after = trainer.evaluate()["eval_loss"]
        assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(after, rel=1e-6)
        if precompute:
            # The policy is no longer the reference: taking it for one would report log ratios of zero. What the cache
            # holds needs none.
            assert trainer.evaluate(tiny.dataset(4, seed=1))["eval_loss"] == pytest.approx(after, rel=1e-6)
            with pytest.raises(ValueError, match="test dataset cannot be computed after training has started.*4 of"):
                trainer.predict(tiny.dataset(4, seed=2))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4, abs=LOSS_NOISE)


@every_trainer
def test_dropout_is_off_by_default(method, tiny_folder, tmp_path):
    """`disable_dropout`, on by default, silences the adapter's dropout: forwards in train mode repeat bitwise."""
    for disable in (True, False):
        trainer = harness.trainer(
            method, tiny_folder, tmp_path, peft_config=lora(lora_dropout=0.5), disable_dropout=disable, max_steps=2
        )
        trainer.train()
        trainer.model.train()
        inputs = harness.batch(trainer)
        losses = {trainer.compute_loss(trainer.model, inputs).item() for _ in range(2)}
        assert len(losses) == (1 if disable else 2)


@pytest.mark.gpu
@every_trainer
def test_activation_offloading(method, tiny_folder, tmp_path):
    """Offloaded activations give the same losses. Needs a device to offload from."""
    runs = []
    for name, offload in (("on", True), ("off", False)):
        trainer = harness.trainer(method, tiny_folder, tmp_path / name, activation_offloading=offload, use_cpu=False)
        trainer.train()
        runs.append(harness.column(trainer, "loss"))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4, abs=LOSS_NOISE)
