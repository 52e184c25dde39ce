"""A `Reference` on its own, without a trainer: each kind, its scores, its checks and its place in the cache."""

import copy

import pytest
import tiny
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from reading import nearby

from trl_ext import FDPOConfig, SimPERConfig, TDPOConfig
from trl_ext._trl import DataCollatorForPreference
from trl_ext.fdpo.fdpo_trainer import FDPO
from trl_ext.preference.reference import Reference
from trl_ext.preference.reference_cache import add_reference_statistics
from trl_ext.preference.scoring import ResponseScores
from trl_ext.simper.simper_trainer import SimPER
from trl_ext.tdpo.tdpo_trainer import TDPO
from trl_ext.training.scoring_head import add_scoring_head


ROWS = [{"prompt_ids": [5, 6, 7 + i], "chosen_ids": [20 + i, 21, 1], "rejected_ids": [30, 1]} for i in range(4)]


@pytest.fixture
def base():
    model = tiny.model(attention_dropout=0.3).train()
    add_scoring_head(model)
    return model


def lora(model, **options):
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], **options))


def reference(policy, ref_model=None, method=FDPO, config=FDPOConfig, step=0, is_in_memory=True, **options):
    args = config("unused", use_cpu=True, bf16=False, report_to="none", **options)
    accelerator = Accelerator(cpu=True)  # after `args`, which resets its state
    made = Reference(
        ref_model,
        method=method(args),
        args=args,
        policy=lambda: policy,
        accelerator=lambda: accelerator,
        step=lambda: step,
        is_in_memory=is_in_memory,
    )
    made.attach(made.take_argument())
    return made


def batch() -> dict:
    return DataCollatorForPreference(pad_token_id=0)(ROWS)


def logps(model) -> torch.Tensor:
    """Log-probability of each response from full logits."""
    inputs = batch()
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    of_token = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return (of_token * inputs["completion_mask"][:, 1:]).sum(1)


@pytest.mark.parametrize("kind", ["given", "loaded", "adapter off", "frozen adapter", "policy"])
def test_scores_are_those_of_what_it_is(kind, base):
    policy, given, expected = base, None, copy.deepcopy(base).eval()
    if kind == "given":
        given = nearby(copy.deepcopy(base))
        expected = copy.deepcopy(given).eval()
    elif kind.endswith(("off", "adapter")):
        policy = lora(base, lora_dropout=0.3)
        if kind == "frozen adapter":
            policy.add_adapter("ref", policy.peft_config["default"])
            nearby(policy, only="lora_B.ref")
            policy.set_adapter("ref")
            expected = copy.deepcopy(policy).eval()
            policy.set_adapter("default")
        nearby(policy, only="lora_B.default")
    made = reference(policy, given)
    if kind == "loaded":
        made.attach(expected)
        add_scoring_head(expected)
    elif kind == "given":
        add_scoring_head(given)
    policy.train()
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert made.kind == kind
    assert made.score(batch()).per_response("logps") == pytest.approx(logps(expected), abs=1e-5)
    assert policy.training and trained == [n for n, parameter in policy.named_parameters() if parameter.requires_grad]


def test_no_reference(base):
    made = reference(base, method=SimPER, config=SimPERConfig)
    assert made.kind == "none" and made.model is None


def test_separate_reference_is_checked(base):
    with pytest.raises(ValueError, match="`ref_model` has 128 entries, that of the policy 384"):
        reference(base, tiny.model(vocab_size=128))
    scaled = tiny.model()
    scaled.config.logit_scale = 0.5
    reference(base, copy.deepcopy(scaled))
    with pytest.raises(ValueError, match="scaled and soft-capped by"):
        reference(base, scaled, method=TDPO, config=TDPOConfig)


def test_loaded_reference_follows_the_policy_in_memory(base):
    nearby(base)
    for is_in_memory in (True, False):
        loaded = tiny.model()
        reference(base, is_in_memory=is_in_memory).attach(loaded)
        same = all(torch.equal(a, b) for a, b in zip(base.parameters(), loaded.parameters(), strict=True))
        assert same == is_in_memory


def test_trained_parameters_outside_the_adapter(base):
    policy = lora(base)
    made = reference(policy)
    made.check_frozen()
    base.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        made.check_frozen()
    reference(policy, tiny.model()).check_frozen()  # a separate one does not change


def responses(log_ratio: float) -> tuple[ResponseScores, ResponseScores]:
    mask = torch.ones(2, 3, dtype=torch.bool)
    side = ResponseScores(mask, torch.full((2, 3), log_ratio / 3), ref_logps=torch.zeros(2))
    return side, copy.deepcopy(side)


def test_start(base, caplog):
    """Once: in the first batch of a policy that has not moved, again in evaluation mode before anything is said."""

    def again(log_ratio):
        def score():
            assert not base.training
            return responses(log_ratio)

        return score

    made = reference(base)
    with pytest.raises(ValueError, match="does not start at its reference.*0.2 nats"):
        made.check_start(*responses(0.1), again(0.2))
    made.check_start(*responses(0.1), again(0.2))
    reference(base).check_start(*responses(0.0), again(0.2))
    assert "noisy" not in caplog.text
    reference(base).check_start(*responses(0.1), again(0.0))
    assert "noisy" in caplog.text
    reference(base, step=1).check_start(*responses(0.1), again(0.2))
    reference(base, tiny.model()).check_start(*responses(0.1), again(0.2))
    assert base.training


def test_cache(base, tmp_path, caplog):
    """Statistics are computed once for a reference, and not of a policy that has moved."""
    rows = Dataset.from_list(ROWS)

    def fill(made):
        return add_reference_statistics(
            rows,
            "train",
            rows=rows,
            statistics=("logps",),
            reference=made,
            score=made.score,
            collator=DataCollatorForPreference(pad_token_id=0),
            accelerator=Accelerator(),
            folder=tmp_path,
            show_progress=False,
        )

    filled = fill(reference(base, precompute_ref_log_probs=True))
    columns = [*filled["ref_chosen_logps"], *filled["ref_rejected_logps"]]
    assert columns == pytest.approx(logps(copy.deepcopy(base).eval()).tolist(), abs=1e-5)
    shards = sorted(tmp_path.rglob("*.arrow"))
    moved = reference(base, precompute_ref_log_probs=True, step=1)
    assert fill(moved)[:] == filled[:] and sorted(tmp_path.rglob("*.arrow")) == shards
    nearby(base)
    with pytest.raises(ValueError, match="train dataset.*after training has started.*4 of its pairs"):
        fill(reference(base, precompute_ref_log_probs=True, step=1))


def test_freed(base):
    made = reference(base, tiny.model(), precompute_ref_log_probs=True)
    before = made.fingerprint()
    made.free()
    assert made.model is None and made.kind == "given" and made.fingerprint() == before and made.config is not None
    with pytest.raises(ValueError, match="eval dataset.*once the trainer is built"):
        made.require("eval", 1)
