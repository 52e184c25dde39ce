"""The shared step of the diffusion trainers on tiny pipelines of every family."""

import copy
import gc
import json
import logging
import math
import sys
import weakref
from pathlib import Path

import diffusion_harness as harness
import joint
import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusion_harness import batch, dataset, lora, pixels, trained, trainer
from huggingface_hub.utils import filter_repo_objects
from launching import launch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, Trainer, TrainerCallback

from trl_ext import DiffusionDPOConfig, DiffusionDPOTrainer, DSPOConfig, DSPOTrainer
from trl_ext.diffusion import DiffusionTrainer, validation
from trl_ext.losses import diffusion_dpo_loss, dspo_loss, pair_errors


TESTS = Path(__file__).resolve().parent.parent
LOG_2 = math.log(2)

every_family = pytest.mark.parametrize("name", tiny_pipelines.FAMILIES)


def columns(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory) -> str:
    """A tiny Stable Diffusion on disk: the string a user passes as the model."""
    folder = tmp_path_factory.mktemp("tiny-sd")
    tiny_pipelines.pipeline("sd").save_pretrained(folder)
    return str(folder)


# ---- Each family ----------------------------------------------------------------------------------------------------


@every_family
def test_trains_and_loads(name, tmp_path):
    """
    A LoRA of every family: the loss starts at log 2 in float32; only the LoRA's B has a gradient then; what is saved,
    with alpha other than the rank, gives a fresh pipeline the trained one's image pixel for pixel, not the base's;
    switched off, the base's.
    """
    run = trainer(name, tmp_path, peft_config=lora(lora_alpha=32), max_steps=2)
    loss = run.compute_loss(run.model.train(), batch(run))
    assert abs(loss.item() - LOG_2) < 1e-7
    loss.backward()
    for parameter_name, parameter in run.policy.named_parameters():
        if "lora_A" in parameter_name:
            assert parameter.grad.abs().max() == 0
        elif "lora_B" not in parameter_name:
            assert parameter.grad is None and not parameter.requires_grad
    assert any(
        p.grad is not None and p.grad.abs().max() > 0 for n, p in run.policy.named_parameters() if "lora_B" in n
    )
    run.model.zero_grad()

    run.train()
    assert columns(run, "rewards/accuracies")[0] == 0.5 and columns(run, "rewards/margins")[0] == 0
    run.save_model()
    fresh = tiny_pipelines.pipeline(name)
    base = pixels(fresh)
    fresh.load_lora_weights(str(tmp_path))
    assert fresh.get_list_adapters()
    image = pixels(fresh)
    assert np.array_equal(image, pixels(run.family.pipeline)) and not np.array_equal(image, base)
    fresh.disable_lora()
    assert np.array_equal(pixels(fresh), base)


def latents_shape(family) -> torch.Size:
    side = tiny_pipelines.RESOLUTION // family.vae_scale_factor
    return torch.Size([family.latent_channels, side, side])


@every_family
def test_loss_is_the_equation(name, tmp_path):
    """
    Loss and its gradient from plain parts: the pipeline's own two copies, one noise and one timestep a pair, no code
    of the trainer's step. The policy is moved off its reference first.
    """
    run = trainer(name, tmp_path, beta=3000.0)
    with torch.no_grad():
        for key, parameter in run.policy.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(key)))
    inputs = batch(run, 3)
    run.model.train()
    loss = run.compute_loss(run.model, inputs)
    reference, family = tiny_pipelines.pipeline(name), run.family
    noise, timesteps = run._draw(inputs["index"], latents_shape(family))
    assert noise.shape[0] == 3 and len(set(timesteps.tolist())) == 3
    conditioning = family.encode_prompts(inputs["prompt"])
    conditioning.update(family.image_conditioning(inputs["size_conditioning"]))
    errors = []
    for pixel_values in inputs["pixel_values"].chunk(2):
        latents = family.encode_images(pixel_values)
        noisy, target = (f(latents, noise, timesteps) for f in (family.add_noise, family.target))
        for denoiser in (family.denoiser, getattr(reference, family.denoiser_name)):
            errors.append((family.predict(denoiser, noisy, timesteps, conditioning) - target).square().mean((1, 2, 3)))
    w, ref_w, l, ref_l = errors  # noqa: E741
    weight = family.epsilon_error_weight(timesteps) if name == "sd_v" else 1.0
    u = -0.5 * 3000.0 * weight * ((w - ref_w) - (l - ref_l))
    expected = torch.nn.functional.softplus(-u).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)
    assert abs(loss.item() - LOG_2) > 1e-3
    parameters = [p for p in run.policy.parameters() if p.requires_grad]
    for got, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item() + 1e-6)


