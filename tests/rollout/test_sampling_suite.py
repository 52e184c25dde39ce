"""
What every method that samples promises, in numbers: the shared suite over `sampling.SAMPLING`.

What it shares with the suite of paired methods, and the tolerances, are in `joint.py`.
"""

import harness
import joint
import pytest
import sampling
import torch
from joint import SMOOTH, WEIGHT_NOISE, by_id, lora
from launching import fork, launch
from peft import IA3Config, get_peft_model
from sampling import PLAIN, PRIMARY, ROLLOUTS, SAMPLING
from transformers import TrainerCallback

from trl_ext.evaluation import PassAtKCallback, SamplingSettings, WinRateCallback


every_method = by_id(SAMPLING)
every_trainer = by_id(PRIMARY)
every_rollout = by_id(ROLLOUTS)
every_plain = by_id(PLAIN)


def builder(method, model, tmp_path, **common):
    """What the checks of `joint.py` build trainers with."""

    def build(name, **options):
        given = {"model": model, **common, **options}
        return sampling.trainer(method, given.pop("model"), tmp_path / name, **given)

    return build


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
    harness.assert_same_logs(harness.logs(ours), harness.logs(theirs), ignore={"num_tokens"})
    counts = harness.column(theirs, "num_tokens")
    assert counts[-1] == harness.column(ours, "num_tokens")[-1] and set(counts) <= set(
        harness.column(ours, "num_tokens")
    )


# ---- Models and data ------------------------------------------------------------------------------------------------


@every_method
def test_trains_full_from_id_and_from_instance(method, tiny_folder, tmp_path):
    joint.check_full(builder(method, tiny_folder, tmp_path), tiny_folder)


@every_rollout
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


