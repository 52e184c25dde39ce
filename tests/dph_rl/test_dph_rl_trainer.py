"""DPH-RL's own promises: what is added to GRPO's loss, from which log-probabilities, and what it leaves alone."""

import harness
import pytest
import sampling
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from trl import GRPOConfig, GRPOTrainer

from trl_ext import DPHRLConfig
from trl_ext.losses import Divergence, get_divergence


METHOD = sampling.BY_ID["dph_rl"]


def lora(**kwargs):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **kwargs})


def build(folder, output, **options):
    return sampling.trainer(METHOD, folder, output, **options)


def grpo(folder, output, **options):
    return GRPOTrainer(
        model=folder,
        reward_funcs=sampling.reward,
        args=GRPOConfig(**sampling.options_of(sampling.PLAIN[0], output, **options)),
        train_dataset=sampling.prompts(),
    )


def logps(model, answer, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of an answer's tokens, from full logits."""
    ids = torch.tensor([answer.prompt_ids + answer.completion_ids])
    with torch.no_grad():
        logprobs = (model(ids).logits[0, :-1].double() / temperature).log_softmax(-1)
    values = logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1)
    return values[-len(answer.completion_ids) :]


# ---- GRPO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False], ids=["with-answers", "without"])
def test_no_coefficient_is_grpo(given, tiny_folder, tmp_path):
    """`rehearsal_coef=0` is GRPO bit for bit, with and without answers, over two epochs and windows of two steps."""
    options = dict(max_steps=10, steps_per_generation=2)
    more = {} if given else {"rehearsal_dataset": None}
    ours = build(tiny_folder, tmp_path / "ours", rehearsal_coef=0.0, **options, **more)
    ours.train()
    theirs = grpo(tiny_folder, tmp_path / "grpo", **options)
    theirs.train()
    assert harness.largest_difference(harness.weights(ours.model), harness.weights(theirs.model)) == 0
    harness.assert_same_logs(harness.logs(ours), harness.logs(theirs), ignore={"num_tokens"})


def test_first_step_is_grpos(tiny_folder, tmp_path):
    """
    Before the first step no token has moved: the term and its gradient are exactly 0, and the step is GRPO's bit for
    bit. Samples, advantages, the count of tokens and every metric are GRPO's: the answers are not in the batch.
    """
    ours = build(tiny_folder, tmp_path / "ours", max_steps=1, rehearsal_batch_size=1)
    ours.train()
    theirs = grpo(tiny_folder, tmp_path / "grpo", max_steps=1)
    theirs.train()
    assert harness.largest_difference(harness.weights(ours.model), harness.weights(theirs.model)) == 0
    entry, other = harness.logs(ours)[0], harness.logs(theirs)[0]
    assert [entry[f"rehearsal/{name}"] for name in ("divergence", "kl", "logratio", "forgotten")] == [0, 0, 0, 0]
    assert {key: value for key, value in entry.items() if not key.startswith("rehearsal/")} == other
    for key, value in theirs._buffered_inputs[0].items():
        assert torch.equal(ours._buffered_inputs[0][key], value), key


def test_loss_is_grpos_and_the_term(tiny_folder, tmp_path):
    """
    The term is the mean of f over the tokens of the step's answers, recomputed in float64 from full logits of a
    displaced policy. It does not depend on how many samples the batch has, so eta is what it says.
    """
    divergence = get_divergence("alpha", alpha=0.3)
    for size in (8, 16):
        trained = build(
            tiny_folder,
            tmp_path / str(size),
            per_device_train_batch_size=size,
            divergence="alpha",
            alpha=0.3,
            rehearsal_max_logratio=None,
            rehearsal_batch_size=3,
            max_steps=1,
        )
        trained.rehearser.start_run(None)
        trained.current_gradient_accumulation_steps = 1
        start, policy = harness.load(tiny_folder).eval(), harness.load(tiny_folder).eval()
        for model in (trained.model, policy):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.05)
        trained.model.train()
        loss = trained.rehearser.loss(trained.model)
        rows = trained.rehearser.order.rows(0, 0)
        ratios = torch.cat(
            [logps(policy, trained.rehearser.answers[r]) - logps(start, trained.rehearser.answers[r]) for r in rows]
        )
        assert ratios.abs().max() > 0.1
        expected = divergence.f(ratios.exp()).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
        entry = trained._pop_metrics("train")
        assert entry["rehearsal/divergence"] == pytest.approx(expected.item(), rel=1e-3)
        assert entry["rehearsal/logratio"] == pytest.approx(ratios.mean().item(), rel=1e-3)
        assert entry["rehearsal/kl"] == pytest.approx((ratios.exp() - 1 - ratios).mean().item(), rel=1e-3)
        assert entry["rehearsal/forgotten"] == pytest.approx((ratios < -2.302585).double().mean().item(), abs=1e-6)