@every_family
def test_bf16_starts_at_log_2(name, tmp_path):
    """
    Under bf16 autocast too, with a base in bf16, an untrained policy equals its reference and the loss is log 2 in
    float32; what is trained is in float32.
    """
    pipeline = tiny_pipelines.pipeline(name)
    run = trainer(pipeline.to(torch.bfloat16), tmp_path, bf16=True, max_steps=2, beta=5000.0)
    run.train()
    assert abs(columns(run, "loss")[0] - LOG_2) < 1e-6 and columns(run, "rewards/margins")[0] == 0
    assert columns(run, "grad_norm")[0] > 0 and columns(run, "loss")[1] != columns(run, "loss")[0]
    assert {p.dtype for p in run.policy.parameters() if p.requires_grad} == {torch.float32}
    assert run.policy.denoiser.dtype == torch.bfloat16


# ---- The reference --------------------------------------------------------------------------------------------------


def test_adapter_off_is_a_second_model(tmp_path):
    """The reference's predictions, after training, are those of an untouched copy, bit for bit."""
    run = trainer("sd", tmp_path)
    run.train()
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    conditioning = run.family.encode_prompts(["a bold seven", ""])
    with torch.no_grad():
        policy, reference = run.policy(noisy, timesteps, conditioning)
        untouched = tiny_pipelines.pipeline("sd").unet
        assert torch.equal(reference, run.family.predict(untouched, noisy, timesteps, conditioning))
        assert not torch.equal(policy, reference)


def test_starting_lora(tmp_path):
    """
    A pipeline that comes with a LoRA goes on training it, against its frozen copy: log 2 at the start, the copy never
    changes or gets a gradient, and what is saved is the trained one.
    """
    first = trainer("sd", tmp_path / "first", peft_config=lora(lora_alpha=32))
    first.train()
    first.save_model()
    pipeline = tiny_pipelines.pipeline("sd")
    pipeline.load_lora_weights(str(tmp_path / "first"))
    run = trainer(pipeline, tmp_path / "second", peft_config=None)
    before = {n: p.clone() for n, p in run.policy.named_parameters() if ".ref." in n}
    assert before
    run.train()
    assert abs(columns(run, "loss")[0] - LOG_2) < 1e-7 and columns(run, "loss")[1] != columns(run, "loss")[0]
    after = dict(run.policy.named_parameters())
    assert all(torch.equal(after[n], p) and not after[n].requires_grad for n, p in before.items())
    run.save_model()
    saved = load_file(tmp_path / "second" / "pytorch_lora_weights.safetensors")
    started = load_file(tmp_path / "first" / "pytorch_lora_weights.safetensors")
    assert saved.keys() == started.keys() and any(not torch.equal(saved[n], started[n]) for n in saved)
    fresh = tiny_pipelines.pipeline("sd")
    fresh.load_lora_weights(str(tmp_path / "second"))
    assert np.array_equal(pixels(fresh), pixels(run.family.pipeline))


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_full_fine_tuning(name, tmp_path):
    """
    All of the denoiser is trained against a second one; the loss starts at log 2; the whole pipeline is saved, and
    loads with the trained one's image; a checkpoint holds the denoiser only.
    """
    run = trainer(
        name, tmp_path, peft_config=None, max_steps=2, learning_rate=1e-4, save_strategy="steps", save_steps=2
    )
    run.train()
    assert abs(columns(run, "loss")[0] - LOG_2) < 1e-7 and columns(run, "loss")[1] != columns(run, "loss")[0]
    assert all(p.requires_grad for p in run.policy.denoiser.parameters())
    untouched = getattr(tiny_pipelines.pipeline(name), run.family.denoiser_name).state_dict()
    assert all(torch.equal(p, untouched[n]) for n, p in run.ref_model.state_dict().items())
    assert not any("ref" in n for n in run.policy.state_dict())
    run.save_model()
    loaded = type(run.family.pipeline).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(pixels(loaded), pixels(run.family.pipeline))
    assert not np.array_equal(pixels(loaded), pixels(tiny_pipelines.pipeline(name)))
    assert not (tmp_path / "checkpoint-2" / "vae").exists()


def test_given_reference(tmp_path):
    """`ref_model`, a denoiser or a pipeline, is what the policy is compared with, with an adapter too."""
    other = tiny_pipelines.pipeline("sd", seed=1)
    losses = []
    for ref_model in (other, other.unet):
        run = trainer("sd", tmp_path, ref_model=ref_model)
        assert run.ref_model is other.unet and not any(p.requires_grad for p in other.unet.parameters())
        losses.append(run.compute_loss(run.model.train(), batch(run)).item())
    assert losses[0] == losses[1] and abs(losses[0] - LOG_2) > 1e-3


# ---- Steps ----------------------------------------------------------------------------------------------------------


