"""
What every method that samples promises, in numbers: the shared suite over `sampling.SAMPLING`.

"Bitwise" means equality. Where the order of fp32 sums differs (accumulation, processes), losses must agree to 2e-6 and
weights to 1e-6, with `adam_epsilon=1e-3` above the noise of gradients; see `tests/test_method_suite.py`.
"""

import json
from pathlib import Path

import harness
import pytest
import sampling
import torch
from launching import fork, launch
from peft import LoraConfig
from safetensors.torch import load_file
from sampling import PLAIN, PRIMARY, SAMPLING
from transformers import BitsAndBytesConfig


TESTS = Path(__file__).resolve().parent.parent
SMOOTH = dict(adam_epsilon=1e-3)
LOSS_NOISE, WEIGHT_NOISE = 2e-6, 1e-6

every_method = pytest.mark.parametrize("method", SAMPLING, ids=lambda method: method.id)
every_trainer = pytest.mark.parametrize("method", PRIMARY, ids=lambda method: method.id)
every_plain = pytest.mark.parametrize("method", PLAIN, ids=lambda method: method.id)


def lora(**kwargs):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", **kwargs})


# ---- The parent -----------------------------------------------------------------------------------------------------


@every_plain
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_the_base_is_trls_trainer(method, num_iterations, tiny_folder, tmp_path):
    """
    Over three epochs, with a generation window of two steps, the base alone is TRL's trainer bit for bit: prompts in
    the same order, the same samples, weights and logs.
    """
    options = dict(max_steps=12, steps_per_generation=2, num_iterations=num_iterations, logging_steps=3)
    data = sampling.prompts(8)
    ours = sampling.trainer(method, tiny_folder, tmp_path / "ours", train_dataset=data, **options)
    ours.train()
    config = _parents_config(method)
    theirs = method.parent(
        model=tiny_folder,
        reward_funcs=sampling.reward,
        args=config(**sampling.options_of(method, tmp_path / "trl", **options)),
        train_dataset=data,
    )
    theirs.train()
    assert harness.largest_difference(harness.weights(ours.model), harness.weights(theirs.model)) == 0
    assert ours.state.epoch == 12 / (4 * num_iterations)
    # TRL leaves the count of tokens out where it generated nothing since the last log.
    harness.assert_same_logs(sampling.logs(ours), sampling.logs(theirs), ignore={"num_tokens"})
    counts = harness.column(theirs, "num_tokens")
    assert counts[-1] == harness.column(ours, "num_tokens")[-1] and set(counts) <= set(
        harness.column(ours, "num_tokens")
    )


# ---- Models and data ------------------------------------------------------------------------------------------------


@every_method
def test_trains_full_from_id_and_from_instance(method, tiny_folder, tmp_path):
    """A string and an instance give bitwise the same run, every weight moves, and the reference stays where it was."""
    runs = []
    for name, model in (("id", tiny_folder), ("instance", harness.load(tiny_folder))):
        trained = sampling.trainer(method, model, tmp_path / name)
        trained.train()
        runs.append((harness.weights(trained.model), sampling.logs(trained)))
        if trained.ref_model is not None:
            initial = harness.weights(harness.load(tiny_folder))
            assert harness.largest_difference(harness.weights(trained.ref_model), initial) == 0
    assert harness.largest_difference(runs[0][0], runs[1][0]) == 0
    harness.assert_same_logs(runs[0][1], runs[1][1])
    for name, before in harness.load(tiny_folder).named_parameters():
        assert not torch.equal(before, runs[0][0][name]), name