def test_the_coefficient_is_the_weight_of_the_term(tiny_folder, tmp_path):
    """
    The first steps of three runs are one and the same, GRPO's. The second loss is GRPO's plus the coefficient times the
    logged divergence, whatever it is. Negative control, the released code: its rehearsed rows share a mean with the
    samples, here 1 of 9 rows, and so does their weight.
    """
    losses, divergences = {}, []
    for coef in (0.0, 2.0, 8.0):
        options = dict(rehearsal_coef=coef, rehearsal_batch_size=1, max_steps=2, learning_rate=5e-3)
        trained = build(tiny_folder, tmp_path / str(coef), divergence="reverse_kl", **options)
        trained.train()
        losses[coef] = harness.column(trained, "loss")[1]
        if coef:
            divergences.append(harness.column(trained, "rehearsal/divergence")[1])
    assert divergences[0] == pytest.approx(divergences[1], rel=1e-5) and divergences[0] > 0.01
    for coef in (2.0, 8.0):
        added = losses[coef] - losses[0.0]
        assert added == pytest.approx(coef * divergences[0], rel=0.02, abs=2e-4)
        assert added != pytest.approx(coef * divergences[0] / 9, rel=0.5)


def test_grpos_kl_beside_the_term_is_told(tiny_folder, tmp_path, caplog):
    """DPH-RL has none; with `beta` above 0 there are two terms, which is allowed."""
    build(tiny_folder, tmp_path / "without")
    assert "`beta=" not in caplog.text
    build(tiny_folder, tmp_path / "with", beta=0.1)
    assert "`beta=0.1`" in caplog.text


def test_rehearsal_holds_the_policy(tiny_folder, tmp_path):
    """With the term the answers stay likelier than under GRPO alone, whose reward pushes them away."""

    def spoil(prompts, completions, **columns):  # away from every word that the answers have
        return [-sum(map(sampling.text_of(c).count, "aeiou")) for c in completions]

    moved = []
    for coef in (0.0, 5.0):
        trained = build(
            tiny_folder,
            tmp_path / str(coef),
            rehearsal_coef=coef,
            max_steps=12,
            learning_rate=3e-3,
            reward_funcs=spoil,
        )
        trained.train()
        start, answers = harness.load(tiny_folder).eval(), build(tiny_folder, tmp_path / "rows").rehearser.answers
        policy = trained.model.eval()
        moved.append(torch.cat([logps(policy, a) - logps(start, a) for a in answers]))
    kl = [(ratios.exp() - 1 - ratios).mean().item() for ratios in moved]
    assert kl[1] < 0.5 * kl[0]


# ---- What training starts from --------------------------------------------------------------------------------------


def test_saved_log_probabilities(tiny_folder, tmp_path):
    """At a temperature the saved log-probabilities are of the tempered model, and the first log ratios are 0."""
    trained = build(tiny_folder, tmp_path, temperature=0.7, max_steps=1, rehearsal_batch_size=1)
    trained.train()
    saved = load_file(tmp_path / "rehearsal_reference.safetensors")
    parts = saved["logps"].split(saved["lengths"].tolist())
    start = harness.load(tiny_folder).eval()
    assert len(parts) == 12
    for values, answer in zip(parts, trained.rehearser.answers, strict=True):
        torch.testing.assert_close(values.double(), logps(start, answer, 0.7), rtol=0, atol=2e-5)
    assert trained.state.log_history[0]["rehearsal/logratio"] == 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_saved_log_probabilities_have_no_dropout(dropout, tiny_folder, tmp_path):
    """They are those of the model, and not of a draw of its dropout."""
    trained = build(tiny_folder, tmp_path / str(dropout), peft_config=lora(lora_dropout=dropout), max_steps=1)
    trained.train()
    start = harness.load(tiny_folder).eval()
    for values, answer in zip(trained.rehearser.start_logps, trained.rehearser.answers, strict=True):
        torch.testing.assert_close(values.double(), logps(start, answer), rtol=0, atol=2e-5)