def test_split_of_the_batch_does_not_matter(tmp_path):
    """Noise and timestep belong to a pair and a step: 4 pairs at once, or accumulated as 2 + 2 or 1 + 1 + 1 + 1."""
    weights = []
    for size in (4, 2, 1):
        run = trainer(
            "sd", tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, optim="sgd"
        )
        run.train()
        weights.append(trained(run))
    for other in weights[1:]:
        for key, value in weights[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_gradient_checkpointing(name, tmp_path):
    """The same losses with checkpointing, and the same gradients."""
    logs = []
    for enabled in (False, True):
        run = trainer(name, tmp_path, gradient_checkpointing=enabled)
        run.train()
        assert any(getattr(m, "gradient_checkpointing", False) for m in run.policy.denoiser.modules()) == enabled
        logs.append(columns(run, "loss") + columns(run, "grad_norm"))
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    # As older releases of Transformers switch it on.
    run.policy.gradient_checkpointing_disable()
    run.policy.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}, every_n_layers=1, offload=False
    )
    assert any(getattr(m, "gradient_checkpointing", False) for m in run.policy.denoiser.modules())


@pytest.mark.parametrize("mu", [None, 0.5], ids=["plain", "safeguard"])
def test_overfits(mu, tmp_path):
    """
    Four pairs with fixed noise and timesteps are learnt: by raising the rejected errors. With the safeguard, whose
    scale is logged and below 1, by lowering the chosen ones, more slowly; their gap never rises above 0.
    """

    class Fixed(DiffusionDPOTrainer):
        def _draw(self, index, shape):
            step, self.state.global_step = self.state.global_step, 0
            drawn = super()._draw(index, shape)
            self.state.global_step = step
            return drawn

    run = trainer(
        "sd",
        tmp_path,
        trainer_class=Fixed,
        train_dataset=dataset(4),
        per_device_train_batch_size=4,
        max_steps=60,
        learning_rate=3e-3,
        beta=2000.0,
        safeguard_mu=mu,
        peft_config=lora(r=8, lora_alpha=8),
    )
    run.train()
    assert columns(run, "loss")[-1] < (0.1 if mu is None else 0.6)
    if mu is None:
        assert columns(run, "rewards/accuracies")[-1] == 1.0
        assert columns(run, "gaps/rejected")[-1] > 0 and not columns(run, "safeguard/scale")
    else:
        assert max(columns(run, "gaps/chosen")[5:]) < 0
        assert all(0 < scale < 1 for scale in columns(run, "safeguard/scale"))


@pytest.mark.parametrize(
    "trainer_class, config_class, given",
    [
        (DiffusionDPOTrainer, DiffusionDPOConfig, dict(loss_type="dmpo", label_smoothing=0.01)),
        (DiffusionDPOTrainer, DiffusionDPOConfig, dict(loss_type="hinge", safeguard_mu=0.5)),
        (DSPOTrainer, DSPOConfig, dict()),
        (DSPOTrainer, DSPOConfig, dict(beta=2000.0, score_weight=0.5)),
        (DSPOTrainer, DSPOConfig, dict(variant="squared")),
    ],
    ids=["dmpo", "hinge", "dspo", "dspo-two-weights", "dspo-squared"],
)
def test_losses_are_wired(trainer_class, config_class, given, tmp_path):
    """Each method's trainer computes its loss function, with the configuration's hyperparameters and the weights."""
    run = trainer("sd_v", tmp_path, trainer_class=trainer_class, config_class=config_class, **given)
    run.train()
    generator = torch.Generator().manual_seed(0)
    from trl_ext.diffusion import DenoisedPairs

    tensors = [torch.randn(2, 4, 8, 8, generator=generator) for _ in range(6)]
    pairs = DenoisedPairs(*tensors, timesteps=torch.tensor([3, 900]), weight=torch.tensor([0.5, 2.0]))
    function = diffusion_dpo_loss if trainer_class is DiffusionDPOTrainer else dspo_loss
    resolved = {"beta": run.args.beta, **given}
    torch.testing.assert_close(run.pair_loss(pairs), function(*tensors, weight=pairs.weight, **resolved))
    assert DSPOConfig("x", use_cpu=True, bf16=False).beta == 0.001
    assert DSPOConfig("x", use_cpu=True, bf16=False, variant="squared").beta == 5000


def test_own_method(tmp_path):
    """A method is a class with a loss, as the base's docstring says."""

    class Own(DiffusionTrainer):
        _name = "Own"

        def pair_loss(self, pairs):
            return torch.relu(1 - pair_errors(*pairs.predictions).argument(self.args.beta))

    run = trainer("sd", tmp_path, trainer_class=Own)
    run.train()
    assert columns(run, "loss")[0] == 1.0
    with pytest.raises(NotImplementedError, match="must define `pair_loss"):
        trainer("sd", tmp_path, trainer_class=DiffusionTrainer).train()


