"""A method that reads everything of the reference that a method can read, for the tests of where it comes from."""

import harness
import tiny
import torch

from trl_ext.preference import PairLoss, PreferenceConfig, PreferenceTrainer


class Reading(PreferenceTrainer):
    """Reads log-probabilities and entropies of the reference, keeps what it was given, and weighs DPO by them."""

    _name = "Reading"
    reference_statistics = ("logps", "entropy")

    def pair_loss(self, chosen, rejected):
        self.seen = chosen, rejected
        margin = self.args.beta * (chosen.logratios - rejected.logratios)
        weight = 1 / (1 + chosen.ref_entropy + rejected.ref_entropy)
        rewards = (self.args.beta * side.logratios.detach() for side in (chosen, rejected))
        return PairLoss(-torch.nn.functional.logsigmoid(weight * margin), *rewards)


def make(trainer_class, model, folder, train_dataset=None, **options):
    """A trainer over 8 tiny pairs; trainer arguments are recognized by name, the rest goes to the configuration."""
    names = ("ref_model", "eval_dataset", "peft_config", "quantization_config", "data_collator")
    arguments = {name: options.pop(name) for name in names if name in options}
    return trainer_class(
        model=model,
        args=PreferenceConfig(**{**harness.defaults(folder), **options}),
        train_dataset=tiny.dataset(8) if train_dataset is None else train_dataset,
        processing_class=tiny.tokenizer() if not isinstance(model, str) else None,
        **arguments,
    )


def nearby(model, seed: int = 7, only: str = ""):
    """`model`, displaced in place where a parameter's name has `only` in it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model
