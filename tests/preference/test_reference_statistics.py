"""
What a method reads of the reference, and of further columns of the dataset: the same numbers wherever they come from.

The expected values are computed from full logits in float64. The model computes in fp32; log-probabilities of about
100 nats and entropies of about 5 must agree to 1e-5 of their size.
"""

import gc
import math

import harness
import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from reading import Reading, make, nearby
from transformers import Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from trl_ext.preference import PairLoss, PreferenceConfig, PreferenceTrainer


class EntropyOnly(PreferenceTrainer):
    """Reads the reference's entropy alone; or nothing of it, with `beta=1`. Takes its margin from a column."""

    _name = "Entropy only"
    reference_statistics = ("entropy",)
    extra_columns = ("margin",)

    def _needed_reference_statistics(self, args):
        return () if args.beta == 1 else self.reference_statistics

    def pair_loss(self, chosen, rejected):
        self.seen = chosen, rejected
        margin = chosen.mean_logps - rejected.mean_logps - chosen.columns["margin"]
        if self.needs_reference:
            margin = margin / (1 + chosen.ref_entropy)
        rewards = (side.mean_logps.detach() for side in (chosen, rejected))
        return PairLoss(-torch.nn.functional.logsigmoid(margin), *rewards)


def expected(reference, inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(logps, mean entropy) of both sides under `reference`, from full logits in float64."""
    with torch.no_grad():
        if not isinstance(reference, Qwen2MoeForCausalLM):  # whose grouped GEMM knows no float64
            reference = reference.double()
        sides = harness.sides(reference.eval(), inputs, dtype=torch.float64)
    entropies = [-(side.logprobs.exp() * side.logprobs).sum(-1) * side.mask for side in sides]
    return [(side.logps, h.sum(-1) / side.mask.sum(-1)) for side, h in zip(sides, entropies, strict=True)]


def assert_reads(trainer, reference, inputs=None) -> None:
    inputs = harness.batch(trainer) if inputs is None else inputs
    trainer.compute_loss(trainer.model, inputs)
    for side, (logps, entropy) in zip(trainer.seen, expected(reference, inputs), strict=True):
        torch.testing.assert_close(side.ref_logps.double(), logps, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(side.ref_entropy.double(), entropy, rtol=1e-5, atol=1e-5)
        assert side.ref_entropy.shape == (len(logps),) and side.ref_entropy.dtype == torch.float32
        assert not side.ref_entropy.requires_grad and not side.ref_logps.requires_grad
        assert entropy.std() > 1e-3  # the responses differ, so agreement means something


@pytest.mark.parametrize("one_pass", [False, True], ids=["forward", "one-pass"])
@pytest.mark.parametrize("reference", ["separate", "adapter off", "ref adapter"])
def test_reference_of_every_kind(reference, one_pass, tiny_folder, tmp_path):
    """
    The numbers are the reference's own, not the policy's, which is displaced: of a second model, of the base under an
    adapter, of the frozen copy of an adapter; by a forward of its own and in the pass that also gives the token KL.
    """
    options = dict(log_token_kl=one_pass, gradient_checkpointing=reference == "separate")
    lora = LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"])
    if reference == "separate":
        ref_model = nearby(harness.load(tiny_folder))
        trainer = make(Reading, tiny_folder, tmp_path, ref_model=nearby(harness.load(tiny_folder)), **options)
    elif reference == "adapter off":
        ref_model = harness.load(tiny_folder)
        trainer = make(Reading, tiny_folder, tmp_path, peft_config=lora, **options)
        nearby(trainer.model, only="lora_B")
    else:
        policy, ref_model = (nearby(get_peft_model(harness.load(tiny_folder), lora), only="lora_") for _ in range(2))
        policy.load_state_dict(ref_model.state_dict())
        trainer = make_from(policy, tiny_folder, tmp_path, **options)
        nearby(trainer.model, seed=8, only=".default.")
    trainer.model.train()
    assert_reads(trainer, ref_model)
    assert (trainer.seen[0].token_kl is not None) == one_pass
    with torch.no_grad():
        policy = trainer.score_policy(trainer.model, harness.batch(trainer)).per_response("entropy").chunk(2)[0]
    assert (policy - trainer.seen[0].ref_entropy).abs().max() > 1e-3


def make_from(model, folder, tmp_path, **options):
    args = PreferenceConfig(**{**harness.defaults(tmp_path), **options})
    return Reading(model=model, args=args, train_dataset=tiny.dataset(8), processing_class=tiny.tokenizer())


@pytest.mark.parametrize("peft", [False, True], ids=["separate", "adapter off"])
def test_entropy_is_not_the_auxiliary_loss(peft, tmp_path):
    """
    With a mixture of experts and its balancing loss on, the entropy stays the entropy. (The released Mallows-DPO code
    reads the auxiliary loss in its place.)
    """
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        tie_word_embeddings=False,
    )
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    tiny.tokenizer().save_pretrained(tmp_path / "moe")
    trainer = make(
        Reading,
        str(tmp_path / "moe"),
        tmp_path,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if peft else None,
    )
    assert trainer.aux_loss_enabled
    reference = Qwen2MoeForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    reference.config.output_router_logits = False
    assert_reads(trainer, reference)
    trainer.train()


def test_images(tmp_path):
    """Batches with pixels: the entropy of a vision-language reference."""
    folder = tiny.save_vision(tmp_path / "model")
    trainer = make(Reading, folder, tmp_path, train_dataset=tiny.vision_dataset(8), max_length=None, max_steps=1)
    trainer.train()
    chosen, rejected = trainer.seen
    for side in (chosen, rejected):
        assert side.ref_entropy.shape == (4,) and (side.ref_entropy > 0).all()
        assert (side.ref_entropy < math.log(len(trainer.model.get_output_embeddings().weight))).all()


@pytest.mark.parametrize("beta, statistics", [(0.1, ("entropy",)), (1.0, ())])
def test_needs_follow_the_configuration(beta, statistics, tiny_folder, tmp_path):
    """
    A method that reads the entropy alone is given it alone, and logs nothing that needs the log-probability;
    configured to read nothing of the reference it holds no second model, though its class does.
    """
    data = tiny.dataset(8).add_column("margin", [0.1] * 8)

    def models():
        gc.collect()
        return {id(model) for model in gc.get_objects() if type(model) is Qwen2ForCausalLM}

    before = models()
    trainer = make(EntropyOnly, tiny_folder, tmp_path, train_dataset=data, beta=beta, max_steps=1)
    assert trainer.reference_statistics == statistics
    assert trainer.needs_reference == bool(statistics) and len(models() - before) == 1 + bool(statistics)
    trainer.train()
    chosen, _ = trainer.seen
    assert (chosen.ref_entropy is not None) == bool(statistics)
    assert chosen.ref_logps is None
    assert not [key for key in trainer.state.log_history[0] if key.startswith(("logratios", "ranking_accuracy/ref"))]
    with pytest.raises(ValueError, match="log-probability, but its trainer does not list it.*`reference_statistics`"):
        _ = chosen.logratios
    assert EntropyOnly.reference_statistics == ("entropy",) and EntropyOnly.needs_reference  # the class is untouched


@pytest.mark.parametrize("option", ["precompute_ref_log_probs", "sync_ref_model", "log_token_kl"])
def test_options_without_a_reference_are_refused(option, tiny_folder, tmp_path):
    data = tiny.dataset(8).add_column("margin", [0.1] * 8)
    with pytest.raises(ValueError, match=f"`{option}=True` has no effect: Entropy only, as configured, uses no ref"):
        make(EntropyOnly, tiny_folder, tmp_path, train_dataset=data, beta=1.0, **{option: True})
    with pytest.raises(ValueError, match="`ref_model` was given.*uses no reference model with these options"):
        make(EntropyOnly, tiny_folder, tmp_path, train_dataset=data, beta=1.0, ref_model=harness.load(tiny_folder))


def test_unknown_statistics_are_refused(tiny_folder, tmp_path):
    class Wrong(Reading):
        reference_statistics = ("logps", "variance")

    with pytest.raises(ValueError, match=r"unknown reference statistics \['variance'\].*Known are.*'entropy'"):
        make(Wrong, tiny_folder, tmp_path)


# ---- Columns --------------------------------------------------------------------------------------------------------


def with_margin(count=8, seed=0):
    return tiny.dataset(count, seed=seed).add_column("margin", [0.25 * i for i in range(count)])


def test_columns_reach_the_loss(tiny_folder, tmp_path):
    """
    Of the training set, of evaluation sets (a dictionary of them), and of sets given later; rows keep their number.
    """
    trainer = make(
        EntropyOnly,
        tiny_folder,
        tmp_path,
        train_dataset=with_margin(),
        eval_dataset={"a": with_margin(4, seed=1), "b": with_margin(4, seed=2)},
        max_steps=1,
        learning_rate=0.0,
    )
    trainer.train()
    assert set(trainer.seen[0].columns["margin"].tolist()) < {0.25 * i for i in range(8)}
    assert len(set(trainer.seen[0].columns["margin"].tolist())) == 4
    trainer.evaluate()
    for data in (with_margin(4, seed=3), Dataset.from_list(list(with_margin(4, seed=3)))):
        trainer.evaluate(data)
        assert trainer.seen[0].columns["margin"].tolist() == [0.0, 0.25, 0.5, 0.75]
        assert trainer.seen[1].columns["margin"].dtype == torch.float32
    assert "test_loss" in trainer.predict(with_margin(4, seed=4)).metrics
    assert trainer.seen[0].columns["margin"].tolist() == [0.0, 0.25, 0.5, 0.75]


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_bad_columns_are_refused(streaming, tiny_folder, tmp_path):
    rows = list(with_margin())
    kind = stream if streaming else Dataset.from_list
    trainer = make(EntropyOnly, tiny_folder, tmp_path, train_dataset=kind(rows), max_steps=1)
    trainer.train()
    assert trainer.seen[0].columns["margin"].shape == (4,)
    without = kind([{key: value for key, value in row.items() if key != "margin"} for row in rows])
    with pytest.raises(ValueError, match="train dataset has no column `margin`.*it has.*Add the column"):
        make(EntropyOnly, tiny_folder, tmp_path, train_dataset=without, max_steps=1)
    for bad in (None, float("nan"), float("inf")):
        broken = kind([dict(row, margin=bad if i == 3 else 0.5) for i, row in enumerate(rows)])
        with pytest.raises(ValueError, match=f"Row 3 of the train dataset has `margin={bad!r}`.*not a finite number"):
            make(EntropyOnly, tiny_folder, tmp_path, train_dataset=broken, max_steps=1).train()