def test_weights_of_the_errors(tmp_path):
    """Min-SNR weighting is min(SNR, gamma) / SNR; `error_space` decides on v's weight; both multiply."""
    timesteps = torch.tensor([0, 500, 999])
    for name, given, expected in (
        ("sd", {}, None),
        ("sd_v", dict(error_space="prediction"), None),
        ("sd3", {}, None),
        ("sd", dict(snr_gamma=5.0), lambda snr, a: snr.clamp(max=5) / snr),
        ("sd_v", {}, lambda snr, a: a),
        ("sd_v", dict(snr_gamma=5.0), lambda snr, a: a * snr.clamp(max=5) / snr),
    ):
        run = trainer(name, tmp_path, **given)
        weight = run._error_weight(timesteps)
        if expected is None:
            assert weight is None
        else:
            alphas = run.family.pipeline.scheduler.alphas_cumprod[timesteps]
            torch.testing.assert_close(weight, expected(alphas / (1 - alphas), alphas))
    run = trainer("sd3", tmp_path, error_space="epsilon")
    torch.testing.assert_close(run._error_weight(torch.tensor([250.0])), torch.tensor([0.75**2]))


def test_metrics(tmp_path):
    """
    Gaps, rewards and accuracies are those of the errors; a bucket's mean is over the pairs in it, over the window.
    """
    run = trainer("sd", tmp_path, max_steps=4, logging_steps=4, per_device_train_batch_size=4, beta=100.0)
    seen = []
    original = run.pair_loss
    run.pair_loss = lambda pairs: (seen.append(pairs), original(pairs))[1]
    run.train()
    log = run.state.log_history[0]
    gaps = torch.cat([pairs.errors.chosen_gap for pairs in seen])
    rejected = torch.cat([pairs.errors.rejected_gap for pairs in seen])
    timesteps = torch.cat([pairs.timesteps for pairs in seen])
    u = -50.0 * (gaps - rejected)
    correct = (u > 0).float() + 0.5 * (u == 0)
    assert log["gaps/chosen"] == pytest.approx(gaps.mean().item(), rel=1e-4)
    assert log["rewards/rejected"] == pytest.approx(-50 * rejected.mean().item(), rel=1e-4)
    assert log["rewards/margins"] == pytest.approx(u.mean().item(), rel=1e-3, abs=1e-7)
    assert log["rewards/accuracies"] == pytest.approx(correct.mean().item())
    buckets = [key for key in log if key.startswith("gaps/chosen/t")]
    assert len(buckets) >= 3
    for key in buckets:
        low, high = map(int, key.split("/t")[1].split("-"))
        inside = (timesteps >= low) & (timesteps < high)
        assert inside.any() and log[key] == pytest.approx(gaps[inside].mean().item(), rel=1e-4)
        name = key.replace("gaps/chosen", "rewards/accuracies")
        assert log[name] == pytest.approx(correct[inside].mean().item())


def test_warning_when_the_chosen_gap_stays_positive(tmp_path, caplog):
    """Five logs in a row, said once; a log below 0 starts the count anew; evaluations do not count."""
    run = trainer("sd", tmp_path)
    with caplog.at_level(logging.WARNING, logger="trl_ext.diffusion"):
        for gap in (1, 1, 1, 1, -1, 1, 1, 1, 1):
            run._watch_chosen_gap(gap)
        assert "gaps/chosen" not in caplog.text
        run._watch_chosen_gap(0.01)
        run._watch_chosen_gap(0.01)
    assert caplog.text.count("has been positive for 5 logs") == 1 and "safeguard_mu" in caplog.text


def test_prompt_dropout(tmp_path):
    """
    With a dropout of 1 the conditioning is the empty prompt's, whatever the prompt; an evaluation keeps its prompts.
    """
    run = trainer("sdxl", tmp_path, prompt_dropout=1.0, eval_dataset=dataset(2))
    assert run.train_dataset[0]["prompt"] == "" and run.eval_dataset[0]["prompt"] == "a bold seven"
    _, conditioning = run._encode(batch(run))
    assert conditioning["prompt_embeds"].abs().max() == 0


# ---- Evaluation and validation --------------------------------------------------------------------------------------


def test_evaluation_and_validation_leave_no_trace(tmp_path):
    """
    With evaluations and image grids every step, training is bit for bit what it is without, LoRA dropout included; an
    evaluation of the same weights is always the same number.
    """
    given = dict(peft_config=lora(lora_dropout=0.3), max_steps=4)
    plain = trainer("sd", tmp_path / "plain", **given)
    plain.train()
    run = trainer(
        "sd",
        tmp_path / "watched",
        eval_dataset=dataset(4, start=20),
        eval_strategy="steps",
        eval_steps=1,
        validation_prompts=["a bold seven", "a thin one"],
        validation_steps=2,
        validation_inference_steps=2,
        **given,
    )
    run.train()
    assert columns(run, "loss") == columns(plain, "loss")
    for key, value in trained(plain).items():
        assert torch.equal(trained(run)[key], value)
    assert len(columns(run, "eval_loss")) == 4
    assert run.evaluate()["eval_loss"] == run.evaluate()["eval_loss"] == columns(run, "eval_loss")[3]
    # A raw dataset may be given later, to `evaluate` and to `predict`.
    given_later = dataset(4, start=20)
    assert run.evaluate(given_later)["eval_loss"] == run.predict(given_later).metrics["test_loss"]
    assert run.predict(given_later).metrics["test_gaps/chosen"] == run.evaluate()["eval_gaps/chosen"]
    # The draw of an evaluation does not depend on the run's seed either.
    again = trainer("sd", tmp_path / "seed", eval_dataset=dataset(4, start=20), seed=7, **{**given, "max_steps": 1})
    start = again.evaluate()["eval_errors/chosen"]
    other = trainer("sd", tmp_path / "seed", eval_dataset=dataset(4, start=20), **{**given, "max_steps": 1})
    assert other.evaluate()["eval_errors/chosen"] == start