@every_rollout
def test_a_trained_adapter_is_its_own_reference(method, tiny_folder, tmp_path):
    """TRL's frozen copy of an IA3 adapter has none of its factors, which stand in a dictionary of parameters."""
    model = get_peft_model(harness.load(tiny_folder), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    trained = sampling.trainer(method, model, tmp_path, max_steps=1)
    trained.train()
    assert all(abs(value) < 1e-6 for value in harness.column(trained, "kl"))
    weights = harness.weights(trained.model)
    copies = [name for name in weights if name.endswith(".ref")]
    assert copies or not trained.needs_reference
    for name in copies:
        assert weights[name].eq(1.5).all()


@every_method
def test_trains_lora(method, tiny_folder, tmp_path):
    joint.check_lora(sampling.trainer(method, tiny_folder, tmp_path, peft_config=lora()))


@every_trainer
def test_trains_qlora(method, tiny_folder, tmp_path):
    joint.check_qlora(builder(method, tiny_folder, tmp_path))


@every_rollout
def test_prompts_that_the_template_would_not_write_are_refused(method, tiny_folder, tmp_path):
    for message, told in (
        ({"role": "human", "content": "a"}, "role 'human'.*Rename it to 'user'"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, "content in parts"),
    ):
        prompts = sampling.prompts(conversational=True).map(lambda row, message=message: {"prompt": [message]})
        with pytest.raises(ValueError, match=told):
            sampling.trainer(method, tiny_folder, tmp_path, train_dataset=prompts)


@every_method
def test_conversational_and_plain_data_agree(method, tiny_folder, tmp_path):
    """Conversations are the same run as the text that the chat template makes of them."""
    chat = sampling.prompts(conversational=True)
    plain = chat.map(lambda row: {"text": f"<|user|>{row['prompt'][0]['content']}<|end|><|assistant|>"})
    plain = plain.remove_columns("prompt").rename_column("text", "prompt")
    variants = {"chat": dict(train_dataset=chat), "plain": dict(train_dataset=plain)}
    joint.check_same_logs(builder(method, tiny_folder, tmp_path), variants)


@every_method
def test_golden_trajectory(method, tiny_folder, tmp_path, request):
    options = {"max_steps": 8, "learning_rate": 3e-4, **method.golden}
    trained = sampling.trainer(method, tiny_folder, tmp_path, **options)
    sampling.fix_samples(trained)
    joint.check_golden(trained, method.id, method.keys, request.config.getoption("--regen-golden"))


@every_method
def test_same_seed_same_run(method, tiny_folder, tmp_path):
    more = {} if method in ROLLOUTS else {"disable_dropout": False}
    joint.check_same_seed(builder(method, tiny_folder, tmp_path, max_steps=2, **more), apart=1e-4)


# ---- Invariances ----------------------------------------------------------------------------------------------------


@every_method
def test_accumulation(method, tiny_folder, tmp_path):
    """One completion (or pair) a step accumulated over eight is eight a step: losses, rewards and weights."""
    build = builder(method, tiny_folder, tmp_path)

    def fixed(name, **options):
        trained = build(name, **options)
        sampling.fix_samples(trained)
        return trained

    one, eight = ({"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size} for size in (1, 8))
    kept = {"loss", "reward", "rewards/margins", "d2po/gold_reward"}
    joint.check_equal_runs(fixed, harness.load(tiny_folder), one, eight, kept.__contains__)


@every_method
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_gradient_checkpointing(method, reentrant, tiny_folder, tmp_path):
    """Recomputing activations changes nothing."""
    on = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    build = builder(method, tiny_folder, tmp_path, max_steps=2)
    joint.check_equal_runs(build, harness.load(tiny_folder), on, {}, lambda key: key in ("loss", "reward"))


# ---- Processes, interruption, resuming ------------------------------------------------------------------------------


def script(method, folder, output, **options) -> list[str]:
    return joint.script("run_sampling.py", method, folder, output, **options)


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
    (weights, one), (two_weights, both) = joint.result(tmp_path / "one"), joint.result(tmp_path / "two")
    assert (one["processes"], both["processes"]) == (1, 2)
    assert harness.largest_difference(weights, two_weights) < WEIGHT_NOISE
    names = {"loss", "reward", "rewards/reward/mean", "entropy", "num_tokens", *method.metrics}
    # TRL's means over tokens include the rows that only fill the last batch of an evaluation.
    names |= {f"eval_{name}" for name in names - {"loss", "entropy"}}
    assert [entry.keys() for entry in one["logs"]] == [entry.keys() for entry in both["logs"]]
    joint.assert_close_logs(one["logs"], both["logs"], names.__contains__)

    sampled = dict(two, evaluate=False, steps_per_generation=2, fixed=False)
    fork(*script(method, tiny_folder, tmp_path / "whole", **sampled))
    fork(*script(method, tiny_folder, tmp_path / "resumed", **dict(sampled, stop_at=3)))
    checkpoint = str(tmp_path / "resumed" / "checkpoint-3")
    fork(*script(method, tiny_folder, tmp_path / "resumed", **dict(sampled, resume=checkpoint)))
    joint.assert_bitwise(tmp_path / "whole", tmp_path / "resumed")


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
    bitwise the uninterrupted one. Dropout in the adapter makes the random state count.
    """
    if method not in ROLLOUTS and "num_iterations" in options:
        pytest.skip("an option of TRL's samplers")
    build = builder(
        method,
        tiny_folder,
        tmp_path,
        # An epoch has 4 steps, times `num_iterations`.
        train_dataset=sampling.prompts(8 if method in ROLLOUTS else 32),
        peft_config=lora(lora_dropout=0.3),
        max_steps=10,
        logging_steps=3,
        **({} if method in ROLLOUTS else {"disable_dropout": False}),
        **options,
    )
    joint.check_resume(build, step)


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


@every_rollout
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
    """And its window."""
    trained = sampling.trainer(method, tiny_folder, tmp_path, steps_per_generation=2, max_steps=3)
    joint.check_second_training(trained)
    if method in ROLLOUTS:
        assert trained._step == 3


@every_method
def test_resume_in_the_same_trainer(method, tiny_folder, tmp_path):
    options = dict(max_steps=7, logging_steps=4, steps_per_generation=2)
    joint.check_resume_in_the_same_trainer(builder(method, tiny_folder, tmp_path, **options), 3)


@every_method
def test_saving_and_evaluating_leave_no_trace(method, tiny_folder, tmp_path):
    build = builder(method, tiny_folder, tmp_path, logging_steps=3, max_steps=5, steps_per_generation=2)
    joint.check_no_trace(build, sampling.prompts(3, seed=1), every=1)


# ---- Evaluation -----------------------------------------------------------------------------------------------------


@every_rollout
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


@every_trainer
def test_evaluation_callbacks(method, tiny_folder, tmp_path):
    """
    The callbacks of the evaluation measure a method that samples as any other: pass@k and the win rate over the
    reference are logged and choose the best checkpoint, and training does not notice them.
    """

    def build(name, **options):
        return sampling.trainer(method, tiny_folder, tmp_path / name, max_steps=2, learning_rate=1e-2, **options)

    def right(prompts, completions, **columns):
        return [float(len(sampling.text_of(completion)) % 2) for completion in completions]

    plain = build("plain")
    plain.train()
    best = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, greater_is_better=True)
    best |= dict(load_best_model_at_end=True, metric_for_best_model="eval_pass@2")
    seen = build("seen", eval_dataset=sampling.prompts(4, seed=1), **best)
    settings = SamplingSettings(max_new_tokens=3)
    counted = dict(num_prompts=4, settings=settings)
    seen.add_callback(PassAtKCallback(right, seen, k=(1, 2), num_samples=4, **counted))
    reference = harness.load(tiny_folder) if seen.ref_model is None else None
    seen.add_callback(WinRateCallback(sampling.longer_wins, seen, reference=reference, **counted))
    kept = []
    seen.add_callback(Keep(seen, kept))
    seen.train()
    assert harness.largest_difference(harness.weights(plain.model), kept[-1]) == 0
    for name in ("eval_pass@1", "eval_pass@2", "eval_win_rate"):
        values, (low, high) = (
            harness.column(seen, name),
            (harness.column(seen, f"{name}/{e}") for e in ("low", "high")),
        )
        assert len(values) == 2 and all(0 <= a <= b <= c <= 1 for a, b, c in zip(low, values, high, strict=True))
    assert harness.column(seen, "eval_pass@1")[0] <= harness.column(seen, "eval_pass@2")[0]
    assert seen.state.best_metric == max(harness.column(seen, "eval_pass@2"))


class Keep(TrainerCallback):
    """Keeps the weights at each evaluation, as the best ones are loaded at the end."""

    def __init__(self, trainer, kept: list):
        self.trainer, self.kept = trainer, kept

    def on_evaluate(self, args, state, control, **kwargs):
        self.kept.append(harness.weights(self.trainer.model))


# ---- Cards ----------------------------------------------------------------------------------------------------------


@every_method
def test_card(method, tiny_folder, tmp_path):
    """
    The card names the method and what it learned from, its reward functions or its labeler, in the folder and in each
    checkpoint.
    """
    trained = sampling.trainer(method, tiny_folder, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trained.train()
    trained.save_model()
    told = ("reward functions", "rewards of its own completions", "completions per step")
    told = told if method in ROLLOUTS else ("decisive_reward", "pairs per step")
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        card = (folder / "README.md").read_text()
        assert f"**Method:** {method.trainer._name}" in card
        explained = "share of pairs in" in card  # metrics that a run does not have are not explained
        assert explained == ("| `rewards/accuracies` |" in card)
        assert all(fact in card for fact in told), [fact for fact in told if fact not in card]


# ---- Bad input ------------------------------------------------------------------------------------------------------


@every_rollout
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


@every_rollout
def test_split_groups_are_refused(method, tmp_path, monkeypatch):
    """With two processes of three completions each, a group of two would be split; TRL takes it silently."""
    monkeypatch.setattr(method.config, "world_size", 2)
    with pytest.raises(ValueError, match=r"`num_generations=2` does not divide the 3 completions"):
        method.config(**sampling.options_of(method, tmp_path, per_device_train_batch_size=3, num_generations=2))
    args = method.config(**sampling.options_of(method, tmp_path, per_device_train_batch_size=4, num_generations=2))
    assert args.generation_batch_size == 8


@every_rollout
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


@every_rollout
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


@every_rollout
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
