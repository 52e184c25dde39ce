"""
Where Mallows-DPO's weights come from: the reference's entropy or a column of the data, never the policy; and kappa.

Several of these are faults of the released code or of its copies, which the tests name.
"""

import json
import math

import harness
import pytest
import tiny
import torch
from datasets import IterableDataset
from methods import BY_ID
from peft import LoraConfig

from trl_ext import MallowsDPOConfig, RainbowPOConfig


MALLOWS, PHI, RAINBOW = BY_ID["mallows"], BY_ID["mallows_phi"], BY_ID["rainbowpo"]
both_trainers = pytest.mark.parametrize("method", [MALLOWS, RAINBOW], ids=lambda method: method.id)


def weights_of(trainer, inputs) -> tuple[torch.Tensor, dict]:
    """Weights of the pairs of a batch, and what is logged of them."""
    trainer.model.eval()
    with torch.no_grad():
        sides = trainer._score_responses(trainer.score_policy(trainer.model, inputs), inputs)
        return trainer.pair_weights(*sides)


def displace(model, seed=7, only="") -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


# ---- Whose entropy --------------------------------------------------------------------------------------------------


@both_trainers
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_weights_are_the_references(method, peft, tiny_folder, tmp_path):
    """
    Moving the policy leaves the weights bitwise as they are, and they are those of the reference's full logits.
    (Copies of the method take the policy's entropy.) No gradient reaches the reference.
    """
    peft_config = LoraConfig(r=4, target_modules="all-linear") if peft else None
    trainer = harness.trainer(method, tiny_folder, tmp_path, peft_config=peft_config)
    inputs = harness.batch(trainer, 6)
    before, _ = weights_of(trainer, inputs)
    displace(trainer.model, only="lora_B" if peft else "")
    after, logged = weights_of(trainer, inputs)
    assert torch.equal(before, after) and not after.requires_grad and before.std() > 1e-4
    with torch.no_grad():
        sides = harness.sides(harness.load(tiny_folder).eval().double(), inputs, torch.float64)
    index = (sides[0].mean_entropy + sides[1].mean_entropy) / 2
    torch.testing.assert_close(logged["dispersion/index"].double(), index, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.double(), -1.5 * index.log(), rtol=1e-5, atol=1e-6)
    trainer.compute_loss(trainer.model, inputs).backward()
    if not peft:
        assert all(parameter.grad is None for parameter in trainer.ref_model.parameters())
        assert any(parameter.grad is not None for parameter in trainer.model.parameters())


def test_order_of_the_vocabulary_does_not_matter(tiny_folder, tmp_path):
    """Permuting the rows of the reference's head permutes the symbols, and an entropy knows no names."""
    weights = []
    for permuted in (False, True):
        reference = harness.load(tiny_folder)
        if permuted:
            order = torch.randperm(384, generator=torch.Generator().manual_seed(0))
            reference.lm_head.weight.data = reference.lm_head.weight.data[order]
        trainer = harness.trainer(MALLOWS, tiny_folder, tmp_path, ref_model=reference)
        weights.append(weights_of(trainer, harness.batch(trainer))[0])
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_vocabulary_is_the_heads(peft, tiny_folder, tmp_path):
    """
    H is divided by the logarithm of the rows of the head, padded ones included, as in the released code; not by the
    size of the tokenizer, which is smaller.
    """
    models = [harness.load(tiny_folder) for _ in range(2)]
    for model in models:
        model.resize_token_embeddings(512)
    assert len(tiny.tokenizer()) < 512
    reference = dict(peft_config=LoraConfig(r=4, target_modules="all-linear")) if peft else dict(ref_model=models[1])
    trainer = harness.trainer(MALLOWS, models[0], tmp_path, processing_class=tiny.tokenizer(), **reference)
    entropy = torch.tensor([math.log(512), math.log(8)])
    assert trainer.method._normalized(entropy).tolist() == pytest.approx([1.0, 1 / 3])