def test_validation_images(tmp_path):
    """
    Grids of policy beside reference, on the steps asked for and at the end; the reference's images are the base's.
    """

    class TensorBoardCallback(TrainerCallback):  # known by its name
        class tb_writer:
            sent = []

            @classmethod
            def add_image(cls, *args, **kwargs):
                cls.sent.append((args[0], args[1].shape, args[2]))

    class WandbCallback(TrainerCallback):
        _wandb = None

    run = trainer(
        "sd",
        tmp_path,
        max_steps=3,
        learning_rate=1e-2,
        validation_prompts=["a bold seven", ""],
        validation_steps=2,
        validation_inference_steps=2,
        callbacks=[TensorBoardCallback(), WandbCallback()],
    )
    run.train()
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == ["step-2.png", "step-3.png"]
    assert [(name, step) for name, _, step in TensorBoardCallback.tb_writer.sent] == [
        ("validation", 2),
        ("validation", 3),
    ]
    shown = run._validation.reference_images
    assert np.array_equal(np.asarray(shown[0]).astype(int), pixels(tiny_pipelines.pipeline("sd"), "a bold seven", 0))
    assert np.array_equal(np.asarray(shown[1]).astype(int), pixels(tiny_pipelines.pipeline("sd"), "", 1))
    grid = validation.make_grid({"a": shown, "b": shown}, ["x" * 400, ""])
    assert grid.width < 300  # a long prompt is cut, not the grid widened


def test_the_main_process_alone_writes(tmp_path, monkeypatch):
    """Transformers has every process call `_save`."""
    run = trainer("sd", tmp_path)
    monkeypatch.setattr(type(run.args), "should_save", False)
    run._save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_a_failing_tracker_is_reported(tmp_path, caplog):
    class WandbCallback:
        class _wandb:
            run = object()

            @staticmethod
            def log(*args):
                raise ConnectionError("no route")

            Image = str

    path = tmp_path / "grid.png"
    harness.picture(0, True).save(path)
    with caplog.at_level(logging.WARNING, logger="trl_ext.diffusion"):
        validation.send_to_trackers([WandbCallback()], "validation", path, 3)
    assert "could not be sent to WandbCallback: ConnectionError('no route')" in caplog.text


# ---- The average of the weights -------------------------------------------------------------------------------------


def test_average_of_the_weights(tmp_path):
    """
    The average follows (1 + n) / (10 + n) up to `ema_decay`; it is what is evaluated and saved, and training goes on
    with the weights, bit for bit.
    """
    plain = trainer("sd", tmp_path / "plain")
    plain.train()
    values = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            values.append(trained(run))

    run = trainer(
        "sd",
        tmp_path / "ema",
        use_ema=True,
        ema_decay=0.15,
        eval_dataset=dataset(2),
        eval_strategy="steps",
        eval_steps=1,
        callbacks=[Watch()],
    )
    start = trained(run)
    run.train()
    assert columns(run, "loss") == columns(plain, "loss")
    for key, value in start.items():
        average = value.clone()
        for step, seen in enumerate(values):
            decay = min((1 + step) / (10 + step), 0.15) if step else 0.0
            average = average - (1 - decay) * (average - seen[key])
        shadow = dict(zip(run._ema.parameters, run._ema.average.shadow_params, strict=True))
        torch.testing.assert_close(shadow[key.removeprefix("denoiser.")], average)
    run.save_model()
    saved = load_file(tmp_path / "ema" / "pytorch_lora_weights.safetensors")
    with run.averaged_weights():
        state = {n: t.clone() for n, t in get_peft_model_state_dict(run.policy.denoiser).items()}
        evaluated = run.compute_loss(run.model.eval(), batch(run)).item()
    assert all(torch.equal(saved[f"unet.{n}"], t) for n, t in state.items())
    assert evaluated != run.compute_loss(run.model.eval(), batch(run)).item()
    assert all(torch.equal(trained(run)[n], t) for n, t in values[-1].items())


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize(
    "name, given",
    [
        ("sd", dict(use_ema=True, prompt_dropout=0.5, random_flip=True, peft_config=lora(lora_dropout=0.3))),
        ("sd3", dict(gradient_checkpointing=True)),
        ("sd", dict(peft_config=None, learning_rate=1e-5, use_ema=True)),
        ("flux", dict(bf16=True)),
    ],
    ids=["lora-ema-dropout", "sd3-checkpointing", "full-ema", "flux-bf16"],
)
def test_resume_is_bitwise(name, given, tmp_path):
    """
    Stopped inside a logging window and an epoch, and resumed by a new trainer: bit for bit the uninterrupted run, in
    the weights, the average, and every logged value. The adapter that is trained is the one that the optimizer holds.
    """

    def build(folder, **more):
        options = dict(max_steps=7, logging_steps=3, gradient_accumulation_steps=2, train_dataset=dataset(14))
        return trainer(name, tmp_path / folder, **{**options, **given, **more})

    whole = build("whole")
    whole.train()
    build("stopped", callbacks=[StopAt(4)]).train()
    checkpoint = tmp_path / "stopped" / "checkpoint-4"
    resumed = build("stopped")
    names = list(getattr(resumed.policy.denoiser, "peft_config", {}))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert list(getattr(resumed.policy.denoiser, "peft_config", {})) == names
    first, second = trained(whole), trained(resumed)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    if "use_ema" in given:
        averages = [run._ema.average.shadow_params for run in (whole, resumed)]
        assert all(torch.equal(a, b) for a, b in zip(*averages, strict=True))

    def measured(run):
        skip = ("runtime", "per_second", "total_flos")
        return [{k: v for k, v in e.items() if not any(s in k for s in skip)} for e in run.state.log_history]

    assert measured(whole) == measured(resumed)
    weights = "unet" if "peft_config" in given and given["peft_config"] is None else "pytorch_lora_weights.safetensors"
    kept = {"README.md", "base_model.json", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}
    kept |= {"training_args.bin", weights} | ({"ema.safetensors"} if "use_ema" in given else set())
    assert {path.name for path in checkpoint.iterdir()} == kept


