"""
The win-rate reward on enumerable outcomes: its expectation, its gradient, the factor of self-play, the optimum that it
trains to; and its bookkeeping inside TRL's own trainer.
"""

import itertools
import math

import harness
import numpy as np
import pytest
import tiny
import torch
from trl import RLOOConfig, RLOOTrainer

import trl_ext.wro.anchors as anchors_module
from trl_ext.wro import WinRateReward, add_anchors


NUM = 6


def table(seed=0):
    """Probabilities that row beats column, antisymmetric around 1/2 and intransitive."""
    noise = torch.randn(NUM, NUM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.sigmoid(1.5 * (noise - noise.T))


def judge_of(wins):
    def judge(prompts, completions_a, completions_b):
        return [wins[int(a), int(b)].item() for a, b in zip(completions_a, completions_b, strict=True)]

    return judge


def rewards_of(reward, outcomes, **columns):
    return reward(prompts=["x"] * len(outcomes), completions=[str(int(y)) for y in outcomes], **columns)


def test_expectation_over_anchors():
    """With every outcome as often among the anchors as its probability, the reward is q exactly."""
    wins = table()
    counts = [4, 1, 2, 0, 2, 1]
    anchors = [str(i) for i, count in enumerate(counts) for _ in range(count)]
    reward = WinRateReward(judge_of(wins), both_orders=False)
    found = rewards_of(reward, range(NUM), anchors=[anchors] * NUM)
    expected = wins @ (torch.tensor(counts, dtype=torch.float64) / 10)
    assert found == pytest.approx(expected.tolist())
    # Any number of anchors: the mean over all single anchors is the same.
    single = [rewards_of(reward, range(NUM), anchors=[[anchor]] * NUM) for anchor in anchors]
    assert np.mean(single, axis=0) == pytest.approx(expected.tolist())


def test_one_fixed_anchor_is_another_target():
    """
    Trap: one anchor a prompt, drawn anew at every step, is unbiased; kept for the whole run it is the reward of another
    optimum, `pi_ref exp(p(y, y0) / beta)`, for whichever anchor it was.
    """
    wins, beta = table(3), 0.15
    reference = torch.randn(NUM, generator=torch.Generator().manual_seed(4), dtype=torch.float64).softmax(0)
    reward = WinRateReward(judge_of(wins), both_orders=False)
    fixed = torch.tensor(
        [rewards_of(reward, range(NUM), anchors=[[str(y)]] * NUM) for y in range(NUM)], dtype=torch.float64
    )
    torch.testing.assert_close(reference @ fixed, wins @ reference)
    optimum = (reference.log() + wins @ reference / beta).softmax(0)
    assert all(distance((reference.log() + each / beta).softmax(0), optimum) > 0.1 for each in fixed)


def test_a_kl_in_the_loss_is_another_objective():
    """
    Trap: sequences of two tokens out of four, enumerated. With the KL in the reward, as RLOO has it and WRO asks for,
    the expected step is the gradient of KL(pi || ref). GRPO's term in the loss (k3 times the ratio of probabilities) is
    the gradient of each token's KL at its prefix, without credit for the prefixes that a token leads to; without the
    ratio it is that of KL(ref || pi).
    """
    draw = torch.Generator().manual_seed(0)
    shapes = ((4,), (4, 4))
    logits = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]
    reference = [torch.randn(shape, generator=draw, dtype=torch.float64).log_softmax(-1) for shape in shapes]
    log_p = [each.log_softmax(-1) for each in logits]

    def of_whole(first, second):  # of all 16 sequences
        return first[:, None] + second

    def gradient(value):
        return torch.cat([each.flatten() for each in torch.autograd.grad(value, logits, retain_graph=True)])

    def at_prefixes(of_token):  # mean over the policy's prefixes, which have no gradient
        return of_token(log_p[0], reference[0]) + log_p[0].exp().detach() @ of_token(log_p[1], reference[1])

    whole = of_whole(*log_p)
    p = whole.exp().detach()
    kl = gradient((whole.exp() * (whole - of_whole(*reference))).sum())
    in_reward = gradient((p * (whole - of_whole(*reference)).detach() * whole).sum())
    torch.testing.assert_close(in_reward, kl, rtol=1e-9, atol=1e-12)

    terms = [(other - own).exp() - (other - own) - 1 for own, other in zip(log_p, reference, strict=True)]
    ratios = [(own - own.detach()).exp() for own in log_p]
    in_loss = gradient((p * of_whole(*(r * k for r, k in zip(ratios, terms, strict=True)))).sum())
    token_kl = gradient(at_prefixes(lambda own, other: (own.exp() * (own - other)).sum(-1)))
    torch.testing.assert_close(in_loss, token_kl, rtol=1e-9, atol=1e-12)
    assert (in_loss - kl).abs().max() > 0.01
    without_ratio = gradient((p * of_whole(*terms)).sum())
    forward = gradient(at_prefixes(lambda own, other: (other.exp() * (other - own)).sum(-1)))
    torch.testing.assert_close(without_ratio, forward, rtol=1e-9, atol=1e-12)


