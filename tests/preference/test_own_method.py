"""The method that `trl_ext/preference/README.md` writes in twenty lines, run as it stands there."""

import re
from pathlib import Path

import pytest
import tiny
import torch

import trl_ext.preference


README = Path(trl_ext.preference.__file__).with_name("README.md")


@pytest.fixture(scope="module")
def example() -> dict:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 24, (
        "the example no longer fits what is claimed"
    )
    names: dict = {"__name__": "readme_example"}
    exec(compile(code, str(README), "exec", dont_inherit=True), names)
    return names


def make(example, folder, ref_seed=0, **options):
    args = example["DPOPConfig"](
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        max_steps=12,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return example["DPOPTrainer"](
        model=tiny.model(),
        args=args,
        train_dataset=tiny.dataset(),
        processing_class=tiny.tokenizer(),
        ref_model=tiny.model(seed=ref_seed),
    )


def test_it_trains(example, tmp_path):
    """
    The first loss is log 2: at the reference both log ratios and the penalty are 0. Then the margin grows, and with a
    heavy penalty the chosen responses do not fall below the reference.
    """
    trainer = make(example, tmp_path)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    assert logs[-1]["rewards/margins"] > 0.1
    assert logs[-1]["logratios/chosen"] > -0.1
    assert "dpop/penalty" in logs[-1]


def test_its_hyperparameter_is_used(example, tmp_path):
    """
    Against another reference some chosen responses start below it, so the penalty is positive from the first step, and
    the loss can only grow with its weight.
    """
    first = []
    for value in (0.0, 50.0):
        trainer = make(example, tmp_path, ref_seed=1, dpop_lambda=value)
        trainer.train()
        first.append(trainer.state.log_history[0])
    assert (
        first[0]["dpop/penalty"] == pytest.approx(first[1]["dpop/penalty"], abs=1e-5) and first[0]["dpop/penalty"] > 0
    )
    assert first[1]["loss"] > first[0]["loss"] + 1.0


def test_its_card_names_it(example, tmp_path):
    trainer = make(example, tmp_path, dpop_lambda=7.0)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "DPOP" in card and "2402.13228" in card
    assert re.search(r"dpop_lambda.*7", card)
    assert not re.search(r"\bNone\b", card)
