"""Diffusion-DPO (https://huggingface.co/papers/2311.12908)."""

import textwrap

import torch

from ..diffusion import DenoisedPairs, DiffusionTrainer
from ..losses import diffusion_dpo_loss
from .diffusion_dpo_config import DiffusionDPOConfig


class DiffusionDPOTrainer(DiffusionTrainer):
    r"""
    Trainer for Diffusion-DPO, introduced in the paper [Diffusion Model Alignment Using Direct Preference
    Optimization](https://huggingface.co/papers/2311.12908).

    The logged `rewards/*` are -(beta / 2) (E - Eref), with E the squared error at the drawn noise and timestep.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from peft import LoraConfig
    >>> from trl_ext import DiffusionDPOConfig, DiffusionDPOTrainer

    >>> trainer = DiffusionDPOTrainer(
    ...     model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    ...     args=DiffusionDPOConfig("sd15-DPO"),
    ...     train_dataset=load_dataset("kashif/pickascore", split="validation"),
    ...     peft_config=LoraConfig(r=16, lora_alpha=16),
    ... )
    >>> trainer.train()
    ```

    The arguments are those of [`~trl_ext.diffusion.DiffusionTrainer`].
    """

    config_class = DiffusionDPOConfig

    _tag_names = ["trl", "trl-ext", "diffusion-dpo"]
    _name = "Diffusion-DPO"
    _paper = {
        "title": "Diffusion Model Alignment Using Direct Preference Optimization",
        "id": "2311.12908",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{wallace2024diffusion,
                title        = {{Diffusion Model Alignment Using Direct Preference Optimization}},
                author       = {Bram Wallace and Meihua Dang and Rafael Rafailov and Linqi Zhou and Aaron Lou and Senthil Purushwalkam and Stefano Ermon and Caiming Xiong and Shafiq Joty and Nikhil Naik},
                year         = 2024,
                booktitle    = {IEEE/CVF Conference on Computer Vision and Pattern Recognition, CVPR 2024},
                url          = {https://huggingface.co/papers/2311.12908},
            }"""),
    }

    def pair_loss(self, pairs: DenoisedPairs) -> torch.Tensor:
        return diffusion_dpo_loss(
            *pairs.predictions,
            beta=self.args.beta,
            loss_type=self.args.loss_type,
            label_smoothing=self.args.label_smoothing,
            weight=pairs.weight,
            safeguard_mu=self.args.safeguard_mu,
        )
