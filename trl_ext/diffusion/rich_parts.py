"""
Parts of [`~trl_ext.diffusion.rich_pairs.make_rich_pairs`]: a sampler and an editor over diffusers' pipelines, and a
critic behind an OpenAI-compatible endpoint. Any callable of the same form can take the place of each.
"""

import base64
import inspect
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..judges.endpoint import EndpointJudge
from ..judges.templates import fill, sections_of
from ..judges.verdicts import IndexedVerdict, JudgeError
from ..training.fingerprints import fingerprint


if TYPE_CHECKING:  # diffusers is optional
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Critique:
    """
    What a critic says of an image.

    Args:
        text (`str`):
            The critique.
        instructions (`list[str]`):
            What to change, as commands to an editor, the most important first. Empty if there is nothing to improve.
    """

    text: str
    instructions: list[str] = field(default_factory=list)


# ---- Sampler and editor ---------------------------------------------------------------------------------------------


class PipelineSampler:
    """
    Samples images from a text-to-image pipeline, each from the noise of its own seed.

    Args:
        pipeline (`diffusers.DiffusionPipeline`):
            The pipeline.
        batch_size (`int`, *optional*, defaults to `8`):
            Images in a call.
        **call:
            Further arguments of the pipeline's call, such as `num_inference_steps`, `guidance_scale`, `height`.
    """

    def __init__(self, pipeline: "DiffusionPipeline", batch_size: int = 8, **call: Any):
        self.pipeline, self.batch_size, self.call = pipeline, batch_size, _accepted_call(pipeline, call)

    def identity(self) -> str:
        """What its images depend on, beside prompt and seed."""
        return _identity_of(self.pipeline, self.call)

    @torch.no_grad()
    def __call__(self, prompts: list[str], seeds: list[int]) -> list[Image.Image | None]:
        images: list[Image.Image | None] = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            # On the CPU: an image depends on its own seed alone, and not on the batch or the device.
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            images += _images_of(self.pipeline(list(prompts[part]), generator=generators, **self.call))
        return images


class PipelineEditor:
    """
    Edits images with one of diffusers' instruction editors, whose call takes `image` and `prompt`: InstructPix2Pix,
    FLUX Kontext, Qwen-Image-Edit and others.

    Args:
        pipeline (`diffusers.DiffusionPipeline`):
            The editor.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the noise of every edit.
        **call:
            Further arguments of the pipeline's call, such as `num_inference_steps`, `image_guidance_scale`.
    """

    def __init__(self, pipeline: "DiffusionPipeline", seed: int = 0, **call: Any):
        self.pipeline, self.seed, self.call = pipeline, seed, _accepted_call(pipeline, call)
        self._parameters = inspect.signature(type(pipeline).__call__).parameters
        missing = sorted({"image", "prompt"} - set(self._parameters))
        if missing:
            raise ValueError(
                f"`{type(pipeline).__name__}` is no instruction editor: its call takes no `{missing[0]}`. Give one "
                "whose call takes `image` and `prompt`, or a function `(images, instructions, prompts) -> images`."
            )

    def identity(self) -> str:
        """What its images depend on, beside image and instruction."""
        return _identity_of(self.pipeline, {**self.call, "seed": self.seed})

    @torch.no_grad()
    def __call__(
        self, images: list[Image.Image], instructions: list[str], prompts: list[str]
    ) -> list[Image.Image | None]:
        return [self._edit(image, text) for image, text in zip(images, instructions, strict=True)]

    def _edit(self, image: Image.Image, instruction: str) -> Image.Image | None:
        # Editors that choose a size of their own, usually of a megapixel, are asked for the image's.
        size = {"height": image.height, "width": image.width, "max_area": image.height * image.width}
        size = {name: value for name, value in size.items() if name in self._parameters}
        generator = torch.Generator().manual_seed(self.seed)
        output = self.pipeline(image=image, prompt=instruction, generator=generator, **{**size, **self.call})
        return _images_of(output)[0]


