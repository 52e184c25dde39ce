"""Score as Action's trainer: its gradient, windows, evaluation, resumed runs, and what a bad reward does."""

import json
import sys
from pathlib import Path

import joint
import pytest
import tiny_pipelines
import torch
from diffusion_harness import trained
from killing import DieAt, die_in_a_checkpoint, killed
from launching import fork
from peft import LoraConfig
from reward_harness import brightness, comparable, prompts, trainer
from safetensors.torch import load_file

from trl_ext.diffusion.prompt_data import PromptDataset, WindowSampler, collate_prompts
from trl_ext.diffusion.rollouts import rollout_step_loss
from trl_ext.losses import reward_advantages, surrogate_reward
from trl_ext.training.seeds import derive_seed


TESTS = Path(__file__).resolve().parents[1]


def logs(run, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


# ---- The step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_pipelines.FAMILIES)
def test_trains_every_family(name, tmp_path):
    """Before the first step KL and log-ratios are exactly 0; afterward the policy has moved, and so has its KL."""
    run = trainer(name, tmp_path)
    before = trained(run)
    run.train()
    first, second = run.state.log_history[:2]
    assert first["kl"] == first["policy_kl"] == first["loss"] == 0 and second["kl"] > 0
    assert second["loss"] == pytest.approx(0.01 * second["policy_kl"], rel=1e-4)  # the ratio is 1: what is left is KL
    assert first["log_ratio/max"] == second["log_ratio/max"] == 0
    assert any(not torch.equal(before[key], value) for key, value in trained(run).items())
    assert sum(first[f"kl/quarter{i}"] for i in (1, 2, 3)) == first["kl"]


def catch_gradient(run):
    """Notes the gradient before the optimizer's first step, which is not made."""
    from transformers import TrainerCallback

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            run.seen = {n: p.grad.clone() for n, p in run.policy.named_parameters() if p.grad is not None}

    run.add_callback(Catch())
    return run


def moved(run):
    """A policy that is no longer the reference, so that KL matters."""
    run._start_is_unchecked = False
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in run.policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return run


ONE_STEP = dict(max_steps=1, num_generations=4, beta=0.5, max_grad_norm=1e9)


def test_gradient_is_the_estimator_over_the_whole_window(tmp_path):
    """
    What the optimizer gets is the gradient of `-(advantage log p) + beta KL`, summed over the sampler's steps, with
    advantages of the whole groups. `test_rollouts` and the losses' tests hold this estimator to finite differences of
    the objective, which KL in the loss alone fails.
    """
    run = moved(catch_gradient(trainer("sd", tmp_path / "whole", per_device_train_batch_size=8, **ONE_STEP)))
    run.train()
    whole = run.seen

    # The same chains, from their keys; rewards of the same images; the estimator as the losses' tests have it.
    run = moved(trainer("sd", tmp_path / "by hand", per_device_train_batch_size=8, **ONE_STEP))
    sampler = run._get_train_sampler()
    batch = collate_prompts([run.train_dataset[i] for i in sampler][:8])
    keys = [("train", 0, 0, r, g) for r, g in zip(batch["row"].tolist(), batch["generation"].tolist(), strict=True)]
    assert len(set(keys)) == 8 and len(set(batch["row"].tolist())) == 2
    rollout = run.sample_chains(run.policy, batch["prompt"], keys)
    rewards, _ = run.rewards(batch["prompt"], run.decode(rollout.images))
    run.reference_rewards.measure_spread(4)

    def gradient(**given) -> dict[str, torch.Tensor]:
        spread = run.reference_rewards.spread
        arguments = dict(beta=0.5, num_generations=4, reward_scale=spread, **given)
        advantages = reward_advantages(rewards, rollout.kls, **arguments).float()
        run.policy.zero_grad()
        for step in range(3):
            part = rollout_step_loss(run.policy, run.sampler, rollout, step, advantages[:, step], beta=0.5)
            part.loss.mean().backward()
        return {n: p.grad.clone() for n, p in run.policy.named_parameters() if p.grad is not None}

    expected, naive = gradient(), gradient(kl_in_return=False)
    size = torch.cat([value.flatten() for value in expected.values()]).norm()
    difference = torch.cat([(whole[name] - value).flatten() for name, value in expected.items()]).norm()
    assert difference < 1e-3 * size
    assert torch.cat([(naive[n] - value).flatten() for n, value in expected.items()]).norm() > 1e-2 * size


def test_split_into_micro_batches_changes_rounding_only(tmp_path):
    """Loss, logged values and gradient of a step on 8 images, and on 4 times 2."""
    runs = []
    for batch in (8, 2):
        split = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch)
        runs.append(moved(catch_gradient(trainer("sd", tmp_path / str(batch), **split, **ONE_STEP))))
        runs[-1].train()
    whole, split = (torch.cat([value.flatten() for value in run.seen.values()]) for run in runs)
    assert (whole - split).norm() < 1e-3 * whole.norm()
    entries = [run.state.log_history[0] for run in runs]
    for name in ("loss", "reward", "kl", "policy_kl"):
        assert entries[1][name] == pytest.approx(entries[0][name], rel=1e-3), name


