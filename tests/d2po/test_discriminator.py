"""The discriminator: what it scores, what its updates touch, replay, disagreement, and its state."""

from pathlib import Path

import harness
import online
import pytest
import tiny
import torch
from accelerate import Accelerator
from test_labellers import reward_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from trl_ext.d2po.discriminator import Discriminator, GoldExample, ModelMember, Sample
from trl_ext.judges import RewardModelJudge


def sample(prompt: list[int], completion: list[int]) -> Sample:
    return Sample("p", prompt, "c", completion)


def examples(count: int = 8, seed: int = 0) -> list[GoldExample]:
    """Comparisons of random tokens; token 300 marks the better one."""
    generator = torch.Generator().manual_seed(seed)

    def ids(size):
        return torch.randint(20, 280, (size,), generator=generator).tolist()

    return [GoldExample(sample(p := ids(4), [300] + ids(3 + i % 3)), sample(p, ids(5)), 1.0) for i in range(count)]


@pytest.fixture
def trainer(tiny_folder, tmp_path):
    return online.trainer(tiny_folder, tmp_path, labeller=online.CountedLabeller())


def margins(discriminator, gold) -> torch.Tensor:
    return torch.tensor(discriminator.score([e.a for e in gold])) - torch.tensor(
        discriminator.score([e.b for e in gold])
    )


def test_untrained_has_no_opinion(trainer):
    """With its head at zero every score is 0 and the first loss log 2, whatever the target."""
    gold = examples()
    assert trainer.discriminator.score([e.a for e in gold]) == [0.0] * 8
    trainer.discriminator.epochs, trainer.discriminator.batch_size = 1, 8
    gold[0].target, gold[1].target = 0.5, 0.0
    assert trainer.discriminator.learn(gold, 0.0) == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)


def test_updates_raise_the_margin_and_touch_nothing_else(trainer):
    """
    Updates order the comparisons and move every weight of the adapter and the head; the base and the policy's adapter
    stay bitwise, keep their `requires_grad` and mode, and get no gradient; no random state of the run is used.
    """
    before, flags = harness.weights(trainer.model), [p.requires_grad for p in trainer.model.parameters()]
    gold, state = examples(), torch.get_rng_state()
    trainer.model.train()
    trainer.discriminator.learn(gold, 0.0)
    trainer.discriminator.learn(gold, 0.0, 1)
    assert (margins(trainer.discriminator, gold) > 0).all()
    for name, after in trainer.model.named_parameters():
        assert torch.equal(before[name], after) == (".discriminator." not in name), name
        assert after.grad is None
    assert flags == [p.requires_grad for p in trainer.model.parameters()]
    assert trainer.model.training and torch.equal(state, torch.get_rng_state())
    assert trainer.discriminator.members[0].head.weight.abs().min() > 0


def test_one_step_is_adamw_on_bradley_terry(trainer):
    """
    One batch: the head's first step from zero is -lr sign of the gradient of -p log s(m) - (1-p) log s(-m) by hand.
    """
    gold = examples(4)
    for example, target in zip(gold, (1.0, 0.0, 0.5, 0.8), strict=True):
        example.target = target
    discriminator, member = trainer.discriminator, trainer.discriminator.members[0]
    discriminator.batch_size, discriminator.epochs = 4, 1
    hidden = []
    member.head.register_forward_hook(lambda module, inputs, output: hidden.append(inputs[0].detach()))
    with torch.no_grad(), member.active(training=False):
        member.score([e.a for e in gold] + [e.b for e in gold])
    a, b = hidden[0].chunk(2)
    targets = torch.tensor([e.target for e in gold])
    # At margin 0 the derivative of the loss is 1/2 - p.
    gradient = ((0.5 - targets)[:, None] * (a - b)).mean(0)
    # A dropout of the adapter changes nothing yet, as its second matrix is zero.
    discriminator.learn(gold, 0.0)
    assert torch.allclose(member.head.weight[0], -1e-2 * gradient.sign(), atol=1e-5)


