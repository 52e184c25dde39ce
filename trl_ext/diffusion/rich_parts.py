"""
Parts of [`~trl_ext.diffusion.rich_pairs.make_rich_pairs`]: a sampler and an editor over diffusers' pipelines, and a
critic and an instructor behind an OpenAI-compatible endpoint. Any callable of the same form can take the place of
each.
"""

import base64
import inspect
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import torch
from PIL import Image

from .._checks import at_least, check_value
from ..judges.endpoint import EndpointJudge
from ..judges.templates import fields_of, fill, sections_of
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
        instructions (`list[str]`, *optional*):
            What to change, as commands to an editor, the most important first. Empty if there is nothing to improve;
            `None` if an instructor is to be asked.
    """

    text: str
    instructions: list[str] | None = field(default_factory=list)


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


# ---- Critic and instructor ------------------------------------------------------------------------------------------

_QUESTION = """\
The image was made for the text below. Say what keeps it from showing what the text asks for: objects that are \
missing or wrong, counts, colors, places, anatomy, legible writing. Matters of taste do not count.

### Text
{prompt}

### Reply
"""
_COMMANDS = """\
Each instruction is a command that names what to change and into what, such as "Make the second dog brown", the most \
important first; at most {max_instructions}."""

CRITIC_TEMPLATE = f"""\
{_QUESTION}\
Reply with the critique, in a few sentences that say where each fault is. Reply with the single word NOTHING if the \
image shows what the text asks for."""

INSTRUCTOR_TEMPLATE = f"""\
The image was made for the text below, and has been criticized. Say how an image editor should change it.

### Text
{{prompt}}

### Critique
{{critique}}

### Reply
Reply with one JSON object and nothing else:
{{"instructions": ["a command to an image editor", ...]}}
{_COMMANDS} Give an empty list if nothing of the critique is true."""

# Both in one question, at half of the price.
CRITIC_AND_INSTRUCTOR_TEMPLATE = f"""\
{_QUESTION}\
Reply with one JSON object and nothing else:
{{"critique": "one or two sentences", "instructions": ["a command to an image editor", ...]}}
{_COMMANDS} Give an empty list if the image shows what the text asks for."""

# A command begins with a verb; a description ("The sky is dull") with one of these.
_DESCRIBES = re.compile(r"(the|a|an|this|that|there|it|its|image|picture|no|not|some|too|more|less)\b", re.IGNORECASE)


class CriticError(JudgeError):
    """A critic or an instructor could not be asked."""


class _EndpointViewer(EndpointJudge):
    """
    Asks a vision-language model behind an OpenAI-compatible endpoint about images. A reply that cannot be read is
    asked for once more; then there is no answer.

    Args:
        model (`str`), base_url (`str`), template (`str`), **options:
            As of [`~trl_ext.judges.EndpointJudge`].
        fields (`tuple[str, ...]`):
            Fields that the template needs.
        max_instructions (`int`, *optional*):
            Instructions that are asked for, in the field of this name.
    """

    _error = CriticError

    def __init__(
        self,
        model: str,
        base_url: str,
        template: str,
        fields: tuple[str, ...],
        max_instructions: int | None,
        **options: Any,
    ):
        super().__init__(model, base_url, parse=None, **options)
        missing = [f"{{{name}}}" for name in fields if name not in fields_of(template)]
        if missing:
            raise ValueError(
                f"`template` lacks {' and '.join(missing)}: the model would not see what it is asked about."
            )
        check_value("max_instructions", max_instructions, Annotated[int | None, at_least(1)])
        self.template, self.max_instructions = template, max_instructions

    def identity(self):
        return {**self.describe(), "max_instructions": self.max_instructions}

    def _ask_about(self, images: Sequence[Image.Image], **texts: Sequence[str]) -> "Iterator[IndexedVerdict]":
        """Answers as they arrive, each with the index of its image."""
        sections = sections_of(self.template)
        questions: list[Any] = []
        for image, *values in zip(images, *texts.values(), strict=True):
            shown = dict(zip(texts, values, strict=True)) | {"max_instructions": str(self.max_instructions)}
            picture = {"type": "image_url", "image_url": {"url": _data_url(image)}}
            questions.append([{"type": "text", "text": fill(self.template, shown, sections)}, picture])
        return self._answers(questions)

    def _ask(self, question, stop):
        for _ in range(2):
            answer = super()._ask(question, stop)
            if answer is not _UNREADABLE:
                return answer
        return None


class EndpointCritic(_EndpointViewer):
    """
    A critic that shows an image to a vision-language model behind an OpenAI-compatible endpoint, and asks what is
    wrong with it. What to change is asked by an instructor, such as [`EndpointInstructor`], of the same model or
    another. A reply that cannot be read is asked for once more; then the image has no critique.

    Images and prompts are sent to the endpoint.

    Args:
        model (`str`):
            Name of the model, as the endpoint knows it.
        base_url (`str`):
            The endpoint.
        with_instructions (`bool`, *optional*, defaults to `False`):
            Ask for critique and instructions in one question, at half of the price and without an instructor.
        template (`str`, *optional*):
            The question, with the field `{prompt}`. With `with_instructions` also `{max_instructions}`, if needed, and
            the reply is a JSON object with `critique` and `instructions`; without, it is the critique, or NOTHING.
        max_instructions (`int`, *optional*):
            Instructions that are asked for with `with_instructions`; 1 by default.
        max_tokens (`int`, *optional*, defaults to `512`), **options:
            As of [`~trl_ext.judges.EndpointJudge`]: `api_key_env`, `temperature`, `timeout`, `max_retries`,
            `concurrency`, `extra_body`, ...

    Raises:
        [`CriticError`]: If the endpoint refuses a request, or does not answer after all repetitions.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        with_instructions: bool = False,
        template: str | None = None,
        max_instructions: int | None = None,
        max_tokens: int | None = 512,
        **options: Any,
    ):
        if max_instructions is not None and not with_instructions:
            raise ValueError(
                f"`max_instructions={max_instructions!r}` has no effect on a critic that gives none. Give it to the "
                "instructor, or set `with_instructions=True`."
            )
        if with_instructions and max_instructions is None:
            max_instructions = 1
        template = template or (CRITIC_AND_INSTRUCTOR_TEMPLATE if with_instructions else CRITIC_TEMPLATE)
        super().__init__(model, base_url, template, ("prompt",), max_instructions, max_tokens=max_tokens, **options)
        self.needs_instructor = not with_instructions

    def stream(  # type: ignore[override]  # a critic is asked about images
        self, prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any
    ) -> "Iterator[IndexedVerdict]":
        """Critiques as they arrive, each with the index of its image."""
        return self._ask_about(images, prompt=prompts)

    def __call__(  # type: ignore[override]
        self, prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any
    ) -> list[Critique | None]:
        return in_order(self.stream(prompts, images), len(prompts))

    def _parse(self, reply: str) -> Any:
        parsed = parse_critique_text(reply) if self.needs_instructor else parse_critique(reply)
        return parsed or _UNREADABLE


