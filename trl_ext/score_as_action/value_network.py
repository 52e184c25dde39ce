"""A value network as baseline: what a chain is worth at a node, from its latent there."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..diffusion.rollouts import Rollout
from ..training.seeds import derive_seed, forked_random_state


WIDTH = 64
LEARNING_RATE = 1e-3
PASSES = 4  # gradient steps on a window


class LatentValue(nn.Module):
    """
    Two strided convolutions on a latent, their mean over the image, and the number of the node. It starts at 0.

    Args:
        channels (`int`):
            Channels of the latents.
        num_nodes (`int`):
            Nodes with a noisy step.
    """

    def __init__(self, channels: int, num_nodes: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, WIDTH, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
            nn.SiLU(),
        )
        self.nodes = nn.Embedding(num_nodes, WIDTH)
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, latents: torch.Tensor, node: int) -> torch.Tensor:
        """Values of shape `(B,)`, of latents `(B, C, h, w)` at a node."""
        return self.head(self.convolutions(latents).mean((2, 3)) + self.nodes.weight[node]).squeeze(1)


class ValueBaseline:
    """
    Keeps a [`LatentValue`] and fits it to the returns of every window, after its values were taken from the returns:
    a baseline that has seen what it is taken from would bias the gradient.

    Args:
        trainer ([`ScoreAsActionTrainer`]):
            The trainer, which need not be complete yet.
        args ([`ScoreAsActionConfig`]):
            Its configuration.
    """

    def __init__(self, trainer, args):
        self.trainer = trainer
        device = args.device
        with forked_random_state(device):
            torch.manual_seed(derive_seed("value", args.seed))
            network = LatentValue(trainer.family.latent_channels, trainer.sampler.num_noisy_steps)
        self.network = network.to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)

    def values(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        """Values of all processes' images at each noisy step, of shape `(N, K - 1)`."""
        latents = torch.cat([rollout.latents for rollout in rollouts])
        with torch.no_grad():
            columns = [self.network(latents[:, node], node) for node in range(latents.shape[1] - 2)]
        return self.trainer.gather(torch.stack(columns, 1))

    def fit(self, rollouts: Sequence[Rollout], values: torch.Tensor, returns: torch.Tensor) -> None:
        """
        Fits the network by squared error.

        Args:
            rollouts (`Sequence[Rollout]`):
                This process's images.
            values, returns (`torch.Tensor` of shape `(N, K - 1)`):
                Values that were taken, and what follows from each node on, of all processes' images. NaN for no
                opinion.
        """
        trainer = self.trainer
        known = ~returns.isnan().any(1)
        spread = (returns[known] - returns[known].mean(0)).square().sum()
        if spread > 0:
            explained = 1 - (returns[known] - values[known].to(returns)).square().sum() / spread
            trainer._window["train"].add("value/explained_variance", explained.item())
        latents = torch.cat([rollout.latents for rollout in rollouts])
        first = trainer.accelerator.process_index * len(latents)
        own = slice(first, first + len(latents))
        targets = returns[own].nan_to_num().to(latents)
        weights = known[own].to(latents) / known.sum().clamp(min=1) / returns.shape[1]
        parameters = list(self.network.parameters())
        for _ in range(PASSES):
            self.optimizer.zero_grad()
            for node in range(returns.shape[1]):
                error = (self.network(latents[:, node], node) - targets[:, node]).square()
                (error * weights).sum().backward()
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad = trainer.accelerator.reduce(parameter.grad, reduction="sum")
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