def test_logit_of_bradley_terry_is_the_reward():
    """h = logit undoes the sigmoid: the reward less the anchors' mean reward."""
    scores = torch.linspace(-1, 1, NUM, dtype=torch.float64)
    wins = torch.sigmoid(scores[:, None] - scores)
    found = rewards_of(WinRateReward(judge_of(wins), h="logit"), range(NUM), anchors=[["0", "3"]] * NUM)
    assert found == pytest.approx((scores - (scores[0] + scores[3]) / 2).tolist())
    logs = rewards_of(WinRateReward(judge_of(wins), h="log"), range(NUM), anchors=[["0", "3"]] * NUM)
    assert logs == pytest.approx(wins[:, [0, 3]].log().mean(1).tolist())
    # Each probability, then the mean: the other order is another number.
    assert logs != pytest.approx(wins[:, [0, 3]].mean(1).log().tolist(), abs=1e-3)


def test_clip_is_part_of_h():
    certain = torch.full((NUM, NUM), 1e-6, dtype=torch.float64)
    found = rewards_of(
        WinRateReward(judge_of(certain), h="logit", clip=0.05, both_orders=False), [0, 1], anchors=["2"] * 2
    )
    assert found == pytest.approx([math.log(0.05 / 0.95)] * 2)


def group_gradient(reward, logits, size):
    """The expected RLOO step, over all groups of `size` outcomes, with the leave-one-out baseline."""
    log_p = logits.log_softmax(0)
    p = log_p.exp().detach()
    total = 0.0
    for group in itertools.product(range(NUM), repeat=size):
        rewards = torch.tensor(rewards_of(reward, group), dtype=torch.float64)
        baseline = (rewards.sum() - rewards) / (size - 1)
        weight = p[list(group)].prod()
        total = total + weight * ((rewards - baseline) * log_p[list(group)]).mean()
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("h", ["identity", "logit"])
def test_self_play_needs_its_factor(size, h):
    """
    The expected step is the gradient of `E_{y ~ pi} E_{y0 ~ stopped pi} h(p(y, y0))`. Without the factor it is
    `G / (G - 1)` times that: the baseline holds each completion's own results.
    """
    wins = table(1)
    logits = torch.randn(NUM, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    p = logits.softmax(0)
    values = wins if h == "identity" else wins.logit()
    (expected,) = torch.autograd.grad(p @ values @ p.detach(), logits)
    options = dict(anchors="self", num_generations=size, both_orders=False, h=h, clip=1e-9)
    found = group_gradient(WinRateReward(judge_of(wins), **options), logits, size)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    plain = group_gradient(WinRateReward(judge_of(wins), **options, leave_one_out=False), logits, size)
    torch.testing.assert_close(plain, expected * size / (size - 1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("h", ["identity", "logit", "log"])
def test_expected_step_with_anchors(h):
    """
    With the KL in the reward, RLOO's expected step over all groups is the gradient of
    `E_{y ~ pi} E_{y0 ~ a} h(p(y, y0)) - beta KL(pi || ref)`. Negative control: h of the mean probability, in place of the
    mean of h, has another gradient unless h is the identity.
    """
    wins, beta, size = table(1), 0.3, 3
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(NUM, generator=draw, dtype=torch.float64).requires_grad_()
    log_ref = torch.randn(NUM, generator=draw, dtype=torch.float64).log_softmax(0)
    log_p = logits.log_softmax(0)
    p = log_p.exp()
    apply = {"identity": lambda x: x, "logit": torch.logit, "log": torch.log}[h]
    kl = (p * (log_p - log_ref)).sum()
    (expected,) = torch.autograd.grad(p @ apply(wins[:, [0, 3]]).mean(1) - beta * kl, logits, retain_graph=True)
    (of_means,) = torch.autograd.grad(p @ apply(wins[:, [0, 3]].mean(1)) - beta * kl, logits)
    reward = WinRateReward(judge_of(wins), h=h, both_orders=False, clip=1e-9)

    def with_kl(prompts, completions, **columns):
        given = reward(prompts=prompts, completions=completions, anchors=[["0", "3"]] * len(prompts))
        rows = [int(y) for y in completions]
        return torch.tensor(given, dtype=torch.float64) - beta * (log_p.detach() - log_ref)[rows]

    found = group_gradient(with_kl, logits, size)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert ((found - of_means).abs().max() > 1e-3) == (h != "identity")


def test_what_training_on_preferred_answers_reaches():
    """
    SFT on the winners of pairs of the reference tends to `ref(y) 2 w(y)`, w the win rate over the reference: it wins
    1/2 + 2 Var(w), at most 2/3. WRO at a small beta wins more.
    """
    reference = torch.randn(NUM, generator=torch.Generator().manual_seed(4), dtype=torch.float64).softmax(0)
    for scale in (1, 50):  # a mild judge, and one that decides
        scores = scale * torch.arange(NUM, dtype=torch.float64)
        wins = torch.sigmoid(scores[:, None] - scores)
        anchors = [[str(i) for i, share in enumerate((1000 * reference).round().int().tolist()) for _ in range(share)]]
        rewards = rewards_of(WinRateReward(judge_of(wins), both_orders=False), range(NUM), anchors=anchors * NUM)
        w = torch.tensor(rewards, dtype=torch.float64)
        variance = reference @ (w - reference @ w) ** 2
        reached = 2 * reference * w
        assert reached.sum().item() == pytest.approx(1, abs=3e-3)
        assert (reached @ w).item() == pytest.approx(0.5 + 2 * variance.item(), abs=3e-3)
        assert (reached @ w).item() < 2 / 3 + 1e-3
        assert (reference.log() + w / 0.1).softmax(0) @ w > reached @ w


def test_a_policy_against_itself():
    """Under an antisymmetric judge every policy beats itself half of the time, whatever the group."""
    reward = WinRateReward(judge_of(table()), anchors="self", num_generations=4, leave_one_out=False)
    for seed in range(5):
        group = torch.randint(NUM, (4,), generator=torch.Generator().manual_seed(seed))
        assert np.mean(rewards_of(reward, group)) == pytest.approx(0.5)


def train(reward, reference, beta, size, steps, seed, anchors=None):
    """Tabular RLOO with the KL in the reward."""
    generator = torch.Generator().manual_seed(seed)
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.03)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / steps)
        log_p = logits.log_softmax(0)
        drawn = torch.multinomial(log_p.exp().detach(), 32 * size, replacement=True, generator=generator)
        prompts = [str(i) for i in range(32) for _ in range(size)]
        columns = {} if anchors is None else {"anchors": anchors(generator, len(prompts))}
        rewards = reward(prompts=prompts, completions=[str(int(y)) for y in drawn], **columns)
        shaped = torch.tensor(rewards, dtype=torch.float64) - beta * (log_p.detach() - reference.log())[drawn]
        shaped = shaped.view(-1, size)
        advantages = (shaped - (shaped.sum(1, keepdim=True) - shaped) / (size - 1)).view(-1)
        optimizer.zero_grad()
        (-(advantages * log_p[drawn]).mean()).backward()
        optimizer.step()
    return logits.detach().softmax(0)


def distance(p, q):
    return (p - q).abs().sum().item() / 2


def test_training_reaches_the_closed_form():
    """Fixed anchors redrawn from the reference: `pi_ref exp(q / beta) / Z`. From another q it is far."""
    wins, beta = table(3), 0.15
    reference = torch.randn(NUM, generator=torch.Generator().manual_seed(4), dtype=torch.float64).softmax(0)
    optimum = (reference.log() + wins @ reference / beta).softmax(0)

    def anchors(generator, count):
        drawn = torch.multinomial(reference, count, replacement=True, generator=generator)
        return [[str(int(y))] for y in drawn]

    found = train(WinRateReward(judge_of(wins), both_orders=False), reference, beta, 4, 400, 0, anchors)
    assert distance(found, optimum) < 0.03 < 0.1 < distance(found, reference)


@pytest.mark.slow
def test_self_play_reaches_the_regularized_nash_policy():
    """G = 2, where the factor halves the reward: with it the fixed point at beta, without it that at beta / 2."""
    wins, beta = table(5), 0.2
    reference = torch.full((NUM,), 1 / NUM, dtype=torch.float64)

    def nash(at):
        policy = reference
        for _ in range(20000):
            policy = (0.99 * policy.log() + 0.01 * (reference.log() + wins @ policy / at)).softmax(0)
        return policy

    found = {
        corrected: train(
            WinRateReward(
                judge_of(wins), anchors="self", num_generations=2, both_orders=False, leave_one_out=corrected
            ),
            reference, beta, 2, 1200, 0,
        )
        for corrected in (True, False)
    }  # fmt: skip
    assert distance(found[True], nash(beta)) < 0.04 and distance(found[False], nash(beta / 2)) < 0.04
    assert distance(nash(beta), nash(beta / 2)) > 0.1


def test_orders_are_averaged():
    """A judge that always prefers what it sees first says nothing: 1/2, and it is never consistent."""
    logged = {}

    def judge(prompts, a, b):
        return [0.9 if int(x) < int(y) else 0.8 for x, y in zip(a, b, strict=True)]

    reward = WinRateReward(judge)
    found = reward(
        prompts=["x"] * 2,
        completions=["0", "1"],
        anchors=[["2"], ["0"]],
        log_metric=lambda k, v: logged.update({k: v}),
    )
    assert found == pytest.approx([(0.9 + 1 - 0.8) / 2, (0.8 + 1 - 0.9) / 2])
    assert logged["win_rate/order_consistency"] == 0 and logged["judge/calls"] == 4 and reward.num_calls == 4
    assert logged["win_rate/reference"] == pytest.approx(0.5) and logged["judge/failed"] == 0
    assert WinRateReward(judge, both_orders=False)(prompts=["x"], completions=["0"], anchors=[["2"]]) == [0.9]


def test_missing_verdicts():
    """A completion keeps the verdicts that it has, and has no reward without any."""

    def judge(prompts, a, b):
        return [None if x == "bad" or y == "bad" else 1.0 for x, y in zip(a, b, strict=True)]

    reward = WinRateReward(judge, both_orders=False)
    found = reward(prompts=["x"] * 3, completions=["a", "bad", "b"], anchors=[["c", "bad"], ["c"], ["c"]])
    assert found == [1.0, None, 1.0]
    own = WinRateReward(judge, anchors="self", num_generations=3, both_orders=False)
    assert own(prompts=["x"] * 3, completions=["a", "bad", "b"])[1] is None


def test_groups_that_are_not_whole():
    reward = WinRateReward(judge_of(table()), anchors="self", num_generations=2)
    for prompts in (["x", "x", "y"], ["x", "y", "y", "x"]):
        with pytest.raises(ValueError, match="num_generations=2.*part of some"):
            reward(prompts=prompts, completions=["0"] * len(prompts))
    with pytest.raises(ValueError, match="needs `num_generations`"):
        WinRateReward(judge_of(table()), anchors="self")(prompts=["x"] * 2, completions=["0", "1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(anchors="nobody"), "`anchors`.*nobody"),
        (dict(h="square"), "`h`.*square"),
        (dict(clip=0.5), "`clip`.*0.5"),
        (dict(clip=0.0), "`clip`.*0"),
        (dict(num_generations=1), "`num_generations`.*1"),
        (dict(anchors="self", h="log"), "`h='log'` is not supported"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        WinRateReward(judge_of(table()), **options)


def test_bad_data():
    def votes(prompts, a, b):
        return [1.0] * len(prompts)

    with pytest.raises(ValueError, match="'anchors'.*answer.*add_anchors"):
        rewards_of(WinRateReward(votes), [0], answer=["1"])
    with pytest.raises(ValueError, match="'chosen'.*Name one of them"):
        rewards_of(WinRateReward(votes, anchors="column", column="chosen"), [0], answer=["1"])
    with pytest.raises(ValueError, match="no anchor for the prompt 'x'"):
        rewards_of(WinRateReward(votes), [0], anchors=[[]])
    with pytest.raises(ValueError, match="`h='logit'` needs a judge that gives probabilities"):
        rewards_of(WinRateReward(votes, h="logit"), [0, 1], anchors=[["1"]] * 2)
    with pytest.raises(TypeError, match="judge"):
        WinRateReward("a judge")


# ---- Anchors and TRL ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversational", [False, True])
def test_anchors_are_sampled_once(tmp_path, monkeypatch, conversational):
    model, tokenizer = tiny.model(), tiny.tokenizer()
    data = tiny.dataset(20, conversational).select_columns(["prompt"])
    sampled = []
    original = anchors_module.sample_tokens

    def counted(model, tokenizer, prompts, *args, **kwargs):
        sampled.append(len(prompts))
        return original(model, tokenizer, prompts, *args, **kwargs)

    monkeypatch.setattr(anchors_module, "sample_tokens", counted)
    options = dict(num_anchors=2, max_completion_length=4, cache_dir=tmp_path)
    first = add_anchors(data, model, tokenizer, **options)
    assert sampled == [32, 8]
    again = add_anchors(data, model, tokenizer, **options, batch_size=3)
    assert again["anchors"] == first["anchors"] and len(sampled) == 2
    anchor = first["anchors"][0][1]
    assert isinstance(anchor, str) != conversational
    add_anchors(data, tiny.model(seed=1), tokenizer, **options)
    add_anchors(data, model, tokenizer, **(options | dict(num_anchors=3)))
    assert len(sampled) == 6
    with pytest.raises(ValueError, match="already has a column 'anchors'"):
        add_anchors(first, model, tokenizer, **options)
    for name, value in (("num_anchors", 0), ("max_completion_length", 0), ("batch_size", 0), ("seed", -1)):
        with pytest.raises(ValueError, match=f"`{name}`.*{value}"):
            add_anchors(data, model, tokenizer, **{name: value})


@pytest.mark.parametrize("anchors", ["reference", "self"])
def test_in_trl(tmp_path, anchors):
    """TRL's RLOO takes it as any reward function, with a judge that scores lengths, and logs what it measures."""

    def judge(prompts, a, b):
        return [1 / (1 + math.exp(len(y) - len(x))) if abs(len(x) - len(y)) < 50 else float(len(x) > len(y)) for x, y in zip(a, b, strict=True)]  # fmt: skip

    model, tokenizer = tiny.model(), tiny.tokenizer()
    data = tiny.dataset(8).select_columns(["prompt"])
    if anchors == "reference":
        data = add_anchors(data, model, tokenizer, num_anchors=2, max_completion_length=4)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    reward = WinRateReward(judge, anchors=anchors, num_generations=4 if anchors == "self" else None)
    options = harness.defaults(tmp_path / "out") | dict(max_steps=1, per_device_train_batch_size=8)
    trainer = RLOOTrainer(
        str(tmp_path / "model"),
        reward_funcs=reward,
        args=RLOOConfig(**options, num_generations=4, max_completion_length=4),
        train_dataset=data,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert "rewards/win_rate/mean" in log and log["judge/failed"] == 0
    assert ("win_rate/reference" in log) == (anchors == "reference")
    if anchors == "self":
        assert log["rewards/win_rate/mean"] == pytest.approx(0.5 * 3 / 4)
