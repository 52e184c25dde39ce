"""Training from the latent cache and from the images: the same run, with the encoders freed."""

import weakref

import pytest
import tiny_pipelines
import torch
from peft import LoraConfig
from test_latent_cache import pairs

from trl_ext import DiffusionDPOConfig, DiffusionDPOTrainer


def trained(folder, family: str, steps: int = 3, **options):
    """
    A short run with a LoRA, of a family's tiny pipeline or of a folder's; the seed fixes its initial weights, the
    order of the pairs and what is drawn.
    """
    torch.manual_seed(0)
    args = DiffusionDPOConfig(
        **dict(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            resolution=tiny_pipelines.RESOLUTION,
            prompt_dropout=0.5,
            random_flip=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        | options
    )
    trainer = DiffusionDPOTrainer(
        model=tiny_pipelines.pipeline(family) if family in tiny_pipelines.FAMILIES else family,
        args=args,
        train_dataset=pairs(5),
        eval_dataset=pairs(3),
        peft_config=LoraConfig(r=4, lora_alpha=8),
    )
    trainer.train()
    return trainer


def column(trainer, key: str) -> torch.Tensor:
    return torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry], dtype=torch.float64)


@pytest.mark.parametrize("family", tiny_pipelines.FAMILIES)
def test_cached_and_on_the_fly_are_the_same_run(family, tmp_path):
    """
    Errors, u, loss and gradient of every step: what is left is the rounding of embeddings from another batch size.
    """
    fly = trained(tmp_path / "fly", family)
    cached = trained(tmp_path / "cached", family, cache_latents=True)
    assert column(cached, "rewards/margins").abs()[1:].min() > 0
    for key in ("errors/chosen", "errors/rejected"):
        torch.testing.assert_close(column(cached, key), column(fly, key), rtol=2e-6, atol=0)
    # u is beta / 2 times a difference of four such errors, of which each may be a unit in the last place off.
    unit = cached.args.beta / 2 * torch.finfo(torch.float32).eps * column(cached, "errors/chosen").max().item()
    for key in ("loss", "rewards/margins"):
        torch.testing.assert_close(column(cached, key), column(fly, key), rtol=0, atol=4 * unit)
    torch.testing.assert_close(column(cached, "grad_norm"), column(fly, "grad_norm"), rtol=1e-3, atol=0)
    assert abs(cached.evaluate()["eval_loss"] - fly.evaluate()["eval_loss"]) <= 4 * unit


def test_the_encoders_are_freed_once_their_output_is_cached(tmp_path, monkeypatch):
    """Of a pipeline that the trainer loaded; one that was passed in belongs to its owner."""
    tiny_pipelines.pipeline("sd").save_pretrained(tmp_path / "model")
    held = []
    prepare = DiffusionDPOTrainer._prepare_encoders

    def hold(self):
        held.extend(weakref.ref(part) for part in (self.family.pipeline.vae, *self.family.text_encoders))
        prepare(self)

    monkeypatch.setattr(DiffusionDPOTrainer, "_prepare_encoders", hold)
    trainer = trained(tmp_path / "out", str(tmp_path / "model"), steps=1, cache_latents=True)
    assert len(held) == 2 and [reference() for reference in held] == [None, None]
    assert len(trainer.train_dataset) == 5


def test_a_second_run_finds_the_cache_of_the_first(tmp_path, monkeypatch):
    from trl_ext.diffusion.families import StableDiffusionFamily

    options = dict(cache_latents=True, cache_dir=str(tmp_path / "shared"))
    first = trained(tmp_path / "first", "sd", **options)

    def refuse(self, *args):
        raise AssertionError("something was encoded")

    monkeypatch.setattr(StableDiffusionFamily, "encode_images", refuse)
    monkeypatch.setattr(StableDiffusionFamily, "encode_prompts", refuse)
    second = trained(tmp_path / "second", "sd", **options)
    assert torch.equal(column(second, "loss"), column(first, "loss"))