@every_method
def test_a_changed_instance_is_its_own_reference(method, tiny_folder, tmp_path):
    """A model that was changed in memory is the start, and so is its reference: TRL would load the file's."""
    model = harness.load(tiny_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    trained = sampling.trainer(method, model, tmp_path, max_steps=1)
    if trained.ref_model is not None:
        assert harness.largest_difference(harness.weights(trained.ref_model), harness.weights(model)) == 0
    trained.train()
    assert all(abs(value) < 1e-6 for value in harness.column(trained, "kl"))


@every_method
def test_trains_lora(method, tiny_folder, tmp_path):
    """With LoRA the base is bitwise frozen, every adapter weight moves, and no second model is kept."""
    trained = sampling.trainer(method, tiny_folder, tmp_path, peft_config=lora())
    before = harness.weights(trained.model)
    assert trained.ref_model is None
    trained.train()
    for name, after in trained.model.named_parameters():
        assert torch.equal(before[name], after) == ("lora_" not in name), name


@every_trainer
def test_trains_qlora(method, tiny_folder, tmp_path):
    """4-bit NF4 with LoRA: linear layers are quantized and frozen, adapters move, losses are finite."""
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    trained = sampling.trainer(
        method,
        tiny_folder,
        tmp_path,
        peft_config=lora(),
        quantization_config=quantization,
        learning_rate=5e-3,
    )
    before = harness.weights(trained.model)
    assert len([name for name, weight in before.items() if weight.dtype == torch.uint8]) == 2 * 7
    trained.train()
    moved = {name for name, after in trained.model.named_parameters() if not torch.equal(before[name], after)}
    assert moved == {name for name in before if "lora_" in name}
    assert all(torch.isfinite(torch.tensor(harness.column(trained, "loss"))))


@every_method
def test_conversational_and_plain_data_agree(method, tiny_folder, tmp_path):
    """Conversations are the same run as the text that the chat template makes of them."""
    chat = sampling.prompts(conversational=True)
    plain = chat.map(lambda row: {"text": f"<|user|>{row['prompt'][0]['content']}<|end|><|assistant|>"})
    plain = plain.remove_columns("prompt").rename_column("text", "prompt")
    runs = []
    for name, data in (("chat", chat), ("plain", plain)):
        trained = sampling.trainer(method, tiny_folder, tmp_path / name, train_dataset=data)
        trained.train()
        runs.append(sampling.logs(trained))
    harness.assert_same_logs(*runs)


@every_method
def test_golden_trajectory(method, tiny_folder, tmp_path, request):
    """Eight steps on fixed completions give the values of `golden/<id>.json`, to 1e-4."""
    trained = sampling.trainer(method, tiny_folder, tmp_path, max_steps=8, learning_rate=3e-4)
    sampling.fix_samples(trained)
    trained.train()
    keys = ("loss", "reward", "entropy", "grad_norm", *method.metrics)
    values = {key: harness.column(trained, key) for key in keys}
    path = TESTS / "golden" / f"{method.id}.json"
    if request.config.getoption("--regen-golden"):
        harness.write_json(path, values)
    golden = json.loads(path.read_text())
    assert golden.keys() == values.keys()
    for key, expected in golden.items():
        assert len(expected) == 8
        assert values[key] == pytest.approx(expected, rel=1e-4, abs=1e-6), key


@every_method
def test_same_seed_same_run(method, tiny_folder, tmp_path):
    """Twice the same seed, with dropout in the adapter: logs and weights bitwise equal. Another seed differs."""
    runs = []
    for seed in (3, 3, 4):
        trained = sampling.trainer(
            method, tiny_folder, tmp_path / str(len(runs)), peft_config=lora(lora_dropout=0.3), seed=seed, max_steps=2
        )
        trained.train()
        runs.append((harness.weights(trained.model), sampling.logs(trained)))
    assert harness.largest_difference(runs[0][0], runs[1][0]) == 0
    harness.assert_same_logs(runs[0][1], runs[1][1])
    assert harness.largest_difference(runs[0][0], runs[2][0]) > 1e-4


# ---- Invariances ----------------------------------------------------------------------------------------------------


@every_method
def test_accumulation(method, tiny_folder, tmp_path):
    """One completion a step accumulated over eight is eight completions a step: losses and weights."""
    runs = []
    for name, size in (("first", 1), ("second", 8)):
        trained = sampling.trainer(
            method,
            tiny_folder,
            tmp_path / name,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            **SMOOTH,
        )
        sampling.fix_samples(trained)
        trained.train()
        runs.append(
            (harness.weights(trained.model), harness.column(trained, "loss"), harness.column(trained, "reward"))
        )
    moved = harness.largest_difference(runs[0][0], harness.weights(harness.load(tiny_folder)))
    difference = harness.largest_difference(runs[0][0], runs[1][0])
    assert moved > 1e-4 and difference < WEIGHT_NOISE, (moved, difference)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-4, abs=LOSS_NOISE)
    assert runs[0][2] == runs[1][2]