def test_scores_do_not_depend_on_the_batch(trainer):
    """Padding and neighbors change nothing; prompt and completion in the other order do."""
    gold = examples()
    trainer.discriminator.learn(gold, 0.0)
    together = trainer.discriminator.score([e.a for e in gold])
    alone = [trainer.discriminator.score([e.a])[0] for e in gold]
    assert together == pytest.approx(alone, abs=1e-5)
    swapped = sample(gold[0].a.completion_ids, gold[0].a.prompt_ids)
    assert abs(trainer.discriminator.score([swapped])[0] - together[0]) > 1e-3


def test_replay(trainer, monkeypatch):
    """Fresh labels are in every pass; one k windows old with probability decay^k; with 0, fresh ones only."""
    taken = []
    monkeypatch.setattr(trainer.discriminator, "_step", lambda member, batch: taken.extend(batch) or 0.0)
    gold = examples(40)
    for i, example in enumerate(gold):
        example.age = i % 4
    trainer.discriminator.epochs = 200
    for decay in (0.0, 0.5, 1.0):
        taken.clear()
        trainer.discriminator.learn(gold, decay, decay)
        shares = [sum(e.age == age for e in taken) / (200 * 10) for age in range(4)]
        assert shares == pytest.approx([decay**age for age in range(4)], abs=0.05), decay
        assert shares[0] == 1.0
    again = list(taken)
    taken.clear()
    trainer.discriminator.learn(gold, 1.0, 1.0)
    assert [id(e) for e in taken] == [id(e) for e in again]  # the order is seeded


def test_state(trainer, tiny_folder, tmp_path):
    """Weights, moments and steps: what is restored continues as if nothing had been."""
    gold = examples()
    trainer.discriminator.learn(gold, 0.0)
    state = trainer.discriminator.state_dict()
    other = online.trainer(tiny_folder, tmp_path / "other", labeller=online.CountedLabeller())
    other.discriminator.load_state_dict(state)
    for discriminator in (trainer.discriminator, other.discriminator):
        discriminator.learn(gold, 0.0, "next")
    first, second = trainer.discriminator.state_dict(), other.discriminator.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert any("exp_avg_sq" in key for key in first)
    first.pop("weight/0.head.weight")
    with pytest.raises(ValueError, match=r"other weights than this one.*head\.weight"):
        other.discriminator.load_state_dict(first)


def test_disagreement(tiny_folder, tmp_path):
    """Dropouts of one member, or the members, disagree where they are unsure; the same seed gives the same numbers."""
    gold = examples()
    single = online.trainer(tiny_folder, tmp_path / "a", labeller=online.CountedLabeller(), selection="disagreement")
    ensemble = online.trainer(
        tiny_folder, tmp_path / "b", labeller=online.CountedLabeller(), discriminator_ensemble_size=3
    )
    assert len(ensemble.discriminator.members) == 3
    for discriminator in (single.discriminator, ensemble.discriminator):
        untrained = discriminator.disagreement([e.a for e in gold], [e.b for e in gold], 0)
        assert untrained == [0.0] * 8
        discriminator.learn(gold, 0.0)
        spread = discriminator.disagreement([e.a for e in gold], [e.b for e in gold], 0)
        assert spread == discriminator.disagreement([e.a for e in gold], [e.b for e in gold], 0)
        assert min(spread) > 1e-5 and max(spread) < 0.5 and len(set(spread)) == 8
    # The ensemble's score is the mean of its members', which differ.
    scores = ensemble.discriminator._member_scores([e.a for e in gold])
    assert scores.std(dim=0).min() > 1e-6
    assert ensemble.discriminator.score([e.a for e in gold]) == pytest.approx(scores.mean(0).tolist())


