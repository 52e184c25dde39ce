"""
f-DPG on a language model whose 85 responses can be enumerated: its step is the gradient of the divergence, it trains to
the target, reverse KL is RLOO, and each trap has a test that fails without what avoids it.
"""

import doctest
import math

import enumerated
import harness
import pytest
import torch
from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer

from trl_ext.fdpg import FDPGConfig, FDPGTrainer, fit_moments, moments
from trl_ext.fdpg.pseudo_rewards import RunningPartition, effective_share, group_log_mean, key_of, pseudo_rewards
from trl_ext.losses import get_divergence
from trl_ext.losses.f_divergence import DIVERGENCES, INADMISSIBLE_DIVERGENCES


ALL = [*DIVERGENCES, *INADMISSIBLE_DIVERGENCES]
BOUNDED = [name for name in ALL if get_divergence(name, allow_inadmissible=True).bounded_above]
PROMPTS = Dataset.from_dict({"prompt": ["c"] * 64})


def target(reference, rewards, beta):
    """log p of the enumerated responses, and log Z."""
    log_p = enumerated.log_probs(reference).detach() + rewards / beta
    return log_p.log_softmax(0), log_p.logsumexp(0).item()


# ---- The gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_expected_step_is_the_gradient_of_the_divergence(name):
    """
    Over all responses, `E_pi[(-pseudo-reward + constant) grad log pi]` is the gradient of `E_p[f(pi / p)]`, in all
    parameters of the model, whatever the constant.
    """
    divergence = get_divergence(name, allow_inadmissible=True)
    reference, policy = enumerated.model(0).double(), enumerated.model(1).double()
    log_target, _ = target(reference, enumerated.HAS_A, 0.5)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    log_policy = enumerated.log_probs(policy)
    ratio = log_policy - log_target
    direct = (log_target.exp() * divergence.f(ratio.exp())).sum()
    expected = torch.autograd.grad(direct, parameters, retain_graph=True, allow_unused=True)
    found = pseudo_rewards(
        (log_target - log_policy).detach(), torch.zeros(85, dtype=torch.float64), divergence, group_size=85
    )
    step = (log_policy.exp().detach() * -(found.values + 3.7) * log_policy).sum()
    actual = torch.autograd.grad(step, parameters, allow_unused=True)
    size = sum((g**2).sum() for g in expected if g is not None).sqrt()
    assert size > 0.01
    for one, other in zip(actual, expected, strict=True):
        if other is not None:
            assert (one - other).abs().max() < 1e-6 * size


def test_the_leave_one_out_baseline_is_unbiased():
    """The advantages of a group, as a matrix product: each pseudo-reward less the mean of the others."""
    weights = torch.tensor([0.3, -1.0, 0.5, 2.0, 0.1, 0.1, -0.4, torch.nan], dtype=torch.float64)
    found = pseudo_rewards(weights, torch.zeros(8, dtype=torch.float64), get_divergence("js"), 4)
    values = found.values.view(2, 4)
    assert found.advantages[0] == pytest.approx((values[0, 0] - values[0, 1:].mean()).item())
    assert found.advantages[4] == pytest.approx((values[1, 0] - values[1, 1:3].mean()).item())
    assert found.advantages[7] == 0  # without a reward it neither counts nor moves


# ---- The normalizer -------------------------------------------------------------------------------------------------


def test_a_groups_forward_kl_weights_sum_to_its_size():
    """`e^{-t} = G softmax(w)` with the group's normalizer, so that forward KL's pseudo-reward is bounded by G - 1."""
    weights = 5 * torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = pseudo_rewards(weights, group_log_mean(weights, 8), get_divergence("forward_kl"), 8)
    assert torch.allclose((found.values + 1).view(3, 8).sum(1), torch.full((3,), 8.0, dtype=torch.float64))
    assert found.values.max() <= 7
    weights[3] = torch.nan
    share = effective_share(weights, 8)
    assert share.min() > 0 and share.max() <= 1
    assert torch.isfinite(group_log_mean(weights, 8)).all()


