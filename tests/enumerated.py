"""A tiny LM whose responses can all be enumerated: 5 tokens, of which 0 ends, and at most 3 of them."""

import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes" / "experiments"))

import toy_model  # noqa: E402


WORDS = ["<eos>", "a", "b", "c", "d"]
LENGTH, PROMPT = 3, 3


def tokenizer():
    return toy_model.make_tokenizer(WORDS)


def model(seed=0):
    return toy_model.make_model(len(WORDS), hidden_size=32, num_heads=2, initializer_range=0.4, seed=seed)


def save(folder, seed=0):
    model(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


RESPONSES = toy_model.all_responses(len(WORDS), LENGTH)  # all 85
HAS_A = torch.tensor([float(1 in ids) for ids in RESPONSES], dtype=torch.float64)


def log_probs(lm):
    """Exact log-probability of every response, with gradient; they sum to one."""
    return toy_model.response_log_probs(lm, [[PROMPT]], RESPONSES)[0]


def has_a(prompts, completions, completion_ids, **columns):
    return [float(1 in ids) for ids in completion_ids]


def draw_evenly(trainer, seed=0) -> None:
    """
    Replaces a trainer's sampling by one with almost no noise: the responses of a generation, in random order, are as
    often as their exact probabilities under the policy want them, to less than one (systematic sampling). Each one by
    itself is still a sample of the policy, so that every expectation is what it was.
    """
    generator = torch.Generator().manual_seed(seed)

    def generate(self, prompt_ids, *args, **kwargs):
        with torch.no_grad():
            shares = log_probs(self.accelerator.unwrap_model(self.model)).exp().cumsum(0)
        count = len(prompt_ids)
        points = (torch.arange(count) + torch.rand(1, generator=generator)) / count
        drawn = torch.searchsorted(shares / shares[-1], points.double()).clamp(max=len(RESPONSES) - 1)
        return [RESPONSES[i] for i in drawn[torch.randperm(count, generator=generator)].tolist()]

    trainer._generate_single_turn = generate.__get__(trainer)


def to_the_optimum(steps: int, responses: int) -> dict:
    """
    Options with which training arrives. Adam's first steps have the full learning rate whatever the gradient: without
    a warmup they carry this small network tenfold further from the target than it was (a KL of 1.24 after one step of
    3e-3), into plateaus that it does not leave; without a decay it ends in the noise.
    """
    return dict(
        per_device_train_batch_size=responses,
        num_generations=responses,
        max_completion_length=LENGTH,
        max_steps=steps,
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        warmup_steps=steps // 5,
        logging_steps=steps,
    )


def kl(log_p, log_q) -> float:
    """KL(p || q) of log-probabilities."""
    return (log_p.exp() * (log_p - log_q)).sum().item()


def total_variation(log_p, log_q) -> float:
    return (log_p.exp() - log_q.exp()).abs().sum().item() / 2