def sequence_classifier():
    """A tiny Llama classifier whose tokenizer has no pad token."""
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=1,
        initializer_range=0.5,
        pad_token_id=None,
    )
    return LlamaForSequenceClassification(config), tokenizer


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("pad_token", [None, "<|end|>", "<|pad|>"])
def test_a_model_is_read_as_its_judge_reads_it(pad_token, conversational):
    """
    A discriminator and a judge made of one reward model give every completion the same score, that of a forward by
    hand on the tokens with the end-of-sequence token, whatever the pad token; the tokenizer and the configuration stay
    as they are.
    """
    model, tokenizer = sequence_classifier()
    tokenizer.pad_token, tokenizer.padding_side = pad_token, "left"
    member = ModelMember(model, tokenizer, None, Accelerator(cpu=True))
    judge = RewardModelJudge(model, tokenizer)
    rows = [(row["prompt"], row[side]) for row in tiny.rows(6, conversational) for side in ("chosen", "rejected")]
    samples = [Sample(prompt, [7, 8], completion, [9]) for prompt, completion in rows]
    with torch.no_grad(), member.active(training=False):
        scores = member.score(samples).tolist()
    assert scores == pytest.approx(judge.rewards(*map(list, zip(*rows, strict=True))), abs=1e-5)
    for (prompt, completion), score in zip(rows, scores, strict=True):
        if conversational:
            ids = tokenizer.apply_chat_template(prompt + completion, return_dict=True)["input_ids"]
        else:
            ids = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]
        with torch.no_grad():
            assert score == pytest.approx(model(input_ids=torch.tensor([ids])).logits.item(), abs=1e-5)
    assert (tokenizer.pad_token, tokenizer.padding_side, model.config.pad_token_id) == (pad_token, "left", None)


def test_a_model_by_name_is_never_a_pickle(tmp_path):
    """A folder with a pickle only is refused by name, and nothing of it runs; the same weights in safetensors load."""
    model, tokenizer = sequence_classifier()
    for folder in ("pickle", "safetensors"):
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save({"trap": Trap()}, tmp_path / "pickle" / "pytorch_model.bin")
    for make in (RewardModelJudge, lambda name: ModelMember(name, None, None, Accelerator(cpu=True))):
        with pytest.raises(ValueError, match="pickle' has no weights in safetensors"):
            make(str(tmp_path / "pickle"))
        make(str(tmp_path / "safetensors"))
    assert not (tmp_path / "ran").exists()


def test_a_model_of_its_own():
    """A sequence classifier learns to order comparisons, through the end-of-sequence token that it reads."""
    accelerator, tokenizer = Accelerator(cpu=True), tiny.tokenizer()
    member = ModelMember(reward_model(), tokenizer, None, accelerator)
    settings = dict(learning_rate=1e-2, batch_size=4, epochs=4, dropout_samples=2, seed=0, accelerator=accelerator)
    discriminator = Discriminator([member], **settings)
    gold = [
        GoldExample(*(Sample(row["prompt"], [], row[side], []) for side in ("chosen", "rejected")), 1.0)
        for row in tiny.rows(8)
    ]
    before = margins(discriminator, gold)
    discriminator.learn(gold, 0.0)
    assert (margins(discriminator, gold) > before).all()


# ---- One row for both completions ----------------------------------------------------------------------------------


@pytest.fixture
def packed(monkeypatch) -> list[int]:
    """Tokens that each packed row shares, in order."""
    from trl_ext.preference import scoring
    from trl_ext.training import last_states

    seen, forward = [], last_states.packed_forward
    for module in (last_states, scoring):
        monkeypatch.setattr(module, "packed_forward", lambda rows: seen.append(len(rows.shared)) or forward(rows))
    return seen


def discriminate(discriminator, gold) -> tuple[list, float | None, dict]:
    """Scores, loss and state after learning; no dropout, which draws otherwise on a packed row."""
    for member in discriminator.members:
        if hasattr(member, "model"):
            member.model.train()
    samples = [sample for e in gold for sample in (e.a, e.b)]
    loss = discriminator.learn(gold, 0.0)
    return discriminator.score(samples), loss, discriminator.state_dict() if discriminator.is_trainable else {}