def test_saving_and_evaluating_leave_no_trace(tmp_path):
    def build(name, **given):
        return trainer("sd", tmp_path / name, **dict(max_steps=3, logging_steps=2, save_strategy="no") | given)

    joint.check_no_trace(build, dataset(2, start=20), every=1)


def test_best_checkpoint(tmp_path):
    """`load_best_model_at_end` brings back the best checkpoint's weights, which are then saved."""
    run = trainer(
        "sd",
        tmp_path,
        max_steps=3,
        learning_rate=3e-2,
        eval_dataset=dataset(4),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_errors/chosen",
        greater_is_better=False,
    )
    run.train()
    scores = columns(run, "eval_errors/chosen")
    best = load_file(Path(run.state.best_model_checkpoint) / "pytorch_lora_weights.safetensors")
    assert run.state.best_metric == min(scores)
    state = get_peft_model_state_dict(run.policy.denoiser)
    assert all(torch.equal(best[f"unet.{n}"], t) for n, t in state.items())
    assert run.evaluate()["eval_errors/chosen"] == min(scores)


def test_checkpoint_of_another_base(tmp_path):
    """A checkpoint is refused by a trainer of another base, of another kind of training, and of another rank."""
    run = trainer("sd", tmp_path, save_strategy="steps", save_steps=3)
    run.train()
    checkpoint = str(tmp_path / "checkpoint-3")
    other = tiny_pipelines.pipeline("sd", seed=1)
    with pytest.raises(ValueError, match="was trained from another base"):
        trainer(other, tmp_path).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(FileNotFoundError, match="no checkpoint of a full fine-tuning"):
        trainer("sd", tmp_path, peft_config=None).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="not of the trainer's rank and targets"):
        trainer("sd", tmp_path, peft_config=lora(r=2)).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="checkpoint without `ema.safetensors`"):
        trainer("sd", tmp_path, use_ema=True).train(resume_from_checkpoint=checkpoint)


def test_non_finite_loss_names_the_pair(tmp_path):
    """A NaN in a pair's latents stops the run, naming the pair, its prompt and its errors."""
    run = trainer("sd", tmp_path)
    inputs = batch(run)
    latents = run.family.encode_images(inputs.pop("pixel_values"))
    latents[1] = math.nan
    with pytest.raises(FloatingPointError, match=r"pair 1 of the train dataset.*'a thin one'.*nan(.|\n)*fp16 VAE"):
        run.compute_loss(run.model.train(), {**inputs, "latents": latents})


# ---- Loading, quantization, cache -----------------------------------------------------------------------------------


def test_model_as_a_string(sd_folder, tmp_path):
    """
    A folder trains like the instance that was saved there; a dtype for the frozen parts leaves the VAE in float32.
    """
    instance = trainer("sd", tmp_path / "instance")
    instance.train()
    run = trainer(sd_folder, tmp_path / "string")
    run.train()
    assert columns(run, "loss") == columns(instance, "loss")
    run.save_model()
    card = (tmp_path / "string" / "README.md").read_text()
    assert f"from_pretrained({json.dumps(sd_folder)})" in card and "library_name: diffusers" in card
    run = trainer(sd_folder, tmp_path / "half", model_init_kwargs={"dtype": "bfloat16"})
    assert run.policy.denoiser.dtype == run.family.pipeline.text_encoder.dtype == torch.bfloat16
    assert run.family.pipeline.vae.dtype == torch.float32


