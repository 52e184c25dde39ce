"""
Methods that sample, and the commands of rollouts, killed with SIGKILL at every stage: each goes on as if it had not
been. The stages whose state is the method's own run by default, the others with `--runslow`.
"""

import contextlib

import harness
import pytest
import sampling
import tiny
import torch
from datasets import Dataset
from killing import DieAt, die, die_in_a_checkpoint, die_in_call, killed
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_ext import cli
from trl_ext.dph_rl import rehearsal
from trl_ext.launch import mix
from trl_ext.rollout import pass_rates, resuming
from trl_ext.training import tensor_cache
from trl_ext.wro import anchors


# ---- Training -------------------------------------------------------------------------------------------------------


def make(method, base, folder, **given):
    """
    Two steps to a window and three to a checkpoint, so that every other checkpoint cuts a window. Dropout makes the
    random state count.
    """
    return sampling.trainer(
        sampling.BY_ID[method],
        base,
        folder,
        train_dataset=sampling.prompts(8),
        eval_dataset=sampling.prompts(2, seed=1),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2),
        max_steps=8,
        logging_steps=2,
        steps_per_generation=2,
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=4,
        **given,
    )


def die_at(event: str, step: int):
    return lambda *where: make(*where, callbacks=[DieAt(event, step)]).train()


def die_in(owner, name: str, number: int = 1):
    """In the `number`-th call of a function in training."""

    def run(*where):
        trainer = make(*where)
        die_in_call(trainer if owner is None else owner, name, number)
        trainer.train()

    return run


def die_while_saving(number: int):
    def run(*where):
        die_in_a_checkpoint(number)
        make(*where).train()

    return run


def die_in_the_anchors(*where):
    """The first file of anchors is there, the second is not."""
    anchors._PROMPTS_A_FILE = 4
    die_in_call(tensor_cache, "write_shard", 2)
    make(*where)


STAGES = {
    "while anchors are sampled": die_in_the_anchors,
    "while the start is written": die_in(rehearsal, "save_file"),
    "between preparation and training": lambda *where: (make(*where), die()),
    "in the first generation": die_in(None, "_generate_single_turn"),
    "inside the first window": die_at("on_step_end", 1),
    "while the first window is saved": die_in(resuming, "save_window"),
    "while the first checkpoint is written": die_while_saving(1),
    "inside a window after a checkpoint": die_at("on_step_end", 3),
    "in a generation after a checkpoint": die_in(None, "_generate_single_turn", 3),
    "in an evaluation": die_at("on_prediction_step", 4),
    "while the last checkpoint is written": die_while_saving(2),
    "after the last step": die_at("on_train_end", 8),
}
OF_ONE = {"while anchors are sampled": "wro", "while the start is written": "dph_rl"}
DEFAULT = {
    "wro": "while anchors are sampled",
    "dph_rl": "while the start is written",
    "fdpg": "in a generation after a checkpoint",
}


def cases():
    for method in ("dph_rl", "fdpg", "wro"):
        for stage in STAGES:
            if OF_ONE.get(stage, method) == method:
                is_default = stage in (DEFAULT[method], "while the first window is saved")
                yield pytest.param(method, stage, marks=[] if is_default else pytest.mark.slow)


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder, tmp_path_factory):
    """Logs, weights and state of the run of each method that is not killed, made when they are asked for."""
    found = {}

    def of(method):
        if method not in found:
            run = make(method, tiny_folder, tmp_path_factory.mktemp("whole"))
            run.train()
            found[method] = harness.logs(run), harness.weights(run.model), run.state_dict()
        return found[method]

    return of


@pytest.mark.parametrize(("method", "stage"), cases())
def test_killed_training_continues(method, stage, uninterrupted, tiny_folder, tmp_path):
    killed(lambda: STAGES[stage](method, tiny_folder, tmp_path))
    run = make(method, tiny_folder, tmp_path)
    run.train(resume_from_checkpoint=run.last_whole_checkpoint())
    logs, weights, state = uninterrupted(method)
    harness.assert_same_logs(harness.logs(run), logs)
    assert harness.largest_difference(harness.weights(run.model), weights) == 0
    assert run.state_dict() == state


