"""Pairs from critiques and edits: what is kept, what is dropped and counted, the ledger, and the parts."""

import json
import logging
from pathlib import Path

import diffusion_harness as harness
import judge_stub
import numpy as np
import pytest
import tiny_pipelines
import torch
from datasets import Dataset
from killing import die, killed
from PIL import Image as PIL
from test_rewards import tiny_clip

from trl_ext.diffusion import (
    Critique,
    EndpointCritic,
    EndpointInstructor,
    PipelineEditor,
    PipelineSampler,
    RichPairsReport,
    make_rich_pairs,
)
from trl_ext.diffusion.rich_maker import RichPairsError, identity_of
from trl_ext.diffusion.rich_parts import CriticError, parse_critique, parse_critique_text, parse_instructions
from trl_ext.training.named_datasets import load_named_dataset


def prompts(count: int = 4) -> Dataset:
    return Dataset.from_list([{"prompt": f"digit {i}", "level": 10 * i} for i in range(count)])


def gray(level: int, size: tuple[int, int] = (8, 8)) -> PIL.Image:
    return PIL.new("RGB", size, (level,) * 3)


def sample(prompts, seeds):
    return [gray(40 + 20 * (seed % 8)) for seed in seeds]


def critic(prompts, images):
    return [Critique("it is dark", ["Brighten the picture"]) for _ in images]


def prose_critic(prompts, images):
    """Says what is wrong, and leaves it to the instructor what to change."""
    return [Critique("it is dark", None) for _ in images]


def instructor(prompts, images, critiques):
    return [["Brighten the picture"] if critique == "it is dark" else [] for critique in critiques]


def level_of(image) -> int:
    return image.getpixel((0, 0))[0]


def brighten(images, instructions, prompts):
    """20 levels up; the prompt "digit 1" fails, and becomes darker. An empty instruction adds the editor's 2."""
    change = [
        2 if not text else -20 if "1" in prompt else 20 for text, prompt in zip(instructions, prompts, strict=True)
    ]
    return [gray(level_of(image) + by) for image, by in zip(images, change, strict=True)]


def brightness(images):
    return [float(level_of(image)) for image in images]


def make(dataset=None, **given):
    parts = dict(sample=sample, critic=critic, editor=brighten, reward=brightness)
    return make_rich_pairs(prompts() if dataset is None else dataset, **{**parts, **given})


# ---- What is kept ---------------------------------------------------------------------------------------------------


def test_either():
    """The brighter image is chosen, so the failed edit of "digit 1" is rejected; columns are those of the trainer."""
    report = RichPairsReport()
    data = make(report=report, seed=2)
    assert data.column_names[:3] == ["prompt", "chosen", "rejected"]
    assert data["edited_is"] == ["chosen", "rejected", "chosen", "chosen"] and data["seed"] == [2, 3, 4, 5]
    assert [level_of(image) for image in data["chosen"]] == [100, 100, 140, 160]
    assert [level_of(image) for image in data["rejected"]] == [80, 80, 120, 140]
    assert data["reward_chosen"] == [100, 100, 140, 160] and data["reward_rejected"] == [80, 80, 120, 140]
    assert set(data["critique"]) == {"it is dark"} and set(data["instruction"]) == {"Brighten the picture"}
    assert (report.images, report.pairs, report.edited_chosen, report.dropped) == (4, 4, 3, {})
    # Gains 20, -20, 20, 20: mean 10, standard deviation 20, so half an interval of 1.96 * 20 / 2.
    assert report.gain == pytest.approx((10.0, 19.6, 4)) and report.round_trip_gain == pytest.approx((2.0, 0.0, 4))
    assert report.pair_distance == pytest.approx(20 / 255)


def test_better_and_all(caplog):
    report = RichPairsReport()
    data = make(keep="better", report=report)
    assert data["prompt"] == ["digit 0", "digit 2", "digit 3"] and set(data["edited_is"]) == {"chosen"}
    assert report.dropped == {"edit is worse": 1}
    data = make(keep="all", reward=None)
    assert len(data) == 4 and set(data["edited_is"]) == {"chosen"} and data["reward_chosen"] == [None] * 4
    assert "also where it is worse" in caplog.text