def test_the_seed_is_the_whole_start(sd_folder, tmp_path):
    """The same seed gives the same adapter whatever the random state before, another seed another: launches repeat."""
    starts = []
    for state, seed in ((1, 0), (2, 0), (2, 3)):
        torch.manual_seed(state)
        run = trainer(sd_folder, tmp_path / f"{state}-{seed}", peft_config=lora(), seed=seed)
        starts.append({name: value.clone() for name, value in trained(run).items()})
    first, again, other = starts
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_qlora(sd_folder, tmp_path, caplog):
    """
    A 4-bit denoiser through diffusers' quantization: linear layers but the time embedding's are quantized, the rest
    stays; log 2 at the start; only the LoRA is trained, in float32, and saved; resumed bit for bit; loaded on the same
    quantized base, the image is the trained one's. On a U-Net that is mostly convolutions it is said that this gains
    little.
    """
    import bitsandbytes as bnb

    def build(folder, **more):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        return trainer(sd_folder, tmp_path / folder, quantization_config=quantization, max_steps=4, **more)

    with caplog.at_level(logging.WARNING, logger="trl_ext.diffusion"):
        run = build("whole")
    assert "in linear layers that quantization reaches" in caplog.text
    quantized = {n for n, m in run.policy.denoiser.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert any("to_q" in n for n in quantized) and not any("time_emb" in n for n in quantized)
    assert all(p.dtype == torch.float32 and "lora_" in n for n, p in run.policy.named_parameters() if p.requires_grad)
    run.train()
    assert abs(columns(run, "loss")[0] - LOG_2) < 1e-7
    build("stopped", callbacks=[StopAt(2)]).train()
    resumed = build("stopped")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    assert all(torch.equal(t, trained(resumed)[n]) for n, t in trained(run).items())
    run.save_model()
    saved = load_file(tmp_path / "whole" / "pytorch_lora_weights.safetensors")
    assert all("lora_" in n for n in saved)
    fresh = build("fresh").family.pipeline
    fresh.set_progress_bar_config(disable=True)
    fresh.unload_lora_weights()
    fresh.load_lora_weights(str(tmp_path / "whole"))
    run.family.pipeline.set_progress_bar_config(disable=True)
    assert np.array_equal(pixels(fresh), pixels(run.family.pipeline))
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "QLoRA" in card and "4-bit NF4" in card


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_cached_and_on_the_fly_agree(name, tmp_path):
    """With latents and embeddings from the cache every loss is what it is without, dropped prompts and flips too."""
    losses = []
    for cached in (False, True):
        run = trainer(
            name,
            tmp_path / str(cached),
            cache_latents=cached,
            prompt_dropout=0.5,
            random_flip=True,
            max_steps=4,
            eval_dataset=dataset(2),
        )
        run.train()
        losses.append(columns(run, "loss") + [run.evaluate()["eval_loss"]])
    # Where nothing is learnt yet they are equal to rounding; Adam's first steps magnify that.
    assert losses[1][:1] == pytest.approx(losses[0][:1], rel=1e-6) and losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_encoders_are_freed(sd_folder, tmp_path):
    """
    Once the cache is full nothing holds the encoders; validation keeps the VAE; a pipeline saved in full has them all.
    """
    seen = {}
    original = DiffusionDPOTrainer._free_encoders

    class Watched(DiffusionDPOTrainer):
        def _free_encoders(self):
            pipeline = self.family.pipeline
            seen["vae"], seen["text"] = weakref.ref(pipeline.vae), weakref.ref(pipeline.text_encoder)
            original(self)

    run = trainer(
        sd_folder, tmp_path / "all", trainer_class=Watched, cache_latents=True, peft_config=None, max_steps=1
    )
    gc.collect()
    assert seen["vae"]() is None and seen["text"]() is None
    # A push leaves out what matches "_*".
    assert (tmp_path / "all" / "_latent_cache").is_dir()
    assert list(filter_repo_objects(["_latent_cache/a.safetensors", "a"], ignore_patterns=["_*"])) == ["a"]
    run.train()
    run.save_model()
    loaded = type(run.family.pipeline).from_pretrained(tmp_path / "all")
    loaded.set_progress_bar_config(disable=True)
    assert pixels(loaded).shape == (16, 16, 3)
    run = trainer(
        sd_folder,
        tmp_path / "validated",
        trainer_class=Watched,
        cache_latents=True,
        validation_prompts=["a bold seven"],
        validation_inference_steps=2,
        max_steps=1,
    )
    gc.collect()
    assert seen["vae"]() is not None and seen["text"]() is None
    run.train()
    assert (tmp_path / "validated" / "validation" / "step-1.png").exists()
    with pytest.raises(ValueError, match="given after the encoders had been freed"):
        run.evaluate(dataset(2))
    # A pipeline that the user holds keeps its parts.
    pipeline = tiny_pipelines.pipeline("sd")
    trainer(pipeline, tmp_path / "instance", cache_latents=True)
    assert pipeline.vae is not None and pipeline.text_encoder is not None


# ---- The card -------------------------------------------------------------------------------------------------------


def test_card_written_by_hand_stays(tmp_path):
    """A generated card is replaced, and one of several datasets written; somebody's own text is left as it is."""
    run = trainer("sd", tmp_path)
    run.create_model_card(dataset_name=["acme/a", "acme/b"])
    run.create_model_card(model_name="again")
    card = (tmp_path / "README.md").read_text()
    assert "# again\n" in card and "- acme/a\n- acme/b\n" in card
    (tmp_path / "README.md").write_text("# By hand\n")
    run.save_model()
    assert (tmp_path / "README.md").read_text() == "# By hand\n"


def test_model_card(tmp_path):
    """
    Library, tags, grid, hyperparameters that were used, data, citation; no placeholder, no option that had no effect.
    """
    run = trainer(
        "sd",
        tmp_path,
        eval_dataset=dataset(2),
        validation_prompts=["a bold seven"],
        validation_inference_steps=2,
        hub_token="hf_secret",
        label_smoothing=0.1,
    )
    run.train()
    run.evaluate()
    run.create_model_card(model_name="digits", dataset_name="acme/digit-pairs")
    run.save_model()
    card = (tmp_path / "README.md").read_text()
    for text in (
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "- diffusion-dpo",
        "- acme/digit-pairs",
        "# digits",
        "](validation.png)",
        "| beta | `5000` |",
        "| label_smoothing | `0.1` |",
        "| timestep_sampling | `uniform` |",
        "| resolution | `16 x 16` |",
        "LoRA (rank 4, alpha 8",
        "pipeline.load_lora_weights(",
        "wallace2024diffusion",
        "- Evaluation data:** 2 pairs".replace("- ", "- **", 1),
    ):
        assert text in card, text
    for text in ("hf_secret", "ema_decay", "logit_mean", "None", "/t0-250", "cache_dir"):
        assert text not in card, text
    assert (tmp_path / "validation.png").exists()
    # Trackers read the model's configuration.
    assert json.loads(run.model.config.to_json_string())["denoiser"]["sample_size"] == 8
    args = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert args.hub_token is None


def test_lora_of_a_local_pipeline_is_pushed_with_an_id(sd_folder, tmp_path, monkeypatch):
    """Without the base's id on the Hub it is refused before the pipeline is loaded; no file has the folder."""
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda self, **kwargs: None)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="`push_to_hub=True`.*`hub_base_model_id`"):
        patch.setattr("trl_ext.diffusion.image_trainer.load_pipeline", None)
        trainer(sd_folder, tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match=r"`push_to_hub\(\)`.*`hub_base_model_id`"):
        trainer(sd_folder, tmp_path / "later").push_to_hub()
    run = trainer(sd_folder, tmp_path, push_to_hub=True, hub_base_model_id="acme/tiny-sd")
    run.save_model()
    card = (tmp_path / "README.md").read_text()
    assert 'from_pretrained("acme/tiny-sd")' in card and "base_model: acme/tiny-sd" in card
    assert json.loads((tmp_path / "base_model.json").read_text())["name_or_path"] == "acme/tiny-sd"
    for path in tmp_path.iterdir():
        assert path.is_dir() or path.suffix == ".bin" or sd_folder.encode() not in path.read_bytes(), path