def test_resume_reads_the_saved_file(tiny_folder, tmp_path):
    """
    A resumed run takes the log-probabilities of the start from the file, never from its own weights; without the file,
    or with other answers or another temperature, it is refused.
    """
    options = dict(max_steps=4)
    build(tiny_folder, tmp_path, callbacks=[harness.StopAt(2)], **options).train()
    with pytest.raises(ValueError, match=r"`rehearsal_dataset` is not that of the run"):
        other = Dataset.from_list(sampling.rehearsal().to_list()[::-1])
        build(tiny_folder, tmp_path, rehearsal_dataset=other, **options).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"`temperature` is not that of the run"):
        build(tiny_folder, tmp_path, temperature=0.9, **options).train(resume_from_checkpoint=True)
    (tmp_path / "rehearsal_reference.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be computed from a resumed model"):
        build(tiny_folder, tmp_path, **options).train(resume_from_checkpoint=True)


# ---- Estimators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("peft", [True, False], ids=["lora", "ref_model"])
def test_exact_is_the_enumerated_divergence(divergence, peft, tiny_folder, tmp_path):
    """
    `rehearsal_estimator="exact"`: value and gradient are those of the KL over the whole vocabulary at the answers'
    positions, enumerated in float64; the start is the model without its adapter, or `ref_model`.
    """
    more = {"peft_config": lora()} if peft else {"ref_model": harness.load(tiny_folder)}
    trained = build(
        tiny_folder,
        tmp_path,
        rehearsal_estimator="exact",
        divergence=divergence,
        temperature=0.8,
        rehearsal_batch_size=3,
        max_steps=1,
        **more,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    trained.model.train()
    trained.current_gradient_accumulation_steps = 1
    loss = trained.rehearser.loss(trained.model)
    loss.backward()
    found = {name: p.grad.double().clone() for name, p in trained.model.named_parameters() if p.grad is not None}
    trained.model.zero_grad()
    start, total, count = harness.load(tiny_folder).eval(), 0.0, 0
    for row in trained.rehearser.order.rows(0, 0):
        answer = trained.rehearser.answers[row]
        ids = torch.tensor([answer.prompt_ids + answer.completion_ids])
        where = slice(len(answer.prompt_ids) - 1, -1)
        p = (trained.model(ids).logits[0, where].double() / 0.8).log_softmax(-1)
        with torch.no_grad():
            q = (start(ids).logits[0, where].double() / 0.8).log_softmax(-1)
        first, second = (q, p) if divergence == "forward_kl" else (p, q)
        total, count = total + (first.exp() * (first - second)).sum(), count + len(p)
    expected = total / count
    assert expected > 1e-3 and loss.item() == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    largest = max(p.grad.abs().max() for p in trained.model.parameters() if p.grad is not None)
    for name, parameter in trained.model.named_parameters():
        if parameter.grad is not None:
            assert (found[name] - parameter.grad.double()).abs().max() < 1e-4 * largest, name


def test_exact_trains(tiny_folder, tmp_path):
    """A run with the exact estimator starts at 0, holds, and logs what the sampled one logs."""
    trained = build(tiny_folder, tmp_path, rehearsal_estimator="exact", peft_config=lora(), max_steps=3)
    trained.train()
    divergences = harness.column(trained, "rehearsal/divergence")
    assert divergences[0] == pytest.approx(0, abs=1e-6) and all(value > 0 for value in divergences[1:])


def test_likelihood(tiny_folder, tmp_path):
    """`rehearsal_estimator="nll"` adds the answers' mean negative log-likelihood."""
    trained = build(tiny_folder, tmp_path, rehearsal_estimator="nll", rehearsal_batch_size=2, max_steps=1)
    trained.train()
    start = harness.load(tiny_folder).eval()
    values = torch.cat([logps(start, trained.rehearser.answers[row]) for row in trained.rehearser.order.rows(0, 0)])
    assert trained.state.log_history[0]["rehearsal/divergence"] == pytest.approx(-values.mean().item(), rel=1e-5)


def test_own_divergence(tiny_folder, tmp_path):
    """A divergence of one's own, given to the trainer, is trained with and named on the card."""

    class Half(type(get_divergence("forward_kl"))):
        name = "half_forward_kl"

        def __repr__(self):
            return "Half()"

    trained = METHOD.trainer(
        model=tiny_folder,
        reward_funcs=sampling.reward,
        args=DPHRLConfig(**sampling.options_of(METHOD, tmp_path, max_steps=1)),
        train_dataset=sampling.prompts(),
        rehearsal_dataset=sampling.rehearsal(),
        divergence=Half(),
    )
    trained.train()
    assert (
        isinstance(trained.rehearser.divergence, Divergence)
        and trained.resolved_hyperparameters()["divergence"] == "Half()"
    )


# ---- Answers that are given -----------------------------------------------------------------------------------------


def test_masked_tokens_are_not_rehearsed(tiny_folder, tmp_path):
    """A token that a tool wrote is read and not rehearsed."""
    rows = [{"prompt_ids": [9, 8], "completion_ids": [7, 30, 6, 1], "completion_mask": [1, 0, 1, 1]}] * 3
    trained = build(tiny_folder, tmp_path, rehearsal_dataset=Dataset.from_list(rows), max_steps=1)
    trained.train()
    assert all(values[1] == 0 and (values[[0, 2, 3]] < 0).all() for values in trained.rehearser.start_logps)
    assert trained.rehearser.tokens_of_step() == 8 * 3
    # The weights of that token's prediction alone: nothing pulls it back once it has moved.
    masked = torch.tensor([[False, True, False, False]])
    trained.rehearser.start_logps = [values - 9.0 * masked[0] for values in trained.rehearser.start_logps]
    trained.model.train()
    assert trained.rehearser.loss(trained.model).item() == pytest.approx(
        build_loss(trained, [[1, 0, 1, 1]] * 3), rel=1e-4, abs=1e-7
    )


def build_loss(trained, masks) -> float:
    """The mean of f over the unmasked tokens of the answers, from full logits."""
    trained.model.eval()
    values = torch.cat([logps(trained.model, answer) for answer in trained.rehearser.answers])
    start = torch.cat(trained.rehearser.start_logps).double()
    ratios = (values - start)[torch.tensor(masks).flatten().bool()]
    return get_divergence("forward_kl").value(ratios).mean().item()


def test_texts_and_messages_are_tokenized_as_prompts_are(tiny_folder, tmp_path):
    """Text gets an end; messages go through the chat template; both are the tokens of the same conversation."""
    tokenizer = tiny.tokenizer()
    text = Dataset.from_list([{"prompt": "What of the film?", "completion": " The cast was warm."}])
    trained = build(tiny_folder, tmp_path, rehearsal_dataset=text)
    answer = trained.rehearser.answers[0]
    assert answer.prompt_ids == tokenizer("What of the film?")["input_ids"]
    assert tokenizer.decode(answer.completion_ids) == " The cast was warm.<|end|>"
    messages = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "What?"}],
                "completion": [{"role": "assistant", "content": "The cast."}],
            }
        ]
    )
    answer = build(tiny_folder, tmp_path, rehearsal_dataset=messages).rehearser.answers[0]
    assert tokenizer.decode(answer.prompt_ids) == "<|user|>What?<|end|><|assistant|>"
    assert tokenizer.decode(answer.completion_ids) == "The cast.<|end|>"