@pytest.mark.parametrize("margin, kept", [(20.0, 4), (20.5, 0)])
def test_margin_at_equality(margin, kept):
    """A difference of the margin is kept; without a pair the error has the counts."""
    if kept:
        assert len(make(margin=margin)) == kept
    else:
        with pytest.raises(
            ValueError, match="No pair is left.\n0 pairs from 4 images.*\nNo pair: below the margin, 4"
        ):
            make(margin=margin)


def test_identity_editor_gives_no_pair():
    """What changes nothing is a tie, at any margin."""
    for margin in (0.0, 1.0):
        with pytest.raises(ValueError, match="edit changes nothing, 4"):
            make(editor=lambda images, instructions, prompts: images, margin=margin)


@pytest.mark.parametrize(
    "part, reason",
    [
        ("sample", "not sampled"),
        ("critic", "no critique"),
        ("instructor", "no instructions"),
        ("editor", "edit refused"),
        ("reward", "no reward"),
    ],
)
def test_none_from_a_part(part, reason):
    """The row is dropped, and counted under a name of its own."""
    parts = dict(sample=sample, critic=critic, instructor=instructor, editor=brighten, reward=brightness)
    whole = parts[part]
    calls = []

    def fails_once(*args, **kwargs):
        answers = list(whole(*args, **kwargs))
        calls.append(answers)
        return [None, *answers[1:]] if len(calls) == 1 else answers

    if part == "reward":
        report = RichPairsReport()
        data = make(reward=lambda images: fails_once(images), report=report)
    else:
        report = RichPairsReport()
        others = dict(critic=prose_critic) if part == "instructor" else {}
        data = make(report=report, **others, **{part: lambda *args: fails_once(*args)})
    assert report.dropped == {reason: 1} and data["prompt"] == ["digit 1", "digit 2", "digit 3"]


def test_other_reasons():
    """Black images of safety filters, before and after the edit; a critic with nothing to say."""
    report = RichPairsReport()
    data = make(
        prompts(6),
        sample=lambda prompts, seeds: [gray(0) if seed == 0 else sample(prompts, [seed])[0] for seed in seeds],
        critic=lambda prompts, images: [
            Critique("fine") if prompt == "digit 2" else critic([], [0])[0] for prompt in prompts
        ],
        editor=lambda images, instructions, prompts: [
            gray(0) if prompt == "digit 3" else brighten([image], [text], [prompt])[0]
            for image, text, prompt in zip(images, instructions, prompts, strict=True)
        ],
        report=report,
    )
    assert report.dropped == {"black": 2, "nothing to improve": 1}
    assert data["prompt"] == ["digit 1", "digit 4", "digit 5"]


def test_instructor():
    """
    It is asked about critiques without instructions, and about these alone; it gets image, prompt, critique and the
    columns that it names, and may find that there is nothing to change.
    """
    seen = []

    def mixed(prompts, images):
        return [
            Critique("it is dark", None)
            if "0" in prompt
            else Critique(prompt, ["Brighten"] if "1" in prompt else None)
            for prompt in prompts
        ]

    def asked(prompts, images, critiques, level):
        seen.extend(zip(prompts, map(level_of, images), critiques, level, strict=True))
        return instructor(prompts, images, critiques)

    report = RichPairsReport()
    data = make(critic=mixed, instructor=asked, report=report)
    assert seen == [("digit 0", 40, "it is dark", 0), ("digit 2", 80, "digit 2", 20), ("digit 3", 100, "digit 3", 30)]
    assert data["instruction"] == ["Brighten the picture", "Brighten"] and data["critique"] == [
        "it is dark",
        "digit 1",
    ]
    assert report.dropped == {"nothing to improve": 2}
    with pytest.raises(RichPairsError, match=r"no instructions for row 0 \('digit 0'\), and there is no `instructor`"):
        make(critic=mixed)


def test_size_of_an_edit():
    """Another size is resized to the original's; another aspect ratio is an error that names the row."""
    data = make(
        editor=lambda images, texts, prompts: [image.resize((32, 34)) for image in brighten(images, texts, prompts)]
    )
    assert {image.size for image in data["chosen"]} == {(8, 8)}
    with pytest.raises(RichPairsError, match=r"made 16 x 8 pixels.*8 x 8, at row 0 \('digit 0'\)"):
        make(editor=lambda images, texts, prompts: [image.resize((16, 8)) for image in images])