# ---- Processes ------------------------------------------------------------------------------------------------------


def test_two_processes(tmp_path):
    """
    Two processes on one global batch are one process on it: weights, and every logged value; one communication a step.
    The five pairs of the evaluation set fill no whole batches of the two processes, and each counts once.
    """
    script = TESTS / "scripts" / "run_diffusion.py"
    options = dict(max_steps=3, logging_steps=2, optim="sgd", prompt_dropout=0.5, cache_latents=True)
    folder = tmp_path / "two"
    printed = launch(script, str(folder), json.dumps(options))
    assert "unused parameters" not in printed
    sys.path.insert(0, str(TESTS / "scripts"))
    import run_diffusion

    run_diffusion.main(str(tmp_path / "one"), json.dumps({**options, "per_device_train_batch_size": 4}))
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["equal_on_all"] and two["communications"] == [1, 1, 1]
    a, b = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "two"))
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=1e-6)
    for first, second in zip(one["logs"], two["logs"], strict=True):
        assert first.keys() == second.keys()
        for key in first:
            if key != "train_loss":  # transformers adds the last steps of the first process only
                assert second[key] == pytest.approx(first[key], rel=2e-3, abs=2e-4), key


def test_copy_of_the_configuration():
    """A configuration can be copied, and pickled without the token, which a checkpoint would take along."""
    args = DiffusionDPOConfig("x", use_cpu=True, bf16=False, hub_token="hf_secret")
    assert copy.deepcopy(args).beta == 5000.0 and "hf_secret" not in str(args.__getstate__())