@every_method
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_gradient_checkpointing(method, reentrant, tiny_folder, tmp_path):
    """Recomputing activations changes nothing."""
    runs = []
    for name, options in (
        ("on", dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})),
        ("off", {}),
    ):
        trained = sampling.trainer(method, tiny_folder, tmp_path / name, max_steps=2, **SMOOTH, **options)
        trained.train()
        runs.append(harness.weights(trained.model))
    assert harness.largest_difference(*runs) < WEIGHT_NOISE


# ---- Processes, interruption, resuming ------------------------------------------------------------------------------


def script(method, folder, output, **options) -> list[str]:
    """The command line of `scripts/run_sampling.py`."""
    output.mkdir(parents=True, exist_ok=True)
    return [str(TESTS / "scripts" / "run_sampling.py"), method.id, folder, str(output), json.dumps(options)]


def result(folder) -> tuple[dict, dict]:
    return load_file(folder / "weights.safetensors"), json.loads((folder / "result.json").read_text())


@every_trainer
def test_two_processes(method, tiny_folder, tmp_path):
    """
    Two processes on one global batch are one process on it: weights, losses, rewards, the evaluation, whose last batch
    is not full. Stopped inside a generation window and resumed, two processes are bitwise what they are uninterrupted.
    """
    options = dict(SMOOTH, max_steps=5, logging_steps=3, evaluate=True)
    two = dict(options, per_device_train_batch_size=4, per_device_eval_batch_size=4)
    run = launch if method is PRIMARY[0] else fork
    run(*script(method, tiny_folder, tmp_path / "two", **two))
    fork(*script(method, tiny_folder, tmp_path / "one", **options), processes=1)
    (weights, one), (two_weights, both) = result(tmp_path / "one"), result(tmp_path / "two")
    assert (one["processes"], both["processes"]) == (1, 2)
    assert harness.largest_difference(weights, two_weights) < WEIGHT_NOISE
    names = ("loss", "reward", "rewards/reward/mean", "entropy", "num_tokens", *method.metrics)
    for entry, other in zip(one["logs"], both["logs"], strict=True):
        assert entry.keys() == other.keys()
        for key in entry:
            # TRL's means over tokens include the rows that only fill the last batch of an evaluation.
            if key.removeprefix("eval_") in names and key not in ("eval_loss", "eval_entropy"):
                assert entry[key] == pytest.approx(other[key], rel=1e-4, abs=LOSS_NOISE), key

    sampled = dict(two, evaluate=False, steps_per_generation=2, fixed=False)
    fork(*script(method, tiny_folder, tmp_path / "whole", **sampled))
    fork(*script(method, tiny_folder, tmp_path / "resumed", **dict(sampled, stop_at=3)))
    checkpoint = str(tmp_path / "resumed" / "checkpoint-3")
    fork(*script(method, tiny_folder, tmp_path / "resumed", **dict(sampled, resume=checkpoint)))
    (whole_weights, whole), (resumed_weights, resumed) = result(tmp_path / "whole"), result(tmp_path / "resumed")
    assert harness.largest_difference(whole_weights, resumed_weights) == 0
    harness.assert_same_logs(whole["logs"], resumed["logs"])