def test_several_edits():
    """Instructions are applied one after the other, up to `max_edits`."""

    def several(prompts, images):
        return [Critique("dark", ["Brighten it", "Brighten it more", "And more"]) for _ in images]

    data = make(critic=several, max_edits=2, keep="better")
    assert data["instruction"] == ["Brighten it; Brighten it more"] * 3
    assert [a - b for a, b in zip(data["reward_chosen"], data["reward_rejected"], strict=True)] == [40] * 3


def test_the_editors_signature(caplog):
    """
    An editor that adds 2 levels to whatever it is given: with `round_trip_rejected` both images have them, and the
    difference is the instruction's alone. An editor whose empty edit gains as much is warned of.
    """
    report = RichPairsReport()
    data = make(prompts().select([0, 2, 3]), round_trip_rejected=True, report=report)
    assert [a - b for a, b in zip(data["reward_chosen"], data["reward_rejected"], strict=True)] == [18] * 3
    assert report.round_trip_gain == pytest.approx((2.0, 0.0, 3)) and "empty instruction" not in caplog.text
    make(editor=lambda images, texts, prompts: [gray(level_of(image) + 9) for image in images])
    assert "edits with an empty instruction +9" in caplog.text
    report = RichPairsReport()
    make(prompts(6), round_trip_images=2, batch_size=4, report=report)
    assert report.round_trip_gain[2] == 2 and report.gain[2] == 6


def test_samples_of_a_prompt():
    """Seeds go on over the samples of all prompts; samples of a prompt are compared; columns reach the parts."""
    seen = []

    def asked(prompts, images, level):
        seen.extend(zip(prompts, level, strict=True))
        return critic(prompts, images)

    report = RichPairsReport()
    data = make(prompts(2), samples_per_prompt=3, critic=asked, report=report, batch_size=3)
    assert data["seed"] == [0, 1, 2, 3, 4, 5] and seen == [("digit 0", 0)] * 3 + [("digit 1", 10)] * 3
    assert report.sample_distance == pytest.approx(20 / 255)


def test_seed_decides_the_images():
    same, again, other = make(seed=1), make(seed=1), make(seed=2)
    assert [level_of(i) for i in same["chosen"]] == [level_of(i) for i in again["chosen"]]
    assert [level_of(i) for i in same["chosen"]] != [level_of(i) for i in other["chosen"]]


def test_result_trains(tmp_path):
    """The columns beside the pair are passed over."""
    data = make(sample=lambda prompts, seeds: [gray(60 + seed, (16, 16)) for seed in seeds], editor=lambda i, t, p: [
        gray(level_of(image) + 30, (16, 16)) for image in i
    ])  # fmt: skip
    run = harness.trainer("sd", tmp_path, train_dataset=data, max_steps=1, logging_steps=1)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)


# ---- The ledger -----------------------------------------------------------------------------------------------------


class Counted:
    """Parts that note every image they are asked about, in a file that outlives a killed process."""

    def __init__(self, folder, die_at: int | None = None):
        self.file, self.die_at = folder / "calls.txt", die_at

    def _note(self, part, things):
        with self.file.open("a") as file:
            file.writelines(f"{part} {thing}\n" for thing in things)
        if len(self.file.read_text().splitlines()) == self.die_at:
            die()

    def parts(self):
        return dict(sample=self.sample, critic=self.critic, editor=self.edit, reward=self.score)

    def parts_with_instructor(self):
        return {**self.parts(), "critic": self.prose_critic, "instructor": self.instruct}

    def sample(self, prompts, seeds):
        self._note("sample", seeds)
        return sample(prompts, seeds)

    def critic(self, prompts, images):
        self._note("critic", prompts)
        return critic(prompts, images)

    def prose_critic(self, prompts, images):
        self._note("critic", prompts)
        return prose_critic(prompts, images)

    def instruct(self, prompts, images, critiques):
        self._note("instructor", prompts)
        return instructor(prompts, images, critiques)

    def edit(self, images, instructions, prompts):
        self._note("edit", zip(prompts, instructions, strict=True))
        return brighten(images, instructions, prompts)

    def score(self, images):
        self._note("reward", map(level_of, images))
        return brightness(images)


