"""Batches of whole sequences of which the last token alone is read, such as those that a reward head scores."""

from collections.abc import Callable

import torch

from .shared_prompt import PackedRows, SharedPrompts, packed_forward


def as_batch(sequences: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """
    Sequences padded on the right, `(R, T)`, as [`~trl_ext.training.shared_prompt.pack`] takes them. All but the last
    token counts as prompt: a packed row shares whatever sequences `i` and `R - R // 2 + i` begin with.
    """
    longest = max(map(len, sequences))
    input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in sequences], device=device)
    lengths = torch.tensor([[len(ids)] for ids in sequences], device=device)
    at = torch.arange(longest, device=device)
    return {
        "input_ids": input_ids,
        "attention_mask": (at < lengths).long(),
        "completion_mask": (at == lengths - 1).long(),
    }


def last_states(backbone: Callable, inputs: dict, rows: PackedRows | None) -> torch.Tensor:
    """
    Final hidden states of each sequence's last token, `(R, H)`.

    Args:
        backbone (`Callable`):
            A model's forward up to its head.
        inputs (`dict`):
            The batch; see [`as_batch`].
        rows ([`~trl_ext.training.shared_prompt.PackedRows`], *optional*):
            The batch as one row, on which the backbone then runs.
    """
    if rows is not None:
        places = dict(input_ids=rows.input_ids, attention_mask=rows.copies, position_ids=rows.position_ids)
        with packed_forward(rows):
            return backbone(**places, use_cache=False).last_hidden_state[0, rows.last]
    mask = inputs["attention_mask"]
    hidden = backbone(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]


def check_last_states(
    prompts: SharedPrompts, model: torch.nn.Module, backbone: Callable, inputs: dict, refusal: str | None = None
) -> None:
    """
    [`SharedPrompts.check`] of a model whose last states are read, and not its log-probabilities. Without gradient and
    in the mode that the model is in; every process must call it.
    """

    def of_unit_size(rows: PackedRows | None) -> torch.Tensor:
        states = last_states(backbone, inputs, rows).float()
        return states / states.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-12)

    with torch.no_grad():
        prompts.check(model, inputs, of_unit_size, refusal, compared=("last states", "times their size"))