def test_a_running_normalizer_is_unbiased_for_any_policy():
    """Responses of three policies, each weighted by its own: all estimate one Z, separately and together."""
    reference = enumerated.model(0).double()
    _, log_z = target(reference, enumerated.HAS_A, 0.5)
    log_p = enumerated.log_probs(reference).detach() + enumerated.HAS_A / 0.5
    together, wrong = RunningPartition(), RunningPartition()
    generator = torch.Generator().manual_seed(0)
    for seed in (0, 1, 2):
        other = enumerated.log_probs(enumerated.model(seed).double()).detach()
        log_policy = (0.5 * enumerated.log_probs(reference).detach() + 0.5 * other).log_softmax(0)
        drawn = torch.multinomial(log_policy.exp(), 20000, replacement=True, generator=generator)
        together.add(["all"] * 20000, (log_p - log_policy)[drawn])
        wrong.add(["all"] * 20000, (log_p - enumerated.log_probs(reference).detach())[drawn])
    assert together.log_means(["all"]).item() == pytest.approx(log_z, abs=0.04)
    assert abs(wrong.log_means(["all"]).item() - log_z) > 0.05  # as if the reference had sampled them all
    assert together.log_means(["other"]).isnan().all()
    restored = RunningPartition()
    restored.load_state_dict(together.state_dict())
    assert restored.log_means(["all"]) == together.log_means(["all"])


def test_long_responses_stay_logarithms():
    """Weights of e^800 and e^-800 are normalized as logarithms. Negative control: as numbers they have no mean."""
    weights = torch.tensor([800.0, 799.0, -800.0, 0.0, -801.0, -800.0, -802.0, -800.5], dtype=torch.float64)
    log_z = group_log_mean(weights, 4)
    assert log_z[0] == pytest.approx(799 + math.log((math.e + 1) / 4)) and log_z[4] < -800
    plain = weights.view(2, 4).exp().mean(1).log()
    assert torch.isinf(plain).all()
    for name in ("js", "forward_kl", "total_variation", "hellinger"):
        found = pseudo_rewards(weights, log_z, get_divergence(name, allow_inadmissible=True), 4)
        assert found.advantages.isfinite().all() and found.advantages.abs().max() > 0.01
    running = RunningPartition()
    running.add(["all"] * 8, weights)
    assert running.log_means(["all"]).item() == pytest.approx(799 + math.log((math.e + 1) / 8))


def test_the_inclusive_normalizer_is_the_calm_one():
    """Negative control: with each response left out of its own normalizer, forward KL's pseudo-rewards have no bound."""
    weights = 3 * torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grouped = weights.view(-1, 4)
    others = torch.stack([grouped[:, [j for j in range(4) if j != i]].logsumexp(1) for i in range(4)], 1) - math.log(3)
    forward_kl = get_divergence("forward_kl")
    inclusive = pseudo_rewards(weights, group_log_mean(weights, 4), forward_kl, 4).values
    exclusive = pseudo_rewards(weights, others.reshape(-1), forward_kl, 4).values
    assert inclusive.max() <= 3 and exclusive.std() > 10 * inclusive.std()