@pytest.mark.parametrize("method", [MALLOWS, PHI, RAINBOW], ids=lambda method: method.id)
@pytest.mark.parametrize("scale, clamped_at", [(1e5, 1e-4), (0.0, 1 - 1e-4)], ids=["deterministic", "uniform"])
def test_entropies_at_the_ends(method, scale, clamped_at, tiny_folder, tmp_path):
    """
    A deterministic reference has H = 0 and, in the released code, an infinite weight and a loss of inf * 0 = NaN; a
    uniform one has H = 1, the weight 0 and nothing to teach. Both are clamped, and the share is logged.
    """
    reference = harness.load(tiny_folder)
    reference.lm_head.weight.data.mul_(scale)
    trainer = harness.trainer(method, tiny_folder, tmp_path, ref_model=reference, max_steps=2)
    trainer.train()
    kappa, entry = trainer.args.kappa, trainer.state.log_history[0]
    assert entry["dispersion/clamped"] == 1.0
    assert entry["dispersion/weight"] == pytest.approx(-kappa * math.log(clamped_at), rel=1e-3)
    assert math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"])
    if scale == 0.0:
        assert entry["loss"] == pytest.approx(math.log(2), abs=1e-2) and entry["grad_norm"] < 0.1


@both_trainers
def test_mixture_of_experts(method, tmp_path):
    """With the balancing loss on, the weight is still of the entropy. (The released code takes the auxiliary loss.)"""
    from test_method_suite import moe_folder

    folder = moe_folder(tmp_path)
    found = []
    for coefficient in (0.0, 0.5):
        trainer = harness.trainer(method, folder, tmp_path / f"{coefficient}", router_aux_loss_coef=coefficient)
        assert trainer.aux_loss_enabled == bool(coefficient)
        found.append(weights_of(trainer, harness.batch(trainer))[0])
    assert torch.equal(*found) and found[0].std() > 1e-4


# ---- A column of dispersions ----------------------------------------------------------------------------------------


def rated(values, seed=0):
    return tiny.dataset(len(values), seed=seed).add_column("dispersion", values)


@both_trainers
def test_column(method, tiny_folder, tmp_path):
    """Its values are the dispersions, in training, evaluation and prediction; no entropy is asked of the reference."""
    values = [0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.9, 1.0]
    trainer = harness.trainer(
        method,
        tiny_folder,
        tmp_path,
        train_dataset=rated(values),
        eval_dataset={"own": rated([0.5] * 4, seed=1)},
        dispersion_column="dispersion",
        max_steps=1,
        per_device_train_batch_size=8,
    )
    assert trainer.reference_statistics == ("logps",)
    inputs = harness.batch(trainer, 8)
    sides = trainer._score_responses(trainer.score_policy(trainer.model, inputs), inputs)
    assert sides[0].ref_entropy is None
    weight, _ = trainer.pair_weights(*sides)
    expected = [-1.5 * math.log(min(max(value, 1e-4), 1 - 1e-4)) for value in values]
    assert weight.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["dispersion/index"] == pytest.approx(3.5 / 8) and entry["dispersion/clamped"] == 2 / 8
    trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_own_dispersion/weight"] == pytest.approx(1.5 * math.log(2), rel=1e-5)
    assert trainer.predict(rated([0.25] * 4)).metrics["test_dispersion/index"] == pytest.approx(0.25)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), None])
def test_impossible_dispersions(value, streaming, tiny_folder, tmp_path):
    """A value that is no dispersion is refused with its row; so is a number of raters, or a standard deviation."""
    data = rated([0.5, 0.5, value, 0.5])
    if streaming:
        rows = list(data)
        data = IterableDataset.from_generator(lambda: iter(rows))
    finite = isinstance(value, float) and math.isfinite(value)
    message = r"which is not in \[0, 1\]" if finite else "which is not a finite number"
    with pytest.raises(ValueError, match=rf"Row 2 of the train dataset has `dispersion={value}`, {message}"):
        harness.trainer(
            MALLOWS, tiny_folder, tmp_path, train_dataset=data, dispersion_column="dispersion", max_steps=2
        ).train()