def _accepted_call(pipeline, call: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(type(pipeline).__call__).parameters
    unknown = sorted(call.keys() - parameters.keys())
    if unknown:
        raise ValueError(f"`{unknown[0]}` is no argument of the call of `{type(pipeline).__name__}`. Leave it out.")
    return call


def _images_of(output) -> list[Image.Image | None]:
    """A pipeline's images, `None` for those that its safety checker has blackened."""
    blocked = getattr(output, "nsfw_content_detected", None) or [False] * len(output.images)
    return [None if is_blocked else image for image, is_blocked in zip(output.images, blocked, strict=True)]


def _identity_of(pipeline, call: dict[str, Any]) -> str:
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    described = [type(pipeline).__name__, type(pipeline.scheduler).__name__, scheduler, sorted(call.items())]
    return fingerprint(*modules, json.dumps(described, sort_keys=True, default=str))


# ---- Critic ---------------------------------------------------------------------------------------------------------

CRITIC_TEMPLATE = """\
The image was made for the text below. Say what keeps it from showing what the text asks for: objects that are missing \
or wrong, counts, colors, places, anatomy, legible writing. Matters of taste do not count.

### Text
{prompt}

### Reply
Reply with one JSON object and nothing else:
{"critique": "one or two sentences", "instructions": ["a command to an image editor", ...]}
Each instruction is a command that names what to change and into what, such as "Make the second dog brown", the most \
important first; at most {max_instructions}. Give an empty list if the image shows what the text asks for."""

# A command begins with a verb; a description ("The sky is dull") with one of these.
_DESCRIBES = re.compile(r"(the|a|an|this|that|there|it|its|image|picture|no|not|some|too|more|less)\b", re.IGNORECASE)


class CriticError(JudgeError):
    """A critic could not be asked."""


class EndpointCritic(EndpointJudge):
    """
    A critic that shows an image to a vision-language model behind an OpenAI-compatible endpoint, and asks once for
    critique and instructions. A reply that cannot be read is asked for once more; then the image has no critique.

    Images and prompts are sent to the endpoint.

    Args:
        model (`str`):
            Name of the model, as the endpoint knows it.
        base_url (`str`):
            The endpoint.
        template (`str`, *optional*):
            The question, with the field `{prompt}` and, if needed, `{max_instructions}`.
        max_instructions (`int`, *optional*, defaults to `1`):
            Instructions that are asked for.
        max_tokens (`int`, *optional*, defaults to `512`), **options:
            As of [`~trl_ext.judges.EndpointJudge`]: `api_key_env`, `temperature`, `timeout`, `max_retries`,
            `concurrency`, `extra_body`, ...

    Raises:
        [`CriticError`]: If the endpoint refuses a request, or does not answer after all repetitions.
    """

    _error = CriticError

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        template: str = CRITIC_TEMPLATE,
        max_instructions: int = 1,
        max_tokens: int | None = 512,
        **options: Any,
    ):
        super().__init__(model, base_url, max_tokens=max_tokens, parse=None, **options)
        if "{prompt}" not in template:
            raise ValueError("`template` lacks {prompt}: the critic would not see what the image is of.")
        self.template, self.max_instructions = template, max_instructions

    def identity(self):
        return {**self.describe(), "max_instructions": self.max_instructions}

    def stream(  # type: ignore[override]  # a critic is asked about images
        self, prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any
    ) -> "Iterator[IndexedVerdict]":
        """Critiques as they arrive, each with the index of its image."""
        sections = sections_of(self.template)
        questions: list[Any] = []
        for prompt, image in zip(prompts, images, strict=True):
            text = fill(self.template, {"prompt": prompt, "max_instructions": str(self.max_instructions)}, sections)
            picture = {"type": "image_url", "image_url": {"url": _data_url(image)}}
            questions.append([{"type": "text", "text": text}, picture])
        return self._answers(questions)

    def __call__(  # type: ignore[override]
        self, prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any
    ) -> list[Critique | None]:
        critiques: list[Any] = [None] * len(prompts)
        for index, critique in self.stream(prompts, images):
            critiques[index] = critique
        return critiques

    def _ask(self, question, stop):
        for _ in range(2):
            critique = super()._ask(question, stop)
            if critique is not _UNREADABLE:
                return critique
        return None

    def _parse(self, reply: str) -> Any:
        return parse_critique(reply) or _UNREADABLE


_UNREADABLE = Critique("")  # a reply that came, and is asked for once more


def parse_critique(reply: str) -> Critique | None:
    """
    Returns the critique of a critic's reply: one JSON object with `critique` and `instructions`, alone, in a fence of
    Markdown or between other words. `None` if there is none, more than one, or an instruction that commands nothing.
    """
    reply = re.sub(r"<think>.*?(</think>|\Z)", "", reply, flags=re.DOTALL)
    found = [value for value in _objects_in(reply) if {"critique", "instructions"} <= value.keys()]
    if len(found) != 1:
        return None
    text, instructions = found[0]["critique"], found[0]["instructions"]
    if not isinstance(text, str) or not isinstance(instructions, list):
        return None
    for each in instructions:
        if not isinstance(each, str) or not each.strip() or _DESCRIBES.match(each.strip()):
            return None
    return Critique(text.strip(), [each.strip() for each in instructions])


def _objects_in(text: str) -> Iterable[dict]:
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if isinstance(value, dict):
                yield value
        start = text.find("{", end)


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