def test_groups_do_not_see_each_other():
    """
    Advantages of a group are its own, whatever the other prompts of the batch are worth. Negative control: one baseline
    over all contexts, as in the released code, pays a group for being an easy one.
    """
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 8, generator=draw, dtype=torch.float64)
    js = get_divergence("js")
    found = []
    for other in (second, second + 5):
        weights = torch.cat([first, other])
        values = pseudo_rewards(weights, torch.zeros(16, dtype=torch.float64), js, 8)
        found.append((values.advantages[:8], (values.values - values.values.mean())[:8]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    assert (found[0][1] - found[1][1]).abs().max() > 0.5
    assert key_of("a") != key_of("b") and key_of([{"role": "user", "content": "a"}]) != key_of("a")


def test_a_clip_leaves_the_target_alone():
    """Only pseudo-rewards are bounded. The ratio to the target, which is logged, is what it was."""
    weights = torch.linspace(-4, 4, 8, dtype=torch.float64)
    given = weights.clone()
    log_z, forward_kl = group_log_mean(weights, 8), get_divergence("forward_kl")
    plain, clipped = (pseudo_rewards(weights, log_z, forward_kl, 8, bound) for bound in (None, 1.0))
    assert torch.equal(plain.log_target_ratio, clipped.log_target_ratio) and torch.equal(weights, given)
    assert clipped.values.max() == 1 < plain.values.max()
    assert torch.equal(clipped.clipped, plain.values > 1) and not plain.clipped.any()


def test_nothing_leaks_out_of_a_trainer(tmp_path):
    """
    Traps of the released code: settings of one tuner showed up in the next, autograd's anomaly detection was switched on
    for the whole process, and contexts came in the order of the file.
    """
    first = make(tmp_path / "first", divergence="alpha", alpha=0.3, max_pseudo_reward=2.0, partition="global")
    second = make(tmp_path / "second")
    assert (second.args.divergence, second.args.alpha, second.args.max_pseudo_reward) == ("js", None, None)
    assert (first.args.divergence, first.args.partition, second.args.partition) == ("alpha", "global", "group")
    assert repr(first.divergence) != repr(second.divergence) and first.partition is not second.partition
    assert not torch.is_anomaly_enabled()
    order = list(dict.fromkeys(second._get_train_sampler(second.train_dataset)))
    assert sorted(order) == list(range(64)) != order


# ---- Forbidden responses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_forbidden_responses(name, tmp_path):
    """Finite advantages, below all others, for divergences that are bounded there; the others are refused."""
    assert set(BOUNDED) >= {"js", "forward_kl", "alpha", "hellinger", "total_variation", "neyman", "le_cam"}
    weights = torch.tensor([0.5, -torch.inf, 0.0, 0.1], dtype=torch.float64)
    divergence = get_divergence(name, allow_inadmissible=True)
    if name in BOUNDED:
        found = pseudo_rewards(weights, group_log_mean(weights, 4), divergence, 4)
        assert found.advantages.isfinite().all() and found.advantages.argmin() == 1
        nothing = pseudo_rewards(
            torch.full((4,), -torch.inf).double(), torch.full((4,), -torch.inf).double(), divergence, 4
        )
        assert (nothing.advantages == 0).all()
    else:
        trainer = make(tmp_path, reward=forbids_a, divergence=name)
        with pytest.raises(ValueError, match=f"-inf.*{type(divergence).__name__}"):
            trainer.train()


def forbids_a(prompts, completions, completion_ids, **columns):
    return [-math.inf if 1 in ids else 0.0 for ids in completion_ids]


# ---- In the trainer -------------------------------------------------------------------------------------------------


def options(folder, **more):
    defaults = harness.defaults(folder) | dict(
        per_device_train_batch_size=32, num_generations=8, max_completion_length=3, max_steps=2, learning_rate=1e-3
    )
    return defaults | more


def make(tmp_path, reward=enumerated.has_a, **more):
    folder = enumerated.save(tmp_path / "model")
    return FDPGTrainer(
        folder, reward_funcs=reward, args=FDPGConfig(**options(tmp_path / "out", **more)), train_dataset=PROMPTS
    )


def recorded(trainer):
    """The advantages of every generation."""
    seen, original = [], trainer._generate_and_score_completions

    def keep(inputs):
        output = original(inputs)
        seen.append(output["advantages"].clone())
        return output

    trainer._generate_and_score_completions = keep
    return seen


def test_reverse_kl_is_rloo(tmp_path):
    """The same seed, one step: RLOO's advantages, divided by beta. JS gives others."""
    beta, seen = 0.25, {}
    folder = enumerated.save(tmp_path / "model")
    for name in ("rloo", "reverse_kl", "js"):
        config = RLOOConfig if name == "rloo" else FDPGConfig
        more = {} if name == "rloo" else {"divergence": name}
        cls = RLOOTrainer if name == "rloo" else FDPGTrainer
        args = config(**options(tmp_path / name, beta=beta, max_steps=1), **more)
        trainer = cls(folder, reward_funcs=enumerated.has_a, args=args, train_dataset=PROMPTS)
        seen[name] = recorded(trainer)
        trainer.train()
    torch.testing.assert_close(seen["reverse_kl"][0] * beta, seen["rloo"][0], rtol=1e-4, atol=1e-5)
    assert (seen["js"][0] * beta - seen["rloo"][0]).abs().max() > 0.1


def train_to_the_target(tmp_path, drawn_evenly=True, steps=100, responses=128, **more):
    """A trainer that has trained, KL(p || pi) before, KL(p || pi), KL(pi || p) and their total variation after."""
    trainer = make(tmp_path, beta=0.5, **(enumerated.to_the_optimum(steps, responses) | more))
    if drawn_evenly:
        enumerated.draw_evenly(trainer)
    log_target, _ = target(enumerated.model(0), enumerated.HAS_A, 0.5)
    before = enumerated.log_probs(trainer.model).detach()
    trainer.train()
    after = enumerated.log_probs(trainer.model).detach()
    distances = [enumerated.kl(log_target, log_p) for log_p in (before, after)]
    assert distances[0] == pytest.approx(0.118, abs=0.001)
    return trainer, *distances, enumerated.kl(after, log_target), enumerated.total_variation(after, log_target)


@pytest.mark.parametrize(
    ("divergence", "partition"), [("js", "group"), ("forward_kl", "prompt"), ("reverse_kl", "global")]
)
def test_training_reaches_the_target(tmp_path, divergence, partition):
    """
    The closed form, reference times exp(reward / beta): of the exact KL of 0.118 to it, and of the total variation of
    0.160, less than 10 % and 30 % are left after 100 steps of 128 responses, with every normalizer. What is logged is
    the target's normalizer.
    """
    trainer, before, after, _, variation = train_to_the_target(
        tmp_path, divergence=divergence, partition=partition, logging_steps=10
    )
    assert after < 0.1 * before and variation < 0.3 * 0.16
    _, log_z = target(enumerated.model(0), enumerated.HAS_A, 0.5)
    logs = [entry for entry in trainer.state.log_history if "fdpg/log_z" in entry]
    names = ("divergence", "kl_policy_target", "log_z", "ess", "pseudo_reward", "clipped", "forbidden")
    assert {f"fdpg/{name}" for name in names} <= set(logs[0])
    assert logs[-1]["fdpg/log_z"] == pytest.approx(log_z, abs=0.03)
    assert logs[-1]["fdpg/ess"] > 0.97 > logs[0]["fdpg/ess"] and logs[-1]["fdpg/divergence"] < 0.01
    assert all(entry["fdpg/clipped"] == 0 for entry in logs)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ALL)
def test_every_divergence_reaches_the_target(tmp_path, divergence):
    """250 steps of 256 responses leave less than 5 % of the KL (the most: total variation) and a total variation below 0.015."""
    _, before, after, reverse, variation = train_to_the_target(
        tmp_path, steps=250, responses=256, divergence=divergence
    )
    print(f"{divergence}: KL(p|pi) {before:.4f} -> {after:.5f}, KL(pi|p) {reverse:.5f}, TV {variation:.4f}")
    assert after < 0.05 * before and variation < 0.015


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["js", "forward_kl", "reverse_kl"])
def test_sampled_responses_reach_the_target(tmp_path, divergence):
    """As users train: responses that are really sampled, eight to a prompt. 400 steps of 128."""
    options = dict(steps=400, responses=128, num_generations=8, divergence=divergence, drawn_evenly=False)
    _, before, after, reverse, variation = train_to_the_target(tmp_path, **options)
    print(f"{divergence}: KL(p|pi) {before:.4f} -> {after:.5f}, KL(pi|p) {reverse:.5f}, TV {variation:.4f}")
    assert after < 0.1 * before and variation < 0.03