# ---- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, told",
    [
        ([], "`rehearsal_dataset` is empty"),
        ([{"prompt": "a"}], r"needs the columns `prompt` and `completion`"),
        ([{"prompt": "a", "completion": "b", "images": "x"}], "has the column `images`"),
        ([{"prompt": "a", "completion": ""}], r"Row 0 .* empty `completion`"),
        ([{"prompt": "a", "completion": "b " * 600}], r"Row 0 .* more than the 512"),
        ([{"prompt_ids": [1], "completion_ids": []}], r"Row 0 .* no answer"),
        ([{"prompt_ids": [1], "completion_ids": [2, -1]}], r"Row 0 .* `completion_ids` that are not"),
        ([{"prompt_ids": [1], "completion_ids": [2], "completion_mask": [1, 1]}], r"Row 0 .* 2 values"),
        ([{"prompt_ids": [1], "completion_ids": [2], "completion_mask": [0]}], r"Row 0 .* no answer"),
        (
            [
                {
                    "prompt": [{"role": "user", "content": "a"}],
                    "completion": [{"role": "assistant", "content": "b"}, {"role": "tool", "content": "c"}],
                }
            ],
            r"Row 0 .* result of a tool",
        ),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_bad_answers(rows, told, tiny_folder, tmp_path):
    with pytest.raises(ValueError, match=told):
        build(tiny_folder, tmp_path, rehearsal_dataset=Dataset.from_list(rows))


@pytest.mark.parametrize(
    "options, told",
    [
        (dict(rehearsal_coef=-1.0), "`rehearsal_coef` must be"),
        (dict(rehearsal_batch_size=0), "`rehearsal_batch_size` must be"),
        (dict(rehearsal_max_logratio=0.0), "`rehearsal_max_logratio` must be"),
        (dict(rehearsal_estimator="other"), "`rehearsal_estimator` must be"),
        (dict(divergence="other"), "Unknown divergence 'other'"),
        (dict(alpha=0.3), "does not take alpha=0.3"),
        (dict(rehearsal_estimator="exact", divergence="js"), "not supported with `divergence='js'`"),
        (dict(rehearsal_estimator="nll", divergence="js"), "`divergence='js'` has no effect"),
        (dict(rehearsal_estimator="nll", rehearsal_max_logratio=2.0), "`rehearsal_max_logratio=2.0` has no effect"),
        (dict(loss_type="other"), "`loss_type` must be"),
        (dict(sapo_temperature_neg=2.0), "`sapo_temperature_neg=2.0` has no effect with `loss_type='dapo'`"),
        (dict(entropy_target=0.3), "`entropy_target=0.3` has no effect unless `use_adaptive_entropy=True`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(options, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        DPHRLConfig(**sampling.options_of(METHOD, tmp_path, **options))


def test_bad_arguments(tiny_folder, tmp_path):
    for options, told in (
        ({"rehearsal_dataset": None}, "`rehearsal_dataset` is required with `rehearsal_coef=1`"),
        ({"rehearsal_estimator": "exact"}, "needs the model that training starts from: train an adapter"),
        ({"ref_model": harness.load(tiny_folder)}, "only `rehearsal_estimator='exact'` reads it"),
        (
            {"ref_model": harness.load(tiny_folder), "rehearsal_estimator": "exact", "peft_config": lora()},
            "Leave `ref_model` out",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            build(tiny_folder, tmp_path, **options)
    with pytest.raises(TypeError, match="`rehearsal_dataset` must be a `datasets.Dataset`.*`list`"):
        build(tiny_folder, tmp_path, rehearsal_dataset=[{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match="rehearsal dataset has a transform"):
        build(tiny_folder, tmp_path, rehearsal_dataset=sampling.rehearsal().with_transform(lambda batch: batch))
    with pytest.raises(ValueError, match="There are two divergences"):
        DPHRLConfig(str(tmp_path), use_cpu=True, bf16=False, divergence="js").get_divergence(get_divergence("neyman"))
    with pytest.raises(TypeError, match="must be a `trl_ext.losses.Divergence`"):
        DPHRLConfig(str(tmp_path), use_cpu=True, bf16=False).get_divergence("js")


def test_reentrant_checkpointing_in_several_processes(tiny_folder, tmp_path, monkeypatch):
    """Two forwards before one backward: DDP with reentrant checkpointing would fail in the first step."""
    trained = build(
        tiny_folder, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    monkeypatch.setattr(type(trained.accelerator), "num_processes", 2)
    with pytest.raises(ValueError, match="'use_reentrant': True.*several processes"):
        trained.rehearser.check_run()


# ---- Options --------------------------------------------------------------------------------------------------------

# Option -> another value than its default, and what else it needs to matter.
OWN_OPTIONS = {
    "rehearsal_coef": (2.0, {}),
    "divergence": ("js", {}),
    "alpha": (0.3, {"divergence": "alpha"}),
    "skew": (0.3, {"divergence": "skew_js"}),
    "gamma": (0.3, {"divergence": "chi_po"}),
    "rehearsal_batch_size": (3, {}),
    "rehearsal_max_logratio": (1e-3, {}),
    "rehearsal_estimator": ("nll", {}),
}


def test_every_own_option_is_tried():
    """A new option must be added above."""
    own = {name for name in DPHRLConfig.__annotations__ if not name.startswith("_")}
    assert set(OWN_OPTIONS) == own


@pytest.mark.parametrize("option", OWN_OPTIONS)
def test_own_options_change_something(option, tiny_folder, tmp_path):
    """With another value of an option the run is another one."""
    value, given = OWN_OPTIONS[option]
    runs = []
    for name, more in (("default", {}), ("other", {option: value})):
        trained = build(tiny_folder, tmp_path / name, max_steps=3, learning_rate=5e-3, **given, **more)
        trained.train()
        runs.append(harness.weights(trained.model))
    assert harness.largest_difference(*runs) > 0