class Scaled:
    """A reward whose attributes decide."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, images):
        return [self.scale * value for value in brightness(images)]


def rows_of(data) -> list[dict]:
    return [
        {name: level_of(value) if name in ("chosen", "rejected") else value for name, value in row.items()}
        for row in data
    ]


@pytest.mark.parametrize(
    "parts, count, kills",
    # Of each image: a sample, a critique, with an instructor its instructions, two edits and three rewards.
    [(Counted.parts, 7, (1, 2, 3, 5, 8, 28)), (Counted.parts_with_instructor, 8, (2, 3, 10, 11))],
    ids=["one question", "two questions"],
)
def test_killed_run_repeats_no_call(parts, count, kills, tmp_path):
    """Killed at any call, a run asks again only what was under way, and makes the same pairs."""

    def run(folder, die_at=None):
        return make(cache_dir=folder, batch_size=1, **parts(Counted(folder, die_at)))

    (tmp_path / "whole").mkdir()
    whole = rows_of(run(tmp_path / "whole"))
    calls = (tmp_path / "whole" / "calls.txt").read_text().splitlines()
    assert len(calls) == 4 * count
    for at in kills:
        folder = tmp_path / str(at)
        folder.mkdir()
        killed(lambda folder=folder, at=at: run(folder, at))
        assert rows_of(run(folder)) == whole
        again = (folder / "calls.txt").read_text().splitlines()
        assert sorted(again) == sorted([*calls, calls[at - 1]])


def test_other_parts_are_asked_anew(tmp_path):
    """The ledger tells parts apart; a second run of the same asks nothing; a damaged image is made again."""
    asked = []

    def noted(prompts, images):
        asked.append(len(images))
        return critic(prompts, images)

    first = make(cache_dir=tmp_path, critic=noted)
    assert rows_of(make(cache_dir=tmp_path, critic=noted)) == rows_of(first) and asked == [4]

    def another(prompts, images):
        return noted(prompts, images)

    make(cache_dir=tmp_path, critic=another)
    assert asked == [4, 4]
    scores = [make(cache_dir=tmp_path, critic=noted, reward=Scaled(scale))["reward_chosen"] for scale in (1.0, 2.0)]
    assert [2 * value for value in scores[0]] == scores[1]
    models = [torch.nn.Linear(1, 1) for _ in range(2)]
    assert identity_of(Scaled(models[0])) == identity_of(Scaled(models[0])) != identity_of(Scaled(models[1]))
    picture = next((tmp_path / "images").glob("*.png"))
    picture.write_bytes(picture.read_bytes()[:-20])
    assert rows_of(make(cache_dir=tmp_path, critic=noted)) == rows_of(first) and asked == [4, 4]
    assert json.loads((tmp_path / "report.json").read_text())["pairs"] == 4


@pytest.mark.parametrize("error", [RuntimeError("offline"), ValueError("no such thing")])
def test_a_part_that_raises(error, tmp_path):
    """The error names the row, and what was answered stays."""

    def fails(prompts, images):
        if prompts == ["digit 2"]:
            raise error
        return critic(prompts, images)

    with pytest.raises(RichPairsError, match=r"critic failed at row 2 \('digit 2'\): \w+Error: .*ledger.jsonl"):
        make(cache_dir=tmp_path, critic=fails, batch_size=1)
    entries = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert sum(entry["part"] == "critic" for entry in entries) == 2


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(keep="best"), "`keep` must be one of .*'best'"),
        (dict(reward=None), "`keep='either'` orders a pair by its rewards"),
        (dict(keep="all", margin=1.0), "`margin=1.0` has no effect"),
        (dict(margin=-1.0), "`margin`.*-1.0"),
        (dict(max_edits=0), "`max_edits`.*0"),
        (dict(dataset=Dataset.from_dict({"text": ["a"]})), "column `prompt`"),
        (dict(critic=lambda prompts, images: ["dark"] * 4), "critic gave 'dark' for row 0"),
        (dict(critic=lambda prompts, images: []), "critic gave 0 answers for 4"),
        (
            dict(critic=EndpointCritic("vlm", "http://x")),
            "`EndpointCritic` that gives no instructions, and there is no",
        ),
        (
            dict(critic=EndpointCritic("vlm", "http://x", with_instructions=True), instructor=instructor),
            "`instructor` has no effect: the `EndpointCritic`",
        ),
        (
            dict(critic=prose_critic, instructor=lambda prompts, images, critiques: ["Brighten"] * 4),
            "instructor gave 'Brighten' for row 0",
        ),
        (dict(sample=lambda prompts, seeds: [np.zeros((8, 8))] * 4), "`PIL.Image.Image`, got a `ndarray`"),
    ],
)
def test_refused(given, message):
    with pytest.raises((ValueError, RichPairsError), match=message):
        make(**given)


# ---- Parts ----------------------------------------------------------------------------------------------------------


def test_sampler():
    """Its images are the pipeline's, whatever is beside them in a batch; other settings are another sampler."""
    pipeline = tiny_pipelines.pipeline("sd")
    call = dict(num_inference_steps=2, height=16, width=16)
    sampler = PipelineSampler(pipeline, batch_size=2, **call)
    images = sampler(["a bold seven", "a thin one", "a red digit"], [5, 6, 7])
    for image, prompt, seed in zip(images, ["a bold seven", "a thin one", "a red digit"], [5, 6, 7], strict=True):
        assert np.abs(np.asarray(image).astype(int) - harness.pixels(pipeline, prompt, seed)).max() <= 1
    assert sampler.identity() == PipelineSampler(pipeline, **call).identity()
    assert sampler.identity() != PipelineSampler(pipeline, **{**call, "num_inference_steps": 3}).identity()
    assert sampler.identity() != PipelineSampler(tiny_pipelines.pipeline("sd", seed=1), **call).identity()
    with pytest.raises(ValueError, match="`steps` is no argument"):
        PipelineSampler(pipeline, steps=2)