@every_method
@pytest.mark.parametrize(
    "step, options",
    [
        (5, {}),
        (3, dict(steps_per_generation=2)),
        (9, dict(steps_per_generation=2, num_iterations=2)),
        (8, dict(steps_per_generation=2)),
        (6, dict(gradient_accumulation_steps=2, steps_per_generation=4)),
    ],
    ids=["second-epoch", "inside-a-window", "inside-a-window-of-the-second-epoch", "epoch-end", "accumulated"],
)
def test_resume_is_bitwise(method, step, options, tiny_folder, tmp_path):
    """
    Stopped inside a generation window, at the end of an epoch or after it, and resumed by a new trainer, a run is
    bitwise the uninterrupted one: weights and every logged value. Dropout in the adapter makes the random state count.
    """

    def build(name, **more):
        return sampling.trainer(
            method,
            tiny_folder,
            tmp_path / name,
            train_dataset=sampling.prompts(8),  # an epoch has 4 steps, times `num_iterations`
            peft_config=lora(lora_dropout=0.3),
            max_steps=10,
            logging_steps=3,
            **options,
            **more,
        )

    whole = build("whole")
    summary = whole.train()
    build("stopped", callbacks=[harness.StopAt(step)]).train()
    resumed = build("stopped")
    resumed_summary = resumed.train(resume_from_checkpoint=True)
    assert harness.largest_difference(harness.weights(whole.model), harness.weights(resumed.model)) == 0
    harness.assert_same_logs(sampling.logs(whole), sampling.logs(resumed))
    assert resumed_summary.training_loss == summary.training_loss


@every_plain
@pytest.mark.parametrize(
    "step, options", [(5, {}), (3, dict(steps_per_generation=2))], ids=["second-epoch", "inside-a-window"]
)
def test_trls_own_trainer_does_not_resume(method, step, options, tiny_folder, tmp_path):
    """Negative control: TRL's trainer, resumed in the second epoch or inside a window, is another run."""

    def build(name, callbacks=None):
        return method.parent(
            model=tiny_folder,
            reward_funcs=sampling.reward,
            args=_parents_config(method)(**sampling.options_of(method, tmp_path / name, max_steps=8, **options)),
            train_dataset=sampling.prompts(8),
            callbacks=callbacks,
        )

    whole, resumed = build("whole"), build("stopped")
    whole.train()
    build("stopped", [harness.StopAt(step)]).train()
    resumed.train(resume_from_checkpoint=True)
    assert harness.largest_difference(harness.weights(whole.model), harness.weights(resumed.model)) > 1e-5