def test_missing_column(tiny_folder, tmp_path):
    """Training and evaluation data must have it."""
    for train, evaluation, name in ((tiny.dataset(4), None, "train"), (rated([0.5] * 4), tiny.dataset(4), "eval")):
        with pytest.raises(ValueError, match=f"The {name} dataset has no column `dispersion`.*Add the column"):
            harness.trainer(
                MALLOWS,
                tiny_folder,
                tmp_path,
                train_dataset=train,
                eval_dataset=evaluation,
                dispersion_column="dispersion",
            )


def test_unread_column_is_said(tiny_folder, tmp_path, caplog):
    """A column of that name which nobody asked for is not read, and not silently."""
    trainer = harness.trainer(MALLOWS, tiny_folder, tmp_path, train_dataset=rated([0.5] * 8))
    assert "`dispersion_column='dispersion'` to read it" in caplog.text
    weights, _ = weights_of(trainer, harness.batch(trainer, 8))
    assert weights.std() > 1e-4


# ---- kappa ----------------------------------------------------------------------------------------------------------


def all_weights(trainer) -> torch.Tensor:
    return weights_of(trainer, harness.batch(trainer, len(trainer.train_dataset)))[0]


@both_trainers
@pytest.mark.parametrize("precompute", [False, True], ids=["forward", "precomputed"])
def test_auto_kappa(method, precompute, tiny_folder, tmp_path):
    """The weights of the training set average 1, and the pairs keep their differences."""
    trainer = harness.trainer(
        method, tiny_folder, tmp_path, kappa="auto", precompute_ref_log_probs=precompute, max_steps=1
    )
    assert "kappa" not in trainer._progress.estimates  # nothing is run before it is needed
    trainer.train()
    weights = all_weights(trainer)
    assert weights.mean().item() == pytest.approx(1.0, rel=1e-5) and weights.std() > 1e-3
    fixed = harness.trainer(method, tiny_folder, tmp_path / "fixed", kappa=trainer.kappa, max_steps=1)
    fixed.train()
    assert fixed.state.log_history[0]["loss"] == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-6)


@both_trainers
def test_estimated_kappa_is_told(method, tiny_folder, tmp_path, capsys, caplog):
    """On the console, once, and in the log; nothing is warned of, as the weights average 1."""
    trainer = harness.trainer(method, tiny_folder, tmp_path, kappa="auto", max_steps=9)
    trainer.train()
    assert capsys.readouterr().out.count(f"kappa = {trainer.kappa:.6g}, ") == 1
    assert harness.column(trainer, "dispersion/kappa") == pytest.approx([trainer.kappa] * 9, rel=1e-6)
    assert not any("weights of the first" in message for message in caplog.messages)
    fixed = harness.trainer(method, tiny_folder, tmp_path / "fixed", kappa=trainer.kappa, max_steps=1)
    fixed.train()
    assert not harness.column(fixed, "dispersion/kappa")


@both_trainers
@pytest.mark.parametrize("factor, warned", [(0.03, True), (0.45, True), (0.6, False), (1.8, False), (2.4, True)])
def test_weights_far_from_one_are_warned_of(method, factor, warned, tiny_folder, tmp_path, caplog):
    """Of a kappa with which the first 32 weights average less than 0.5 or more than 2: once, with beta as it acts."""
    values = [0.1 + 0.02 * (i % 4) for i in range(32)]
    mean = -sum(map(math.log, values)) / 32
    data = tiny.dataset(32).add_column("votes", values)
    more = {"dispersion_column": "votes", "kappa": factor / mean, "train_dataset": data}
    trainer = harness.trainer(method, tiny_folder, tmp_path, max_steps=7, **more)
    trainer.train()
    assert not any("weights of the first" in message for message in caplog.messages)  # 28 pairs were seen
    trainer = harness.trainer(method, tiny_folder, tmp_path, max_steps=9, **more)
    trainer.train()
    found = [message for message in caplog.messages if "weights of the first" in message]
    assert len(found) == warned
    if warned:
        acts = f"`beta={trainer.args.beta:g}` acts like {trainer.args.beta * factor:.3g}"
        assert f"average {factor:.3g} " in found[0] and acts in found[0] and "kappa='auto'" in found[0]