def test_pseudo_rewards_are_clipped(tmp_path):
    trainer = make(tmp_path, divergence="forward_kl", beta=0.2, max_pseudo_reward=0.5)
    seen = recorded(trainer)
    trainer.train()
    log = trainer.state.log_history[0]
    assert 0 < log["fdpg/clipped"] < 1 and log["fdpg/pseudo_reward"] <= 0.5
    assert seen[0].max() < 1.6 + 1e-5  # from 0.5 down to -1, and the mean of the others


def test_forbidden_responses_train(tmp_path):
    """JS learns to leave out what is forbidden, and the share of it is logged."""
    trainer = make(tmp_path, reward=forbids_a, max_steps=30, divergence="forward_kl")
    trainer.train()
    shares = [entry["fdpg/forbidden"] for entry in trainer.state.log_history if "fdpg/forbidden" in entry]
    assert 0 < shares[0] < 1 and sum(shares[-5:]) < 0.7 * sum(shares[:5])
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_rewards_alone_as_log_scores(tmp_path):
    """`target="none"` loads no reference: with the log-scores of another model as rewards the policy approaches it."""
    other = enumerated.model(1)
    with torch.no_grad():
        scores = {
            tuple(ids): value
            for ids, value in zip(enumerated.RESPONSES, enumerated.log_probs(other).tolist(), strict=True)
        }

    def log_score(prompts, completions, completion_ids, **columns):
        return [scores[tuple(ids)] for ids in completion_ids]

    trainer = make(tmp_path, reward=log_score, target="none", divergence="forward_kl", max_steps=40)
    assert trainer.ref_model is None and trainer.beta == 0

    def distance():
        with torch.no_grad():
            log_p = enumerated.log_probs(other)
            return (log_p.exp() * (log_p - enumerated.log_probs(trainer.model))).sum().item()

    before = distance()
    trainer.train()
    assert distance() < 0.8 * before