@every_method
def test_resume_with_other_settings(method, tiny_folder, tmp_path):
    """A window means nothing under other settings, and a checkpoint of another trainer has none."""
    options = dict(steps_per_generation=2, max_steps=4)
    sampling.trainer(method, tiny_folder, tmp_path, callbacks=[harness.StopAt(3)], **options).train()
    other = sampling.trainer(method, tiny_folder, tmp_path, steps_per_generation=1, max_steps=4)
    with pytest.raises(ValueError, match=r"`steps_per_generation=1`.*had 2"):
        other.train(resume_from_checkpoint=True)
    file = tmp_path / "checkpoint-3" / "rollout-00000-of-00001.pt"
    file.rename(file.with_name("rollout-00000-of-00002.pt"))
    again = sampling.trainer(method, tiny_folder, tmp_path, **options)
    with pytest.raises(ValueError, match=r"written by 2 processes, and this run has 1"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    file.with_name("rollout-00000-of-00002.pt").unlink()
    with pytest.raises(ValueError, match=r"no `rollout-00000-of-00001.pt`"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@every_method
def test_a_second_training_counts_afresh(method, tiny_folder, tmp_path):
    """`train()` again on the same trainer starts its counters and its window anew."""
    trained = sampling.trainer(method, tiny_folder, tmp_path, steps_per_generation=2, max_steps=3)
    trained.train()
    first = harness.column(trained, "num_tokens")
    steps = trained._step
    trained.train()
    assert trained._step == steps == 3 and len(harness.column(trained, "num_tokens")) == len(first)
    assert harness.column(trained, "num_tokens")[0] < 2 * first[0]


@every_method
def test_resume_in_the_same_trainer(method, tiny_folder, tmp_path):
    """Resuming with the trainer that was interrupted, as in a notebook, does not count its last window twice."""
    options = dict(max_steps=7, logging_steps=4, steps_per_generation=2)
    whole = sampling.trainer(method, tiny_folder, tmp_path / "whole", **options)
    whole.train()
    stopped = sampling.trainer(method, tiny_folder, tmp_path / "same", callbacks=[harness.StopAt(3)], **options)
    stopped.train()
    stopped.train(resume_from_checkpoint=True)
    harness.assert_same_logs(sampling.logs(whole), sampling.logs(stopped))


@every_method
def test_saving_and_evaluating_leave_no_trace(method, tiny_folder, tmp_path):
    """Checkpoints and evaluations, which sample, change neither the run nor what it logs."""
    options = dict(logging_steps=3, max_steps=5, steps_per_generation=2)
    plain = sampling.trainer(method, tiny_folder, tmp_path / "plain", **options)
    plain.train()  # sampling draws from the random state, which a constructor seeds
    busy = sampling.trainer(
        method,
        tiny_folder,
        tmp_path / "busy",
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=sampling.prompts(3, seed=1),
        **options,
    )
    busy.train()
    training = [entry for entry in sampling.logs(busy) if not any(key.startswith("eval_") for key in entry)]
    assert len(training) < len(sampling.logs(busy))
    harness.assert_same_logs(sampling.logs(plain)[:-1], training[:-1])
    assert harness.largest_difference(harness.weights(plain.model), harness.weights(busy.model)) == 0


# ---- Evaluation -----------------------------------------------------------------------------------------------------


@every_method
def test_evaluation_is_over_samples(method, tiny_folder, tmp_path):
    """
    Rewards of an evaluation are means over all samples, where its last batch is smaller and where a reward is missing;
    two evaluations of one model are equal, under the prefix of their set.
    """
    seen = []

    def some(prompts, completions, **columns):
        values = sampling.reward(prompts, completions)
        values = [None if int(value * 97) % 4 == 0 else value for value in values]
        seen.extend(values)
        return values

    trained = sampling.trainer(
        method, tiny_folder, tmp_path, eval_dataset=sampling.prompts(3, seed=1), reward_funcs=some
    )
    first, second = trained.evaluate(), trained.evaluate(metric_key_prefix="eval_again")
    values = torch.tensor([value for value in seen[: len(seen) // 2] if value is not None])
    assert len(seen) == 2 * 3 * 4
    assert first["eval_rewards/some/mean"] == pytest.approx(values.mean().item(), rel=1e-5)
    assert first["eval_rewards/some/std"] == pytest.approx(values.std().item(), rel=1e-4)
    if trained.reward_func_names == ["some"]:  # a method may add a reward of its own
        assert first["eval_rewards/some/mean"] == first["eval_reward"]
        assert first["eval_rewards/some/std"] == first["eval_reward_std"]
    assert second["eval_again_reward"] == first["eval_reward"]
    assert second["eval_again_entropy"] == first["eval_entropy"]


# ---- Cards ----------------------------------------------------------------------------------------------------------


@every_method
def test_card(method, tiny_folder, tmp_path):
    """The card names the method, its prompts and its reward functions, in the folder and in each checkpoint."""
    trained = sampling.trainer(method, tiny_folder, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trained.train()
    trained.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        card = (folder / "README.md").read_text()
        assert f"**Method:** {method.trainer._name}" in card and "reward functions" in card
        assert "rewards of its own completions" in card and "completions per step" in card


# ---- Bad input ------------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize(
    "options, told",
    [
        (dict(num_generations=3), "num_generations"),
        (dict(num_generations=1), "`num_generations` must be"),
        (dict(temperature=0.0), "`temperature` must be"),
        (dict(top_p=1.5), "`top_p` must be"),
        (dict(max_completion_length=0), "`max_completion_length` must be"),
        (dict(max_completion_length="6"), "`max_completion_length` must be"),
        (dict(train_sampling_strategy="sequential"), "`train_sampling_strategy='sequential'`.*shuffle_dataset"),
        (dict(ignore_data_skip=True), "`ignore_data_skip=True`"),
        (dict(vllm_mode="server"), "`vllm_mode='server'` has no effect unless `use_vllm=True`"),
        (dict(steps_per_generation=2, generation_batch_size=8), "`generation_batch_size=8` contradicts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(method, options, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        method.config(**sampling.options_of(method, tmp_path, **options))


@every_method
def test_split_groups_are_refused(method, tmp_path, monkeypatch):
    """With two processes of three completions each, a group of two would be split; TRL takes it silently."""
    monkeypatch.setattr(method.config, "world_size", 2)
    with pytest.raises(ValueError, match=r"`num_generations=2` does not divide the 3 completions"):
        method.config(**sampling.options_of(method, tmp_path, per_device_train_batch_size=3, num_generations=2))
    args = method.config(**sampling.options_of(method, tmp_path, per_device_train_batch_size=4, num_generations=2))
    assert args.generation_batch_size == 8


@every_method
@pytest.mark.parametrize(
    "rows, told",
    [
        ([], "train dataset is empty"),
        ([{"question": "a"}] * 4, "no column `prompt`.*question"),
        ([{"prompt": 3}] * 4, "`prompt` of the train dataset's first row is 3"),
        ([{"prompt": "a"}], "1 prompts, and 2 are generated"),
    ],
    ids=["empty", "no-prompt", "wrong-type", "too-few"],
)
def test_bad_data(method, rows, told, tiny_folder, tmp_path):
    from datasets import Dataset

    with pytest.raises(ValueError, match=told):
        sampling.trainer(method, tiny_folder, tmp_path, train_dataset=Dataset.from_list(rows))


@every_method
def test_bad_arguments(method, tiny_folder, tmp_path):
    with pytest.raises(TypeError, match=f"must be a `{method.config.__name__}`, got a `{method.parent.__name__[:4]}"):
        method.trainer(
            model=tiny_folder,
            reward_funcs=sampling.reward,
            args=_parents_config(method)(str(tmp_path), use_cpu=True, bf16=False),
            train_dataset=sampling.prompts(),
        )
    with pytest.raises(TypeError, match="train dataset must be a `datasets.Dataset`.*`list`"):
        sampling.trainer(method, tiny_folder, tmp_path, train_dataset=[{"prompt": "a"}] * 8)
    with pytest.raises(ValueError, match="`per_device_eval_batch_size=6` must be a multiple of the 4"):
        sampling.trainer(method, tiny_folder, tmp_path, eval_dataset=sampling.prompts(2), per_device_eval_batch_size=6)


@every_method
def test_a_reference_that_is_not_the_start_is_refused(method, tiny_folder, tmp_path):
    """By its LoRA configuration; and, where it shows only in numbers, on the first batch."""
    options = {"beta": 0.1}
    with pytest.raises(ValueError, match="`init_lora_weights='pissa'`"):
        sampling.trainer(method, tiny_folder, tmp_path, peft_config=lora(init_lora_weights="pissa"), **options)
    trained = sampling.trainer(method, tiny_folder, tmp_path, **options)
    with torch.no_grad():
        trained.ref_model.lm_head.weight.mul_(1.5)
    with pytest.raises(ValueError, match="KL between the policy and its reference is .* on the first batch"):
        trained.train()


def _parents_config(method):
    return next(c for c in method.config.__mro__ if c.__module__.startswith("trl.") and "Base" not in c.__name__)