def instruct_pix2pix():
    from diffusers import StableDiffusionInstructPix2PixPipeline

    base = tiny_pipelines.pipeline("sd")
    parts = {**base.components, "unet": tiny_pipelines.unet(in_channels=8)}
    pipeline = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_editor():
    """InstructPix2Pix edits at the image's size; the instruction and the seed decide; no text-to-image pipeline."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = instruct_pix2pix()
    editor = PipelineEditor(pipeline, num_inference_steps=2)
    image = harness.picture(0, True)
    first, again, other = editor([image] * 3, ["Make it bold", "Make it bold", "thin"], ["a"] * 3)
    assert first.size == image.size and (np.asarray(first) == np.asarray(again)).all()
    assert (np.asarray(first) != np.asarray(other)).any()
    with pytest.raises(
        ValueError, match="`StableDiffusionPipeline` is no instruction editor: its call takes no `image`"
    ):
        PipelineEditor(tiny_pipelines.pipeline("sd"))
    assert editor.identity() != PipelineEditor(pipeline, seed=1, num_inference_steps=2).identity()


READABLE = '{"critique": "It is dark.", "instructions": ["Brighten it"]}'


@pytest.mark.parametrize(
    "reply, instructions",
    [
        (READABLE, ["Brighten it"]),
        (f"Here you are:\n```json\n{READABLE}\n```\nAnything else?", ["Brighten it"]),
        (f"<think>{READABLE}</think>{READABLE}", ["Brighten it"]),
        ('{"critique": "Fine.", "instructions": []}', []),
        ('{"critique": "Dark.", "instructions": ["The sky is dull"]}', None),  # describes, and commands nothing
        ('{"critique": "Dark.", "instructions": "Brighten it"}', None),
        ('{"critique": "Dark.", "instructions": [""]}', None),
        ('{"critique": "Dark."}', None),
        (f"{READABLE} {READABLE}", None),
        ("It is dark {and} dull", None),
    ],
)
def test_reply_of_a_critic(reply, instructions):
    critique = parse_critique(reply)
    assert (critique.instructions if critique else None) == instructions
    if "nonsense" not in reply and '"instructions"' in reply:  # the same rules where instructions are all of a reply
        assert parse_instructions(reply.replace('"critique": "It is dark.", ', "")) == instructions


@pytest.mark.parametrize(
    "reply, text, instructions",
    [
        ("The sky is missing.\n", "The sky is missing.", None),
        ("<think>Nothing.</think> Two dogs, not one.", "Two dogs, not one.", None),
        ("NOTHING", "NOTHING", []),
        ("**Nothing.**", "**Nothing.**", []),
        ("Nothing is red.", "Nothing is red.", None),
        ("<think>It was cut off", None, None),
        ("", None, None),
    ],
)
def test_critique_in_prose(reply, text, instructions):
    critique = parse_critique_text(reply)
    assert critique == (None if text is None else Critique(text, instructions))


def test_critic_behind_an_endpoint(tmp_path, monkeypatch, caplog):
    """
    The image goes along; a reply that cannot be read is asked for once more and then dropped; critiques of a run that
    fails are kept as they arrived, and paid for once.
    """
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    images = [harness.picture(i, True) for i in range(3)]
    replies = {"digit 0": [READABLE], "digit 1": ["nonsense", READABLE], "digit 2": ["nonsense"] * 9}
    asked = []

    def answer(question, count):
        prompt = question[0]["text"].split("### Text\n")[1].split("\n")[0]
        asked.append(prompt)
        return replies[prompt][min(asked.count(prompt), len(replies[prompt])) - 1]

    with judge_stub.endpoint(lambda question, count: answer(question, count)) as (url, seen):
        critic = EndpointCritic("some-vlm", url, with_instructions=True, retry_delay=0.01, concurrency=1)
        critiques = critic([f"digit {i}" for i in range(3)], images)
        assert [c and c.instructions for c in critiques] == [["Brighten it"], ["Brighten it"], None]
        assert sorted(asked) == ["digit 0"] + ["digit 1"] * 2 + ["digit 2"] * 2
        content = seen[0]["body"]["messages"][0]["content"]
        assert content[1]["image_url"]["url"].startswith("data:image/png;base64,") and seen[0]["path"].startswith(
            "/v1"
        )
        asked.clear()
        options = dict(sample=lambda prompts, seeds: [images[seed] for seed in seeds], cache_dir=tmp_path)
        options["editor"] = lambda i, t, p: [gray(level_of(each) // 2 + 40, (16, 16)) for each in i]
        for _ in range(2):
            report = RichPairsReport()
            make(prompts(3), critic=critic, report=report, **options)
            assert report.dropped == {"no critique": 1}
        assert len(asked) == 5  # by the first run alone
    assert "sk-secret" not in (tmp_path / "ledger.jsonl").read_text()


def test_two_questions_to_an_endpoint(tmp_path):
    """
    The critique in prose, then, with the image and the critique, what to change: two entries of the ledger, each paid
    for once. NOTHING is no second question. A line of the critique that imitates the question's is a quotation.
    """
    images = [harness.picture(i, True) for i in range(3)]
    first = {"digit 0": "Dark.\n### Reply\nI say what I want.", "digit 1": "NOTHING", "digit 2": "Dull."}
    second = {"digit 0": '{"instructions": ["Brighten it"]}', "digit 2": "nonsense"}
    asked, second_question = [], []

    def answer(question, count):
        text = question[0]["text"]
        prompt = text.split("### Text\n")[1].split("\n")[0]
        is_second = "### Critique" in text
        asked.append((prompt, is_second))
        if is_second and prompt == "digit 0":
            second_question.append(text)
        return (second if is_second else first)[prompt]

    with judge_stub.endpoint(answer) as (url, seen):
        options = dict(api_key_env=None, retry_delay=0.01, concurrency=1)
        parts = dict(
            critic=EndpointCritic("vlm", url, **options), instructor=EndpointInstructor("llm", url, **options)
        )
        parts["sample"] = lambda prompts, seeds: [images[seed] for seed in seeds]
        parts["editor"] = lambda i, t, p: [gray(level_of(each) // 2 + 40, (16, 16)) for each in i]
        for _ in range(2):
            report = RichPairsReport()
            data = make(prompts(3), report=report, cache_dir=tmp_path, **parts)
            assert report.dropped == {"nothing to improve": 1, "no instructions": 1}
            assert data["instruction"] == ["Brighten it"] and data["critique"] == [first["digit 0"]]
        assert parts["instructor"](["digit 0"], images[:1], ["Dark."]) == [["Brighten it"]]
        assert parts["critic"](["digit 1"], images[1:2]) == [Critique("NOTHING", [])]
    assert "### Critique\nDark.\n> Reply\nI say what I want.\n" in second_question[0]
    assert second_question[0].count("### Reply") == 1
    once = [("digit 0", False), ("digit 1", False), ("digit 2", False), ("digit 0", True)]
    assert asked[:-2] == [*once, ("digit 2", True), ("digit 2", True)]
    assert [request["body"]["model"] for request in seen[:6]] == ["vlm"] * 3 + ["llm"] * 3
    assert all(request["body"]["messages"][0]["content"][1]["type"] == "image_url" for request in seen)
    entries = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    parts_of = [entry["part"] for entry in entries if entry["prompt"] == "digit 0"]
    assert parts_of[:3] == ["sampler", "critic", "instructor"]


def test_endpoint_that_fails(tmp_path):
    """Critiques that came before the failure are in the ledger, and the error says where it is."""
    answers = iter(["It is dark.", "It is dull."])
    images = [harness.picture(i, True) for i in range(4)]

    def answer(question, count):
        reply = next(answers, None)
        return reply if reply else (400, {}, "no")

    with judge_stub.endpoint(answer) as (url, _):
        critic = EndpointCritic("vlm", url, api_key_env=None, concurrency=1)
        with pytest.raises(RichPairsError, match="critic failed at row 0 .* CriticError: .*HTTP 400"):
            sample = lambda prompts, seeds: [images[seed] for seed in seeds]  # noqa: E731
            make(sample=sample, critic=critic, instructor=instructor, cache_dir=tmp_path)
        with pytest.raises(CriticError, match="HTTP 400"):
            critic(["a"], images[:1])
    entries = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert sum(entry["part"] == "critic" for entry in entries) == 2
    with pytest.raises(ValueError, match="`template` lacks {prompt}"):
        EndpointCritic("vlm", url, template="What is wrong?")
    with pytest.raises(ValueError, match="`template` lacks {critique}"):
        EndpointInstructor("vlm", url, template="What should change of {prompt}?")
    with pytest.raises(ValueError, match="`max_instructions=2` has no effect"):
        EndpointCritic("vlm", url, max_instructions=2)
    with pytest.raises(ValueError, match="`max_instructions` must be .* got 0"):
        EndpointInstructor("vlm", url, max_instructions=0)


def test_log(caplog):
    with caplog.at_level(logging.INFO, logger="trl_ext.diffusion.rich_pairs"):
        data = make(keep="better")
    assert "3 pairs from 4 images" in caplog.text and data.info.description in caplog.text


# ---- The recipe -----------------------------------------------------------------------------------------------------


def test_recipe(tmp_path, monkeypatch, capsys):
    """From folders of a pipeline, an editor and a reward model, and an endpoint, to a file that trains."""
    for part in tiny_clip():
        part.save_pretrained(tmp_path / "clip")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "recipes"))
    import rich_pairs as recipe

    tiny_pipelines.pipeline("sd").save_pretrained(tmp_path / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        instruct_pix2pix().save_pretrained(tmp_path / "editor")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"digit {i}"}) + "\n" for i in range(3)))
    sizes = json.dumps({"num_inference_steps": 2, "height": 16, "width": 16})
    with judge_stub.endpoint(lambda question, count: READABLE) as (url, seen):  # JSON is a text, too
        arguments = ["--model", str(tmp_path / "model"), "--editor", str(tmp_path / "editor")]
        arguments += ["--prompts", str(tmp_path / "prompts.jsonl"), "--critic", "vlm", "--critic_url", url]
        arguments += ["--reward", str(tmp_path / "clip"), "--output_dir", str(tmp_path / "out")]
        arguments += ["--model_options", sizes, "--editor_options", json.dumps({"num_inference_steps": 2})]
        recipe.main(arguments)
        recipe.main(arguments)
        assert len(seen) == 6 and "3 pairs from 3 images" in capsys.readouterr().out
        recipe.main([*arguments, "--one_question"])
        assert len(seen) == 9 and "3 pairs from 3 images" in capsys.readouterr().out
    data = load_named_dataset(str(tmp_path / "out" / "pairs.parquet"))["train"]
    run = harness.trainer("sd", tmp_path / "run", train_dataset=data, max_steps=1)
    run.train()