def test_the_normalizer_is_in_the_checkpoint(tmp_path):
    """Resumed, the run is the uninterrupted one in every bit; without the state it is another."""
    more = dict(partition="global", divergence="forward_kl", max_steps=4, save_strategy="steps", save_steps=2)
    whole = make(tmp_path, **more)
    whole.train()
    logs = [harness.logs(whole)]
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    resumed = make(tmp_path, **more)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.partition.state_dict() == whole.partition.state_dict()
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    forgetful = make(tmp_path, **more)
    forgetful.load_state_dict = lambda state: None
    forgetful.train(resume_from_checkpoint=checkpoint)
    assert forgetful.partition.state_dict() != whole.partition.state_dict() and logs
    pairs = zip(whole.model.parameters(), forgetful.model.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)


# ---- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(divergence="euclidean"), "'euclidean'"),
        (dict(alpha=0.3), "'js' does not take alpha"),
        (dict(divergence="alpha", alpha=-1.0), "alpha"),
        (dict(partition="batch"), "`partition`.*batch"),
        (dict(target="nothing"), "`target`.*nothing"),
        (dict(beta=0.0), "`beta=0.0` with `target='reference'`"),
        (dict(target="none", beta=0.5), "`beta=0.5` has no effect"),
        (dict(max_pseudo_reward=0.0), "`max_pseudo_reward`.*0"),
        (dict(normalize_advantages=True), "`normalize_advantages=True`"),
        (dict(reward_clip_range=(-1.0, 1.0)), "`reward_clip_range"),
        (dict(sync_ref_model=True), "`sync_ref_model=True`"),
        (dict(mask_truncated_completions=True), "`mask_truncated_completions=True`"),
        (dict(temperature=0.7), "`temperature=0.7`"),
        (dict(top_p=0.9), "`top_p=0.9`"),
        (dict(top_k=50), "`top_k=50`"),
        (dict(min_p=0.1), "`min_p=0.1`"),
        (dict(repetition_penalty=1.2), "`repetition_penalty=1.2`"),
        (dict(generation_kwargs={"typical_p": 0.9}), "`generation_kwargs"),
    ],
)
def test_bad_options(given, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        FDPGConfig(**options(tmp_path), **given)


def test_infinite_rewards(tmp_path):
    trainer = make(tmp_path, reward=lambda prompts, completions, **columns: [math.inf] * len(completions))
    with pytest.raises(ValueError, match="returned inf"):
        trainer.train()


# ---- Moments --------------------------------------------------------------------------------------------------------


def test_moments_on_all_responses():
    """Two features at once, to 1e-8, with the exact probabilities as weights; in closed form for one feature."""
    weights = enumerated.log_probs(enumerated.model(0).double()).detach().exp()
    length = torch.tensor([float(len(ids)) for ids in enumerated.RESPONSES], dtype=torch.float64)
    features = torch.stack([enumerated.HAS_A, length], 1)
    found = fit_moments(features, [0.5, 2.5], weights)
    tilted = (weights.log() + features @ torch.tensor(found.exponents, dtype=torch.float64)).softmax(0)
    assert (tilted @ features).tolist() == pytest.approx([0.5, 2.5], abs=1e-8) == found.means
    share = (weights @ enumerated.HAS_A / weights.sum()).item()
    single = fit_moments(enumerated.HAS_A, 0.5, weights)
    assert single.exponents[0] == pytest.approx(math.log((1 - share) / share))
    assert doctest.testmod(moments).failed == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((torch.ones(4), 0.5), "cannot be reached"),
        ((torch.tensor([0.0, 1.0]), 1.5), "cannot be reached"),
        ((torch.ones(4, 2), 0.5), "`features` must have the shape"),
        ((torch.tensor([0.0, math.nan]), 0.5), "finite"),
        ((torch.tensor([0.0, 1.0]), 0.5, torch.tensor([-1.0, 1.0])), "`weights`"),
    ],
)
def test_bad_moments(arguments, told):
    with pytest.raises(ValueError, match=told):
        fit_moments(*arguments)
