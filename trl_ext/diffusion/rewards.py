"""
Rewards of images, from functions in the form of TRL's reward functions: `f(prompts, images, **columns)`, called by
keyword, returns one number for each image, or `None` where it has no opinion.

Images are `PIL.Image.Image`; a function with an attribute `takes_tensors = True` gets a tensor of shape `(B, 3, H, W)`
in [0, 1] instead. Columns are those of the prompts' dataset; a function gets the ones that are among its parameters.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image


if TYPE_CHECKING:  # imported where they are needed
    from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPVisionModelWithProjection


class ImageRewards:
    """
    The weighted sum of reward functions.

    Args:
        functions (`Callable` or `list[Callable]`):
            The reward functions.
        weights (`list[float]`, *optional*):
            Their weights; 1 each by default.
        columns (`Iterable[str]`, *optional*):
            Columns of the dataset beside `prompt`.

    Raises:
        `TypeError`: If a function is not callable.
        `ValueError`: Without functions, for weights of another number, and for a function that needs a column which
            the dataset lacks.
    """

    def __init__(
        self,
        functions: Callable | Sequence[Callable],
        weights: Sequence[float] | None = None,
        columns: Iterable[str] = (),
    ):
        self.functions: list[Any] = list(functions) if isinstance(functions, (list, tuple)) else [functions]
        if not self.functions:
            raise ValueError("`reward_funcs` is empty. Give at least one function `(prompts, images, **columns)`.")
        for function in self.functions:
            if not callable(function):
                raise TypeError(
                    f"`reward_funcs` must hold functions `(prompts, images, **columns)`, got {function!r}. For a model "
                    "of transformers use `CLIPReward` or `AestheticReward`."
                )
        if weights is not None and len(weights) != len(self.functions):
            raise ValueError(
                f"`reward_weights` has {len(weights)} numbers for {len(self.functions)} reward functions. Give one a "
                "function."
            )
        self.weights = torch.tensor(
            [1.0] * len(self.functions) if weights is None else list(weights), dtype=torch.float64
        )
        self.names = _distinct([_name_of(function) for function in self.functions])
        self.columns = [name for name in columns if name not in ("prompts", "images", "prompt")]
        self._parameters = [_parameters_of(function) for function in self.functions]
        for name, parameters in zip(self.names, self._parameters, strict=True):
            needed = {p.name for p in parameters.values() if p.default is p.empty and p.kind in _BY_NAME}
            missing = sorted(needed - {"prompts", "images", *self.columns})
            if missing:
                raise ValueError(
                    f"The reward function `{name}` needs {missing}, which the dataset lacks; its columns are "
                    f"{sorted(self.columns)}. Add them, or give these parameters defaults."
                )

    def __call__(self, prompts: list[str], pixels: torch.Tensor, **columns: list) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Scores images.

        Args:
            prompts (`list[str]`):
                Prompt of each image.
            pixels (`torch.Tensor` of shape `(B, 3, H, W)`):
                The images in [-1, 1]; what is beyond is cut.
            columns (`list`):
                Columns of the dataset, one value for each image.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]` in float64: the sums, of shape `(B,)`, and the rewards of each
            function, `(B, functions)`. NaN stands for no opinion; a sum is over the functions that have one.

        Raises:
            `TypeError`, `ValueError`: For rewards of a wrong number, or that are not finite; with the function's name,
                the prompt and the value.
        """
        pixels = (pixels.detach().float().clamp(-1, 1) + 1) / 2
        images: list[Image.Image] | None = None
        rewards = torch.full((len(prompts), len(self.functions)), math.nan, dtype=torch.float64)
        for i, (name, function) in enumerate(zip(self.names, self.functions, strict=True)):
            takes_tensors = getattr(function, "takes_tensors", False)
            if not takes_tensors and images is None:
                images = to_images(pixels)
            given = {"prompts": list(prompts), "images": pixels if takes_tensors else images, **columns}
            returned = function(**_accepted(self._parameters[i], given))
            rewards[:, i] = _checked(name, returned, prompts)
        has_none = rewards.isnan()
        sums = (rewards.nan_to_num() * self.weights).sum(1).masked_fill(has_none.all(1), math.nan)
        return sums, rewards


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Images from pixels in [0, 1], of shape `(B, 3, H, W)`."""
    arrays = (pixels * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def _parameters_of(function: Callable) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some functions written in C
        return {"columns": inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)}


def _accepted(parameters: dict[str, inspect.Parameter], given: dict[str, Any]) -> dict[str, Any]:
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return given
    return {name: value for name, value in given.items() if name in parameters}


def _name_of(function: Callable) -> str:
    return str(getattr(function, "name", None) or getattr(function, "__name__", type(function).__name__))


def _distinct(names: list[str]) -> list[str]:
    """Numbers names that occur more than once, so that each has metrics of its own."""
    return [f"{name}_{names[:i].count(name) + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _checked(name: str, returned: Any, prompts: list[str]) -> torch.Tensor:
    if isinstance(returned, (torch.Tensor, np.ndarray)):
        returned = returned.tolist()
    if not isinstance(returned, (list, tuple)):
        raise TypeError(
            f"The reward function `{name}` returned a `{type(returned).__name__}`. Return a list with one number, or "
            "None, for each image."
        )
    if len(returned) != len(prompts):
        raise ValueError(
            f"The reward function `{name}` returned {len(returned)} rewards for {len(prompts)} images. Return one for "
            "each, None where there is no opinion."
        )
    values = []
    for reward, prompt in zip(returned, prompts, strict=True):
        reward = reward.item() if isinstance(reward, (torch.Tensor, np.generic)) else reward
        if reward is not None and not isinstance(reward, Real):
            raise TypeError(
                f"The reward function `{name}` returned {reward!r} for an image of the prompt {prompt!r}. Return a "
                "number or None."
            )
        if reward is not None and not math.isfinite(reward):
            raise ValueError(
                f"The reward function `{name}` returned {reward!r} for an image of the prompt {prompt!r}. Return a "
                "finite number, or None where there is no opinion."
            )
        values.append(math.nan if reward is None else float(reward))
    return torch.tensor(values, dtype=torch.float64)


# ---- Models ---------------------------------------------------------------------------------------------------------


class CLIPReward:
    """
    Similarity of image and prompt under a CLIP model: the cosine, or with PickScore's weights its score.

    Args:
        model (`str` or [`~transformers.CLIPModel`]):
            Hub id, folder, or the model.
        processor (`str` or [`~transformers.CLIPProcessor`], *optional*):
            Its processor; loaded from where the model is by default.
        use_logit_scale (`bool`, *optional*, defaults to `False`):
            Multiply the cosine by the model's scale, as PickScore (`yuvalkirstain/PickScore_v1`) does.
        device (`str`, *optional*):
            Device of the model. By default it stays where it is.
    """

    def __init__(
        self,
        model: "str | CLIPModel",
        processor: "str | CLIPProcessor | None" = None,
        use_logit_scale: bool = False,
        device: str | None = None,
    ):
        from transformers import CLIPModel, CLIPProcessor

        if isinstance(model, str):
            processor = model if processor is None else processor
            model = CLIPModel.from_pretrained(model, use_safetensors=True)
        if processor is None:
            raise ValueError("`processor` is needed beside a `model` that is no string: its `CLIPProcessor`.")
        self.processor = CLIPProcessor.from_pretrained(processor) if isinstance(processor, str) else processor
        self.model = model.eval().requires_grad_(False).to(device or model.device)
        self.use_logit_scale = use_logit_scale
        self.name = "pick_score" if use_logit_scale else "clip"

    @torch.no_grad()
    def __call__(self, prompts: list[str], images: list[Image.Image]) -> list[float]:
        inputs = self.processor(text=prompts, images=images, padding=True, truncation=True, return_tensors="pt")
        output = self.model(**inputs.to(self.model.device))
        cosine = torch.nn.functional.cosine_similarity(output.text_embeds.float(), output.image_embeds.float())
        return (cosine * self.model.logit_scale.exp() if self.use_logit_scale else cosine).tolist()


class AestheticReward:
    """
    An aesthetic predictor: a head on the normalized image embedding of a CLIP model.

    Args:
        model (`str` or [`~transformers.CLIPVisionModelWithProjection`]):
            Hub id, folder, or the model.
        head (`torch.nn.Module` or `str`):
            The head, from the embedding to one number, or a safetensors file with the state dict of its linear layers
            in their order.
        processor ([`~transformers.CLIPImageProcessor`], *optional*):
            Its image processor; loaded from where the model is by default.
        device (`str`, *optional*):
            Device of the model. By default it stays where it is.
    """

    name = "aesthetic"

    def __init__(
        self,
        model: "str | CLIPVisionModelWithProjection",
        head: torch.nn.Module | str | Path,
        processor: "CLIPImageProcessor | None" = None,
        device: str | None = None,
    ):
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        if isinstance(model, str):
            processor = CLIPImageProcessor.from_pretrained(model) if processor is None else processor
            model = CLIPVisionModelWithProjection.from_pretrained(model, use_safetensors=True)
        if processor is None:
            raise ValueError("`processor` is needed beside a `model` that is no string: its `CLIPImageProcessor`.")
        self.processor = processor
        self.model = model.eval().requires_grad_(False).to(device or model.device)
        head = load_head(head) if isinstance(head, (str, Path)) else head
        self.head = head.eval().requires_grad_(False).to(self.model.device)

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> list[float]:
        inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
        embeddings = self.model(**inputs).image_embeds.float()
        return self.head(torch.nn.functional.normalize(embeddings, dim=-1)).flatten().tolist()


def load_head(path: str | Path) -> torch.nn.Sequential:
    """
    Linear layers, one after the other, from a safetensors file. Pickles are not read.

    Raises:
        `ValueError`: If the tensors do not fit together into layers that end in one number.
    """
    from safetensors.torch import load_file

    if Path(path).suffix != ".safetensors":
        raise ValueError(f"`head={str(path)!r}` is no safetensors file; other formats can run code. Convert it first.")
    state = load_file(path)
    prefixes = sorted({name.rpartition(".")[0] for name in state}, key=_numbers_in)
    layers = []
    for prefix in prefixes:
        weight, bias = state[f"{prefix}.weight"], state.get(f"{prefix}.bias")
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})})
        layers.append(layer)
    sizes = [(layer.in_features, layer.out_features) for layer in layers]
    if not sizes or sizes[-1][1] != 1 or any(a[1] != b[0] for a, b in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(
            f"`head={str(path)!r}` has linear layers of the sizes {sizes}, which do not end in one number."
        )
    return torch.nn.Sequential(*layers)


def _numbers_in(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]