class EndpointInstructor(_EndpointViewer):
    """
    An instructor that shows an image and its critique to a vision-language model behind an OpenAI-compatible endpoint,
    and asks for commands to an image editor. A reply that cannot be read is asked for once more; then the image has no
    instructions.

    Images, prompts and critiques are sent to the endpoint.

    Args:
        model (`str`), base_url (`str`), max_tokens (`int`, *optional*, defaults to `512`), **options:
            As of [`EndpointCritic`].
        template (`str`, *optional*):
            The question, with the fields `{prompt}` and `{critique}` and, if needed, `{max_instructions}`.
        max_instructions (`int`, *optional*, defaults to `1`):
            Instructions that are asked for.

    Raises:
        [`CriticError`]: If the endpoint refuses a request, or does not answer after all repetitions.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        template: str = INSTRUCTOR_TEMPLATE,
        max_instructions: int = 1,
        max_tokens: int | None = 512,
        **options: Any,
    ):
        fields = ("prompt", "critique")
        super().__init__(model, base_url, template, fields, max_instructions, max_tokens=max_tokens, **options)

    def stream(  # type: ignore[override]
        self, prompts: Sequence[str], images: Sequence[Image.Image], critiques: Sequence[str], **columns: Any
    ) -> "Iterator[IndexedVerdict]":
        """Instructions as they arrive, each list with the index of its image."""
        return self._ask_about(images, prompt=prompts, critique=critiques)

    def __call__(  # type: ignore[override]
        self, prompts: Sequence[str], images: Sequence[Image.Image], critiques: Sequence[str], **columns: Any
    ) -> list[list[str] | None]:
        return in_order(self.stream(prompts, images, critiques), len(prompts))

    def _parse(self, reply: str) -> Any:
        instructions = parse_instructions(reply)
        return _UNREADABLE if instructions is None else instructions


_UNREADABLE = object()  # a reply that came, and is asked for once more


def in_order(answers: "Iterable[IndexedVerdict]", count: int) -> list:
    """Answers that came in any order, `None` where there is none."""
    found: list[Any] = [None] * count
    for index, answer in answers:
        found[index] = answer
    return found


def parse_critique_text(reply: str) -> Critique | None:
    """
    Returns the critique of a reply in prose, whose instructions are to be asked for; with no instructions where the
    reply is NOTHING. `None` if there is no text.
    """
    text = _without_thoughts(reply).strip()
    if not text:
        return None
    return Critique(text, [] if text.strip("\"'*`. ").casefold() == "nothing" else None)


def parse_critique(reply: str) -> Critique | None:
    """
    Returns the critique of a critic's reply: one JSON object with `critique` and `instructions`, alone, in a fence of
    Markdown or between other words. `None` if there is none, more than one, or an instruction that commands nothing.
    """
    found = _only_object_with(reply, {"critique", "instructions"})
    if found is None or not isinstance(found["critique"], str):
        return None
    instructions = _commands_of(found)
    return None if instructions is None else Critique(found["critique"].strip(), instructions)


def parse_instructions(reply: str) -> list[str] | None:
    """Like [`parse_critique`], of a reply with `instructions` alone."""
    found = _only_object_with(reply, {"instructions"})
    return None if found is None else _commands_of(found)


def _commands_of(found: dict) -> list[str] | None:
    instructions = found["instructions"]
    if not isinstance(instructions, list):
        return None
    for each in instructions:
        if not isinstance(each, str) or not each.strip() or _DESCRIBES.match(each.strip()):
            return None
    return [each.strip() for each in instructions]


def _only_object_with(reply: str, keys: set[str]) -> dict | None:
    found = [value for value in _objects_in(_without_thoughts(reply)) if keys <= value.keys()]
    return found[0] if len(found) == 1 else None


def _without_thoughts(reply: str) -> str:
    return re.sub(r"<think>.*?(</think>|\Z)", "", reply, flags=re.DOTALL)


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