def test_published_variants_are_settings(tmp_path):
    """DDPO has no KL in the gradient, Flow-GRPO none in the return: three gradients from the same images."""
    seen = []
    for i, given in enumerate((dict(), dict(kl_in_return=False), dict(beta=0.0), dict(reward_scale="group"))):
        given = {**ONE_STEP, **given}
        run = moved(catch_gradient(trainer("sd", tmp_path / str(i), per_device_train_batch_size=4, **given)))
        run.train()
        seen.append(torch.cat([value.flatten() for value in run.seen.values()]))
    for i, one in enumerate(seen):
        assert all((one - other).norm() > 1e-2 * one.norm() for other in seen[:i])


def test_some_steps_have_the_weight_of_all(tmp_path):
    """A share of the sampler's steps, evenly spread; each is as likely as any other, and the loss is weighted."""
    run = trainer("sd", tmp_path, num_inference_steps=9, timestep_fraction=0.5, max_steps=1)
    counts = torch.zeros(8)
    for step in range(200):
        run.state.global_step = step
        chosen = run.chosen_steps()
        assert len(chosen) == 4 and all(b - a in (1, 2, 3) for a, b in zip(chosen, chosen[1:], strict=False))
        counts[chosen] += 1
    assert (counts > 60).all() and counts.sum() == 800


def test_several_iterations_on_the_same_images(tmp_path):
    """
    The second optimizer step trains on the images of the first, with a ratio that has moved from 1; the third samples.
    """
    run = trainer("sd", tmp_path, num_iterations=2, epsilon=1e-9, max_steps=4)
    run.train()
    assert logs(run, "log_ratio/max")[0] == logs(run, "log_ratio/max")[2] == 0
    assert logs(run, "clip_ratio")[0] == logs(run, "clip_ratio")[2] == 0
    assert 0 < logs(run, "clip_ratio")[1] <= 1 and logs(run, "log_ratio/max")[1] != 0
    assert [("reward" in entry) for entry in run.state.log_history[:4]] == [True, False, True, False]


# ---- Rewards --------------------------------------------------------------------------------------------------------


def test_columns_and_several_functions(tmp_path):
    """Functions get the columns that they name; the sum is weighted; None is no opinion, and its share is logged."""

    def close_to(images, target):
        return [-abs(value - wanted) for value, wanted in zip(brightness(images), target, strict=True)]

    def sometimes(prompts, images):
        return [None if "thin" in prompt else value for prompt, value in zip(prompts, brightness(images), strict=True)]

    data = prompts(4, target=[0.1, 0.5, 0.7, 0.9])
    run = trainer(
        "sd",
        tmp_path,
        reward_funcs=[close_to, sometimes],
        reward_weights=[2.0, 1.0],
        train_dataset=data,
        per_device_train_batch_size=8,
        max_steps=1,
    )
    run.train()
    entry = run.state.log_history[0]
    assert {"rewards/close_to/mean", "rewards/sometimes/mean"} <= entry.keys() and entry["rewards/no_opinion"] == 0
    with pytest.raises(ValueError, match="`close_to` needs .'target'."):
        trainer("sd", tmp_path, reward_funcs=close_to)
    with pytest.raises(ValueError, match="`reward_weights` has 2 numbers for 1"):
        trainer("sd", tmp_path, reward_weights=[1.0, 2.0])