def test_auto_kappa_of_a_column(tiny_folder, tmp_path):
    """From the dispersions that people gave: 1 / mean(-log d)."""
    values = [0.1, 0.2, 0.4, 0.8]
    data = dict(train_dataset=rated(values), dispersion_column="dispersion")
    trainer = harness.trainer(MALLOWS, tiny_folder, tmp_path, kappa="auto", **data)
    assert trainer.kappa == pytest.approx(-4 / sum(math.log(value) for value in values), rel=1e-6)
    votes = dict(train_dataset=rated([0, 1, 0, 1]), dispersion_column="dispersion")  # integers are numbers too
    trainer = harness.trainer(MALLOWS, tiny_folder, tmp_path, kappa="auto", **votes)
    assert trainer.kappa == pytest.approx(-2 / (math.log(1e-4) + math.log1p(-1e-4)), rel=1e-4)


def test_auto_kappa_of_a_part(tiny_folder, tmp_path, monkeypatch):
    """`num_kappa_samples` evenly spaced pairs are scored and no others; `None` takes all."""
    seen = []
    for samples, rows in ((4, [0, 8, 16, 24]), (5, [0, 6, 12, 19, 25]), (None, list(range(32)))):
        trainer = harness.trainer(
            MALLOWS, tiny_folder, tmp_path, kappa="auto", num_kappa_samples=samples, per_device_eval_batch_size=3
        )
        original = trainer.method._dispersions_of
        monkeypatch.setattr(
            trainer.method, "_dispersions_of", lambda part, f=original: (seen.extend(part), f(part))[1]
        )
        kappa = trainer.kappa
        assert seen == rows
        part = weights_of(trainer, trainer.data_collator([trainer.train_dataset[i] for i in rows]))[0]
        assert part.mean().item() == pytest.approx(1.0, rel=1e-5) and trainer.kappa == kappa
        seen.clear()


def test_auto_kappa_over_processes(tiny_folder, tmp_path, monkeypatch):
    """
    Seven pairs over three processes: each counts once, each process runs as many forwards, all get the same number.
    """
    trainer = harness.trainer(
        MALLOWS, tiny_folder, tmp_path, train_dataset=tiny.dataset(7), kappa="auto", per_device_eval_batch_size=2
    )
    whole, sums, forwards = trainer.kappa, [], []
    score = trainer.score_reference
    monkeypatch.setattr(trainer, "score_reference", lambda inputs: (forwards.append(1), score(inputs))[1])
    accelerator = type(trainer.accelerator)
    monkeypatch.setattr(accelerator, "num_processes", 3)
    monkeypatch.setattr(accelerator, "reduce", lambda self, value, reduction: (sums.append(value), value)[1])
    for rank in range(3):
        monkeypatch.setattr(accelerator, "process_index", rank)
        trainer.method._estimate_kappa()
    assert len(forwards) == 3 * 2  # three pairs each, two a forward
    assert 7 / sum(value.item() for value in sums) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("restore", [False, True])