# ---- The commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, two adapters of it, prompts, and a reward that is known by the answer's text."""
    root = tmp_path_factory.mktemp("killed")
    tiny.save(root / "base")
    for seed, name in enumerate(("positive", "short")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(root / name)
    tiny.write_jsonl(root / "prompts.jsonl", 12)
    (root / "rewards.py").write_text(
        "def known(prompts, completions, **kw):\n"
        "    return [float(len(p) % 3 == 0 or len(c) % 2 == 0) for p, c in zip(prompts, completions)]\n"
    )
    return root


def rehearsal_command(root, output) -> list[str]:
    words = ["rehearsal", "--model_name_or_path", str(root / "base"), "--dataset_name", str(root / "prompts.jsonl")]
    words += ["--reward", f"{root / 'rewards.py'}:known", "--output_dir", str(output), "--device", "cpu"]
    return [*words, "--samples", "2", "--max_completion_length", "3", "--reward_threshold", "1", "--extra", "2"]


def mix_command(root, output) -> list[str]:
    words = ["mix", "--policy", str(root / "positive"), str(root / "short"), "--dataset", str(root / "prompts.jsonl")]
    words += ["--output_dir", str(output), "--device", "cpu", "--responses", "4", "--max_new_tokens", "4"]
    return [*words, "--num_prompts", "4", "--merge", "true", "--num_samples", "2", "--candidates", "2"]


COMMANDS = {"rehearsal": rehearsal_command, "mix": mix_command}
# What dies: the number of the file of the cache, or a function of the stage that comes after.
COMMAND_STAGES = {
    ("rehearsal", "in the first answers"): lambda: die_in_call(tensor_cache, "write_shard", 2),
    ("rehearsal", "in the extra answers"): lambda: die_in_call(tensor_cache, "write_shard", 4),
    ("rehearsal", "between its files"): lambda: die_in_call(Dataset, "to_json", 3),
    ("mix", "before anything is kept"): lambda: die_in_call(tensor_cache, "write_shard", 1),
    ("mix", "in the samples"): lambda: die_in_call(tensor_cache, "write_shard", 2),
    ("mix", "in the scores"): lambda: die_in_call(tensor_cache, "write_shard", 4),
    ("mix", "between weights and report"): lambda: die_in_call(mix, "write_samples"),
}


def read(output) -> dict[str, bytes]:
    """The files of a command, without the cache and with the folder's name taken out."""
    return {
        str(path.relative_to(output)): path.read_bytes().replace(str(output).encode(), b"OUTPUT")
        for path in sorted(output.rglob("*"))
        if path.is_file() and "cache" not in path.relative_to(output).parts
    }


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """What each command writes that is not killed, made when it is asked for."""
    found = {}

    def of(command):
        if command not in found:
            output = tmp_path_factory.mktemp(command)
            with small_files():
                assert cli.main(COMMANDS[command](folders, output)) == 0
            found[command] = read(output)
        return found[command]

    return of


@contextlib.contextmanager
def small_files():
    before, pass_rates._PROMPTS_A_FILE = pass_rates._PROMPTS_A_FILE, 4
    yield
    pass_rates._PROMPTS_A_FILE = before


@pytest.mark.parametrize(("command", "stage"), COMMAND_STAGES)
def test_killed_command_continues(command, stage, folders, whole, tmp_path):
    """Repeated, it writes byte for byte what the command writes that was not killed, and computes nothing twice."""
    words = COMMANDS[command](folders, tmp_path)

    def run():
        COMMAND_STAGES[command, stage]()
        cli.main(words)

    with small_files():
        killed(run)
        kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
        assert bool(kept) == (stage != "before anything is kept")
        assert cli.main(words) == 0
    assert read(tmp_path) == whole(command)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    assert {name: after[name] for name in kept} == kept