def test_a_group_without_opinion_is_left_out(tmp_path):
    def sometimes(prompts, images):
        return [None if "thin" in p else value for p, value in zip(prompts, brightness(images), strict=True)]

    run = trainer("sd", tmp_path, reward_funcs=sometimes, per_device_train_batch_size=8, max_steps=1)
    run.train()
    assert run.state.log_history[0]["rewards/no_opinion"] == pytest.approx(0.25)


BAD_REWARDS = {
    "constant": (lambda images: [0.5] * len(images), ValueError, "do not tell the reference's images apart"),
    "of the prompt": (lambda prompts, images: [float(len(p)) for p in prompts], ValueError, "tell the reference's"),
    "none": (lambda images: [None] * len(images), ValueError, "do not tell the reference's images apart"),
    "nan": (lambda images: [float("nan")] * len(images), ValueError, "returned nan for an image of the prompt"),
    "scalar": (lambda images: 1.0, TypeError, "returned a `float`"),
    "too few": (lambda images: [1.0], ValueError, "returned 1 rewards for 2 images"),
}


@pytest.mark.parametrize("kind", BAD_REWARDS)
def test_bad_rewards_stop_the_run(kind, tmp_path):
    function, error, message = BAD_REWARDS[kind]
    run = trainer("sd", tmp_path, reward_funcs=function)
    with pytest.raises(error, match=message):
        run.train()
    assert run.state.global_step == 0


def test_a_step_without_any_opinion_stops_the_run(tmp_path):
    calls = []

    def silent(images):
        calls.append(len(images))
        return brightness(images) if len(calls) <= 2 else [None] * len(images)  # two prompts of the reference

    with pytest.raises(ValueError, match="returned None for every image of step 1"):
        trainer("sd", tmp_path, reward_funcs=silent, num_reference_images=4).train()


def test_spread_is_measured_once_and_divides(tmp_path):
    """Rewards in other units, beta in units of the reference's spread: the same run. The measure is on the card."""
    runs = []
    for name, factor in (("one", 1.0), ("other", 1000.0)):

        def scaled(images, factor=factor):
            return [factor * value + 3 for value in brightness(images)]

        run = trainer("sd", tmp_path / name, reward_funcs=scaled, beta=0.5)
        run.train()
        runs.append(run)
    one, other = (run._progress.estimates["reward_spread"] for run in runs)
    assert other == pytest.approx(1000 * one, rel=1e-6) and one > 0
    for key, value in trained(runs[0]).items():
        assert torch.allclose(value, trained(runs[1])[key], atol=1e-4)
    facts = runs[0].card_facts()
    assert facts.hyperparameters["spread of the reference's rewards"]


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "pearson"])
def test_other_divergences_transform_the_rewards(divergence, tmp_path):
    """
    Each prompt's rewards become the surrogate's, by the rewards of the reference's images of that prompt, which are
    measured once and go into checkpoints; other prompts' rewards do not enter.
    """
    given = dict(divergence=divergence, reference_images_per_prompt=3, beta=0.5, max_steps=1, save_strategy="steps")
    run = trainer("sd", tmp_path, **given)
    run.train()
    measured = run.reference_rewards.by_row
    assert all(len(rewards) == 3 for rewards in measured.values()) and len(measured) >= 2
    assert {"divergence/normalizer", "divergence/capped"} <= run.state.log_history[0].keys()
    rows, spread = list(measured)[:2], run.reference_rewards.spread
    rewards = torch.tensor([0.3, float("nan"), 0.5, 0.4], dtype=torch.float64)
    transformed = run._surrogate(rewards, rows)
    known = torch.tensor(measured[rows[1]], dtype=torch.float64) / spread
    expected = surrogate_reward(rewards[2:], known, beta=0.5, divergence=divergence)
    assert torch.allclose(transformed[2:], expected) and transformed[1].isnan() and not transformed[0].isnan()
    state = torch.load(tmp_path / "checkpoint-1" / "rollout-00000-of-00001.pt", weights_only=True)
    assert state["method"]["reference_rewards"] == measured