def test_kappa_is_kept_in_checkpoints(restore, tiny_folder, tmp_path, monkeypatch):
    """
    A resumed run takes kappa from the checkpoint, does not estimate it anew, although its data has changed, and goes
    on bitwise as the uninterrupted run.
    """

    def build(name, **options):
        return harness.trainer(
            MALLOWS, tiny_folder, tmp_path / name, kappa="auto", max_steps=6, logging_steps=2, **options
        )

    whole = build("whole")
    whole.train()
    build("stopped", callbacks=[harness.StopAt(3)]).train()
    state = json.loads((tmp_path / "stopped" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["PreferenceProgress"]["args"]["estimates"] == {"kappa": whole.kappa}
    resumed = build("stopped", restore_callback_states_from_checkpoint=restore)
    monkeypatch.setattr(resumed.method, "_estimate_kappa", lambda: pytest.fail("estimated anew"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))
    assert resumed.kappa == whole.kappa
    assert harness.largest_difference(harness.weights(whole.model), harness.weights(resumed.model)) == 0
    harness.assert_same_logs(harness.logs(whole), harness.logs(resumed))


@both_trainers
def test_kappa_is_on_the_card(method, tiny_folder, tmp_path):
    """The estimate, and that it is one; a given number as it is, without the options of an estimate."""
    trainer = harness.trainer(method, tiny_folder, tmp_path / "auto", kappa="auto", max_steps=1)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "auto" / "README.md").read_text()
    assert f"`{trainer.kappa:.6g}, estimated`" in card and "num_kappa_samples" in card
    fixed = harness.trainer(method, tiny_folder, tmp_path / "fixed", kappa=0.7)
    fixed.create_model_card()
    card = (tmp_path / "fixed" / "README.md").read_text()
    assert "`0.7`" in card and "num_kappa_samples" not in card


def test_auto_kappa_needs_a_length(tiny_folder, tmp_path):
    """A stream has no whole to average over; with a number it trains."""
    data = IterableDataset.from_generator(lambda: iter(tiny.rows(8)))
    with pytest.raises(
        ValueError, match="`kappa='auto'` is estimated from the whole training set.*streaming.*Give a num"
    ):
        harness.trainer(MALLOWS, tiny_folder, tmp_path, train_dataset=data, kappa="auto")


# ---- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [MallowsDPOConfig, RainbowPOConfig])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"kappa": 0.0}, "`kappa` must be a positive, finite number or 'auto', got 0.0"),
        ({"kappa": "automatic"}, "`kappa` must be a positive, finite number or 'auto', got 'automatic'"),
        ({"kappa": None}, "`kappa` must be a positive, finite number or 'auto', got None"),
        ({"kappa": math.inf}, "`kappa` must be a positive, finite number or 'auto', got inf"),
        ({"kappa": True}, "`kappa` must be a positive, finite number or 'auto', got True"),
        ({"num_kappa_samples": 0}, "`num_kappa_samples`.*got 0"),
        ({"kappa": 0.3, "num_kappa_samples": 8}, "`num_kappa_samples=8` has no effect with `kappa=0.3`"),
        ({"dispersion_column": ""}, "`dispersion_column`.*got ''"),
        ({"link": "theta"}, "link.*'sigmoid'.*got 'theta'"),
    ],
    ids=str,
)
def test_bad_options(config, options, message):
    with pytest.raises(ValueError, match=message):
        config("unused", use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize("given, kappa", [("auto", "auto"), ("0.29", 0.29)])
def test_kappa_on_the_command_line(given, kappa):
    """A number or the word, as text."""
    from trl import TrlParser

    (args,) = TrlParser((MallowsDPOConfig,)).parse_args_and_config(
        ["--output_dir", "unused", "--kappa", given, "--use_cpu", "true", "--bf16", "false"]
    )
    assert args.kappa == kappa


def test_links_differ(tiny_folder, tmp_path):
    """Each link trains its own loss from the same start, where the first two agree."""
    losses = {}
    for link in ("sigmoid", "phi", "ipo"):
        trainer = harness.trainer(MALLOWS, tiny_folder, tmp_path / link, link=link, max_steps=3)
        trainer.train()
        losses[link] = harness.column(trainer, "loss")
    assert losses["sigmoid"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses["phi"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses["ipo"][0] == pytest.approx(25.0, rel=1e-6)  # (1 / (2 beta))^2
    assert len({round(values[-1], 4) for values in losses.values()}) == 3