@pytest.mark.parametrize("kind", ["adapter", "ensemble", "model", "self"])
def test_prompts_are_scored_once(kind, tiny_folder, tmp_path, packed):
    """
    Both completions of a prompt on one row: scores equal to the bit to those of padded rows, and as close after
    learning as the rounding of gradients lets them be; padded where the run is told so.
    """
    results = []
    for shares in (None, False):
        options = dict(discriminator_lora_dropout=0.0, discriminator_batch_size=8, share_prompts=shares)
        if kind == "ensemble":
            options["discriminator_ensemble_size"] = 2
        if kind == "self":
            options["discriminator"] = "self"
        given = {}
        if kind == "model":
            given = dict(discriminator=reward_model(), discriminator_processing_class=tiny.tokenizer())
        trainer = online.trainer(
            tiny_folder, tmp_path / str(shares), labeller=online.CountedLabeller(), **options, **given
        )
        discriminator, gold = trainer.discriminator, examples()
        if kind == "model":
            for i, (example, row) in enumerate(zip(gold, tiny.rows(8), strict=True)):
                example.a, example.b = (Sample(row["prompt"], [], row[side], []) for side in ("chosen", "rejected"))
                example.target = i % 2
        else:
            with torch.no_grad():  # a head at zero would score everything alike
                for name, parameter in trainer.model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
                for member in discriminator.members:
                    if kind != "self":
                        member.head.weight.normal_(generator=torch.Generator().manual_seed(1))
        before = discriminator.score([sample for e in gold for sample in (e.a, e.b)])
        assert bool(packed) == (shares is None) and all(packed)
        results.append((before, *discriminate(discriminator, gold)))
        packed.clear()
    (scores, *after), (expected, *after_padded) = results
    assert scores == expected and len(set(scores)) == 16
    assert after[0] == pytest.approx(after_padded[0], abs=1e-4)
    if kind != "self":
        assert after[1] == pytest.approx(after_padded[1], abs=1e-5)
        for name, value in after[2].items():
            if name.startswith("weight/"):
                torch.testing.assert_close(value, after_padded[2][name], rtol=0, atol=1e-3)


def test_disagreement_of_dropouts_is_not_shared(tiny_folder, tmp_path, packed):
    """On one row both completions would see the same noise on their prompt, and their margin less of it."""
    trainer = online.trainer(tiny_folder, tmp_path, labeller=online.CountedLabeller(), selection="disagreement")
    gold = examples()
    trainer.discriminator.learn(gold, 0.0)
    assert packed
    packed.clear()
    trainer.discriminator.disagreement([e.a for e in gold], [e.b for e in gold], 0)
    assert not packed


def test_a_classifier_that_reads_more_than_the_last_token_is_padded(tiny_folder, tmp_path, packed, caplog):
    """An encoder sees the text behind a token: one line says why its prompts are not shared, and it is scored."""
    from transformers import BertConfig, BertForSequenceClassification

    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = BertForSequenceClassification(BertConfig(vocab_size=384, num_labels=1, **size))
    given = dict(discriminator=model, discriminator_processing_class=tiny.tokenizer())
    trainer = online.trainer(tiny_folder, tmp_path, labeller=online.CountedLabeller(), **given)
    with caplog.at_level("WARNING", logger="trl_ext"):
        scores = trainer.discriminator.score([Sample("p", [], text, []) for text in ("one", "two", "three", "four")])
    assert len(set(scores)) == 4 and not packed
    assert "BertForSequenceClassification" in caplog.text and caplog.text.count("Prompts are not shared") == 1


def test_implicit_reward(tiny_folder, tmp_path):
    """
    Self-rewarding scores a completion by its log ratio given its prompt, from full log-softmax: 0 at the reference,
    without gradient or dropout; it has nothing of its own to learn.
    """
    trainer = online.trainer(tiny_folder, tmp_path, labeller=online.CountedLabeller(), discriminator="self")
    gold = examples()
    assert trainer.discriminator.score([e.a for e in gold]) == pytest.approx([0.0] * 8, abs=1e-5)
    assert trainer.discriminator.learn(gold, 0.0) is None and not trainer.discriminator.is_trainable
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    scores = trainer.discriminator.score([e.a for e in gold])
    for example, score in zip(gold, scores, strict=True):
        ids = torch.tensor([example.a.prompt_ids + example.a.completion_ids])
        with torch.no_grad():
            policy = trainer.model(ids).logits.log_softmax(-1)
            with trainer.model.disable_adapter():
                reference = trainer.model(ids).logits.log_softmax(-1)
        ratios = (policy - reference)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        assert score == pytest.approx(ratios[len(example.a.prompt_ids) - 1 :].sum().item(), abs=1e-4)
    assert max(abs(score) for score in scores) > 0.05