@pytest.mark.parametrize("kind", ["latent", "reward"])
def test_value_network(kind, tmp_path):
    """
    A baseline from the latents alone, which learns from every window after its values were taken; a resumed run is the
    same to the bit. Where a latent says what the return is, the network finds it out. A run with the other kind of
    value does not take over what the network has learned.
    """
    given = dict(value_network=kind, learning_rate=0.0, save_strategy="steps", save_steps=1)
    whole = trainer("sd", tmp_path, **given)
    whole.train()
    assert len(logs(whole, "value/explained_variance")) == 2
    run = trainer("sd", tmp_path, **given)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert comparable(run) == comparable(whole)
    weights = run._value.network.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in whole._value.network.state_dict().items())
    other = trainer("sd", tmp_path, **{**given, "value_network": "latent" if kind == "reward" else "reward"})
    other.load_state_dict(whole.state_dict())
    assert not any(state.any() for state in other._value.network.head[-1].state_dict().values())

    rollout = run.sample_chains(run.policy, ["x"] * 8, [("value", i) for i in range(8)])
    returns, value = rollout.latents[:, :3, 0].mean((2, 3)).double(), run._value
    known = value.known([rollout], [0, 1, 2, 3], lambda rewards: 0 * rewards)
    before = (value.values([rollout], known) - returns).square().mean()
    for _ in range(25):
        value.fit([rollout], known, value.values([rollout], known), returns)
    assert (value.values([rollout], known) - returns).square().mean() < 0.5 * before


@pytest.mark.parametrize("name", ["sd", "sd_v", "sd3"])
def test_value_begins_with_the_reward_of_the_predicted_image(name, tmp_path):
    """
    `value_network="reward"`: before the network has learned, the value of a latent is the share of signal there times
    the reward, divided by the reference's spread, of the image that the policy predicts. The images are rewarded with
    their own prompt and columns; without an opinion, or of an image that is not finite, the others' mean is taken.
    """
    seen = []

    def reward(prompts, images, target):
        seen.append((prompts, target))
        values = [a - t for a, t in zip(brightness(images), target, strict=True)]
        return [None if is_silent and i == 1 else value for i, value in enumerate(values)]

    is_silent = False
    data = prompts(4, target=[0.1, 0.5, 0.7, 0.9])
    run = trainer(name, tmp_path, value_network="reward", reward_funcs=reward, train_dataset=data)
    run.reference_rewards.measure_spread(4)
    spread, rows, targets = run.reference_rewards.spread, [2, 0], [0.7, 0.7, 0.1, 0.1]
    texts = [data[row]["prompt"] for row in (2, 2, 0, 0)]
    rollout = run.sample_chains(run.policy, texts, [("value", i) for i in range(4)])
    seen.clear()
    known = run._value.known([rollout], rows, lambda rewards: run.in_units(rewards, rows))
    assert torch.equal(run._value.values([rollout], known), known) and known.shape == (4, 3)
    assert seen == [(texts, targets)] * 3

    for node in range(3):
        noisy, level = rollout.latents[:, node], run.sampler.levels[node].item()
        with torch.no_grad():
            prediction, _ = run.sampler.predict(run.policy.eval(), noisy, node, rollout.conditioning)
        if name == "sd3":
            clean, share = noisy - level * prediction, (1 - level) ** 2 / ((1 - level) ** 2 + level**2)
        else:
            timestep = int(run.sampler.timesteps[node])
            scheduler = run.family.pipeline.scheduler
            scheduler.set_timesteps(1000)
            clean, share = scheduler.step(prediction, timestep, noisy).pred_original_sample, level
        pixels = (run.family.decode_latents(clean).clamp(-1, 1) + 1) / 2
        expected = share * (pixels.mean((1, 2, 3)).double() - torch.tensor(targets, dtype=torch.float64)) / spread
        # Images have 256 levels.
        torch.testing.assert_close(known[:, node], expected, rtol=1e-3, atol=5e-4 * share / spread)

    is_silent = True
    missing = run._value.known([rollout], rows, lambda rewards: run.in_units(rewards, rows))
    torch.testing.assert_close(missing[1], known[[0, 2, 3]].mean(0))
    is_silent, latents = False, rollout.latents.clone()
    latents[1, :, 0, 0, 0] = torch.inf
    broken = type(rollout)(latents, rollout.means, rollout.kls, rollout.conditioning)
    missing = run._value.known([broken], rows, lambda rewards: run.in_units(rewards, rows))
    torch.testing.assert_close(missing[1], known[[0, 2, 3]].mean(0))


def test_value_of_the_reward_has_the_units_of_the_return(tmp_path):
    """With another divergence it is the predicted image's surrogate reward; the log is of the sampled ones alone."""
    given = dict(divergence="js", reference_images_per_prompt=3, beta=0.5, max_steps=1)
    runs = [trainer("sd", tmp_path / str(kind), value_network=kind, **given) for kind in (None, "reward")]
    for run in runs:
        run.train()
    entries = [run.state.log_history[0] for run in runs]
    names = [name for name in entries[0] if name.startswith(("divergence/", "reward"))]
    assert len(names) > 4 and all(entries[0][name] == entries[1][name] for name in names if "runtime" not in name)
    run, rewards = runs[1], torch.tensor([0.3, 0.6, 0.5, 0.4], dtype=torch.float64)
    rows = list(run.reference_rewards.by_row)[:2]
    assert torch.equal(run.in_units(rewards, rows), run._surrogate(rewards / run.reference_rewards.spread, rows))


# ---- Windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes, batch, accumulation", [(1, 8, 1), (1, 2, 4), (2, 4, 1), (2, 2, 2), (4, 2, 1)])
def test_windows_are_whole_groups_on_whole_processes(processes, batch, accumulation):
    """
    Whatever the split, a window has the same groups, in the same order over processes, and each process whole ones;
    an epoch has each prompt once at most.
    """
    sampler = WindowSampler(
        9,
        2,
        batch_size=batch,
        accumulation_steps=accumulation,
        num_processes=processes,
        num_iterations=2,
        seed=3,
        epoch=lambda: 1,
    )
    order = list(sampler)
    assert len(order) == len(sampler) == 2 * 2 * 8
    reference = list(
        WindowSampler(
            9, 2, batch_size=8, accumulation_steps=1, num_processes=1, num_iterations=1, seed=3, epoch=lambda: 1
        )
    )
    steps = [order[i : i + 8] for i in range(0, len(order), 8)]
    assert steps[0] == steps[1] and steps[2] == steps[3] and steps[0] != steps[2]
    for window, step in enumerate(steps[::2]):
        dealt = [[] for _ in range(processes)]
        for i in range(0, 8, batch):  # a loader deals batches to processes in turn
            dealt[i // batch % processes] += step[i : i + batch]
        assert [image for images in dealt for image in images] == reference[8 * window : 8 * window + 8]
        assert all(images[j] // 2 == images[j + 1] // 2 for images in dealt for j in range(0, len(images), 2))
    assert len(set(reference)) == len(reference)


def test_two_processes_are_one(tmp_path):
    """Two processes on one window are one process on it: weights, and every logged value, evaluations included."""
    script = TESTS / "scripts" / "run_rewards.py"
    options = dict(max_steps=2, optim="sgd", num_iterations=2, epsilon=1e-3, value_network="reward")
    fork(script, str(tmp_path / "two"), json.dumps({**options, "per_device_train_batch_size": 4}))
    sys.path.insert(0, str(TESTS / "scripts"))
    import run_rewards

    run_rewards.main(str(tmp_path / "one"), json.dumps({**options, "per_device_train_batch_size": 8}))
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2) and two["equal_on_all"]
    a, b = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "two"))
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=1e-5)
    for first, second in zip(one["logs"], two["logs"], strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - {"train_loss", "log_ratio/max", "log_ratio/min"}:  # extremes of a micro-batch
            assert second[key] == pytest.approx(first[key], rel=5e-3, abs=1e-3), key


# ---- Evaluation, resuming, killing ----------------------------------------------------------------------------------


def test_evaluation_is_fixed_and_leaves_no_trace(tmp_path):
    """
    The same images at every evaluation, of the usual sampler; the reference's are sampled once; intervals hold the
    mean; the training that follows is the same to the bit.
    """
    plain = trainer("sd", tmp_path / "plain", max_steps=2)
    plain.train()
    calls = []

    def counted(images):
        calls.append(len(images))
        return brightness(images)

    given = dict(eval_dataset=prompts(3), eval_strategy="steps", eval_steps=1, eval_on_start=True)
    run = trainer("sd", tmp_path / "evaluated", reward_funcs=counted, num_generations_eval=2, max_steps=2, **given)
    run.train()
    assert all(torch.equal(value, trained(plain)[key]) for key, value in trained(run).items())
    start, *_, last = [entry for entry in run.state.log_history if "eval_reward" in entry]
    assert start["eval_reward/gain"] == 0.0 and last["eval_reward/gain"] != 0.0
    assert last["eval_reward/low"] < last["eval_reward"] < last["eval_reward/high"]
    again = run.evaluate()
    assert again["eval_reward"] == last["eval_reward"] and again["eval_reward/gain"] == last["eval_reward/gain"]
    calls.clear()
    run.evaluate(prompts(1))
    assert sum(calls) == 4  # two images of the policy, two of the reference
    output = run.predict(prompts(2))
    assert "test_reward" in output.metrics and "eval_loss" not in last


def test_best_checkpoint_is_that_of_the_reward(tmp_path):
    given = dict(eval_dataset=prompts(2), eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    run = trainer("sd", tmp_path, load_best_model_at_end=True, **given)
    run.train()
    rewards = logs(run, "eval_reward")
    assert run.state.best_metric == max(rewards) and run.args.greater_is_better
    with pytest.raises(ValueError, match="`metric_for_best_model='eval_loss'`"):
        trainer("sd", tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", **given)


RESUMED = dict(max_steps=4, save_strategy="steps", save_steps=1, logging_steps=2, use_ema=True)
ITERATIONS = dict(num_iterations=2, epsilon=1e-3, divergence="js", reference_images_per_prompt=3)


@pytest.mark.parametrize("given", [{}, ITERATIONS], ids=["one iteration", "inside a window"])
def test_resume_is_bitwise(given, tmp_path):
    """
    Weights, logs and what was measured of the reference, from a checkpoint in the middle of an epoch, of a logging
    window, and of the iterations on a window's images.
    """
    whole = trainer("sd", tmp_path, eval_dataset=prompts(2), **RESUMED, **given)
    whole.train()
    run = trainer("sd", tmp_path, eval_dataset=prompts(2), **RESUMED, **given)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert comparable(run) == comparable(whole)
    assert all(torch.equal(value, trained(whole)[key]) for key, value in trained(run).items())
    if given:
        other = trainer("sd", tmp_path, **{**RESUMED, **given, "num_iterations": 4})
        with pytest.raises(ValueError, match="`num_iterations=4`"):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_saving_and_evaluating_leave_no_trace(tmp_path):
    def build(name, **given):
        return trainer("sd", tmp_path / name, **dict(max_steps=3, logging_steps=2, save_strategy="no") | given)

    joint.check_no_trace(build, prompts(2), every=1)


def kill_in_a_checkpoint(folder):
    die_in_a_checkpoint(2)
    trainer("sd", folder, **RESUMED, **ITERATIONS).train()


STAGES = {
    "before the first checkpoint": lambda folder: trainer(
        "sd", folder, callbacks=[DieAt("on_pre_optimizer_step", 0)], **RESUMED, **ITERATIONS
    ).train(),
    "inside a window": lambda folder: trainer(
        "sd", folder, callbacks=[DieAt("on_pre_optimizer_step", 1)], **RESUMED, **ITERATIONS
    ).train(),
    "while a checkpoint is written": kill_in_a_checkpoint,
}


def test_killed_run_continues(tmp_path):
    whole = trainer("sd", tmp_path / "whole", **RESUMED, **ITERATIONS)
    whole.train()
    for number, stage in enumerate(STAGES.values()):
        folder = tmp_path / str(number)
        killed(lambda stage=stage, folder=folder: stage(folder))
        run = trainer("sd", folder, **RESUMED, **ITERATIONS)
        run.train(resume_from_checkpoint=run.last_whole_checkpoint())
        assert comparable(run) == comparable(whole)
        assert all(torch.equal(value, trained(whole)[key]) for key, value in trained(run).items())


# ---- Full fine-tuning, QLoRA, guidance ------------------------------------------------------------------------------


def test_full_fine_tuning(tmp_path):
    """The reference is a copy; the whole pipeline is saved, and reads back."""
    from diffusers import StableDiffusionPipeline

    run = trainer("sd", tmp_path, peft_config=None, learning_rate=1e-4)
    run.train()
    assert logs(run, "kl")[0] == 0 and logs(run, "kl")[1] > 0 and run.ref_model is not None
    run.save_model()
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    name, value = next(iter(run.policy.denoiser.named_parameters()))
    assert torch.equal(dict(loaded.unet.named_parameters())[name], value)


@pytest.mark.parametrize("name", ["sd", "flux2", "qwen"])
def test_qlora(name, tmp_path):
    from transformers import BitsAndBytesConfig

    tiny_pipelines.pipeline(name).save_pretrained(tmp_path / "pipeline")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    run = trainer(str(tmp_path / "pipeline"), tmp_path / "run", quantization_config=quantization)
    run.train()
    assert run.is_quantized and logs(run, "kl")[0] == 0 and logs(run, "kl")[1] > 0
    run.save_model()
    assert "NF4" in (tmp_path / "run" / "README.md").read_text().upper()


def test_checkpointing_and_bf16(tmp_path):
    """Gradient checkpointing changes nothing but rounding; under bf16 the start is the reference all the same."""
    runs = [trainer("sd", tmp_path / str(on), gradient_checkpointing=on, max_steps=1) for on in (False, True)]
    for run in runs:
        run.train()
    for key, value in trained(runs[0]).items():
        assert torch.allclose(value, trained(runs[1])[key], atol=2e-3)
    run = trainer("sd", tmp_path / "bf16", bf16=True, max_steps=2)
    run.train()
    assert logs(run, "kl")[0] == 0 and logs(run, "log_ratio/max") == [0, 0]


def test_guidance_is_of_sampling_and_training(tmp_path):
    run = trainer("sd", tmp_path, guidance_scale=3.0, max_steps=1)
    assert run.sampler.guidance_scale == 3.0
    run.train()
    flux = trainer("flux", tmp_path / "flux", guidance_scale=2.0)
    assert flux.family.guidance_scale == 2.0 and flux.sampler.guidance_scale == 1.0


# ---- Card and bad input ---------------------------------------------------------------------------------------------


def test_model_card(tmp_path):
    """What was trained on, by which rewards, with which resolved settings; and an evaluation's rewards."""
    run = trainer("sd", tmp_path, eval_dataset=prompts(3), eval_strategy="steps", eval_steps=1)
    run.train()
    run.save_model()
    card = (tmp_path / "README.md").read_text()
    for text in ("rewards of its own images", "4 prompts", "| reward functions | `brightness` |", "3 prompts"):
        assert text in card, text
    assert "| noise_level | `1` |" in card and "| epsilon |" not in card and "pairs" not in card
    assert "`reward`" in card and "score-as-action" in card and "reference_images_per_prompt" not in card


BAD_OPTIONS = [
    (dict(num_generations=1), "`num_generations` must be .* got 1"),
    (dict(num_generations=3), "`num_generations=3` does not divide the 4 images"),
    (dict(noise_level=0.0), "`noise_level` must be .* got 0.0"),
    (dict(noise_level=1.5), "`noise_level=1.5` must be at most 1"),
    (dict(num_inference_steps=5000), "`num_inference_steps=5000`"),
    (dict(num_inference_steps=1), "`num_inference_steps` must be .* got 1"),
    (dict(epsilon=0.1), "`epsilon=0.1` has no effect"),
    (dict(reward_scale="batch"), "`reward_scale` must be .* got 'batch'"),
    (dict(divergence="total_variation"), "`divergence='total_variation'`"),
    (dict(divergence="js", beta=0.0), "`divergence='js'` has no effect"),
    (dict(divergence="js", reward_scale="group"), "`divergence='js'` with `reward_scale='group'`"),
    (dict(reference_images_per_prompt=8), "`reference_images_per_prompt=8` has no effect"),
    (dict(value_network="latent", reward_scale="group"), "`value_network='latent'` with `reward_scale='group'`"),
    (dict(value_network="reward", reward_scale="group"), "`value_network='reward'` with `reward_scale='group'`"),
    (dict(value_network="score"), "`value_network` must be .* got 'score'"),
    (dict(kl_in_return=False, beta=0.0), "`kl_in_return=False` has no effect"),
    (dict(accelerator_config={"split_batches": True}), "`split_batches=True`"),
    (dict(train_dataset=prompts(1)), "has 1 prompts, and a step samples for 2"),
    (dict(train_dataset=prompts(4).rename_column("prompt", "text")), "no column `prompt`"),
    (dict(train_dataset=prompts(4).select([])), "is empty"),
    (dict(train_dataset=None, per_device_train_batch_size=400), "has 4 prompts"),
    (dict(peft_config=LoraConfig(r=2, lora_dropout=0.1)), "`lora_dropout=0.1`"),
    (dict(reward_funcs=None), "`reward_funcs` is required"),
    (dict(reward_funcs=[]), "`reward_funcs` is empty"),
    (dict(resolution=15), "`resolution=15`"),
]


@pytest.mark.parametrize("given, message", BAD_OPTIONS, ids=lambda value: str(value)[:40])
def test_bad_input(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer("sd", tmp_path, **given)


def test_bad_kinds(tmp_path):
    with pytest.raises(TypeError, match="must be a map-style `datasets.Dataset`, got a `IterableDataset`"):
        trainer("sd", tmp_path, train_dataset=prompts().to_iterable_dataset())
    with pytest.raises(ValueError, match="train dataset has a transform"):
        trainer("sd", tmp_path, train_dataset=prompts().with_transform(lambda batch: batch))
    with pytest.raises(TypeError, match="must hold functions"):
        trainer("sd", tmp_path, reward_funcs="aesthetic")
    with pytest.raises(ValueError, match="`prompt` of row 1 of the train dataset is None"):
        PromptDataset(prompts(2).from_dict({"prompt": ["a", None]}), 2)
    pipeline = tiny_pipelines.pipeline("sd")
    pipeline.text_encoder = None
    with pytest.raises(ValueError, match="has no text encoder"):
        trainer(pipeline, tmp_path)


def test_low_noise_and_distilled_models_are_warned_about(tmp_path, caplog):
    trainer("sd", tmp_path, noise_level=0.3)
    assert "`noise_level=0.3` is below 1" in caplog.text
    caplog.clear()
    trainer("sd3", tmp_path, noise_level=0.3)
    assert "`noise_level=0.3` is below 0.7" in caplog.text
    caplog.clear()
    trainer("flux", tmp_path)  # whose guidance alone is distilled
    trainer("klein", tmp_path)
    assert "distilled into a few steps" not in caplog.text
    for pipeline in (tiny_pipelines.flux(guidance_embeds=False), tiny_pipelines.klein(is_distilled=True)):
        caplog.clear()
        trainer(pipeline, tmp_path)
        assert "distilled into a few steps" in caplog.text


def test_another_start_is_noticed(tmp_path):
    """Weights that changed after the trainer was made: the reference is not what training starts from."""
    run = moved(trainer("sd", tmp_path))
    run._start_is_unchecked = True
    with pytest.raises(ValueError, match="Before the first step"):
        run.train()


def test_diverged_weights_stop_the_run(tmp_path):
    run = trainer("sd", tmp_path, callbacks=[], max_steps=2)
    run._start_is_unchecked = False
    run.reference_rewards.measure_spread(4)
    with torch.no_grad():
        next(p for n, p in run.policy.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        run.train()


def test_seeds_are_derived():
    """Chains of training, of the reference and of evaluations never share a seed."""
    assert len({derive_seed(*key, 0, 0) for key in (("train", 0, 0), ("reference", 0), ("evaluation",))}) == 3
