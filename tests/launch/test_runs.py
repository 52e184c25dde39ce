"""Runs from the command line, within the process: what is trained, said, drawn, and resumed."""

import gc
import io
import json
import re
import shlex
import sys
import weakref
from pathlib import Path

import pytest
import tiny
import torch

from trl_ext import FDPOTrainer, cli
from trl_ext.launch import console, describe_data
from trl_ext.launch.curves import FILE_NAME, draw_curves, points
from trl_ext.launch.d2po import GoldArguments, make_labeller
from trl_ext.training.resume import ResumableRun


ROOT = Path(__file__).resolve().parents[2]
CPU = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--gradient_checkpointing", "false"]


def options(model: str, data: Path, output: Path, *more: str) -> list[str]:
    arguments = ["--model_name_or_path", model, "--dataset_name", str(data), "--output_dir", str(output), *CPU]
    return [*arguments, "--per_device_train_batch_size", "2", "--logging_steps", "1", *more]


@pytest.fixture
def data(tmp_path):
    return tiny.write_jsonl(tmp_path / "pairs.jsonl", 16)


# ---- The model that is named is the model that is trained -----------------------------------------------------------


class Stop(Exception):
    pass


def test_no_recipe_substitutes_the_model(monkeypatch, data, tmp_path):
    """The Hub id of SmolLM2 stays it, whether or not the quickstart has made its converted copy."""
    given = {}

    def init(self, model, **kwargs):
        given["model"] = model
        raise Stop

    monkeypatch.setattr(FDPOTrainer, "__init__", init)
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path))
    sys.path.insert(0, str(ROOT / "recipes"))
    try:
        import quickstart_model
    finally:
        sys.path.pop(0)
    monkeypatch.setattr(quickstart_model, "quickstart_model", lambda *a, **k: pytest.fail("substituted"))
    cli.main(["fdpo", *options(quickstart_model.BASE_MODEL, data, tmp_path / "out")])
    assert given["model"] == quickstart_model.BASE_MODEL


def test_the_quickstart_says_which_model_it_trains(monkeypatch, capsys):
    """Without arguments a recipe trains the embedded default; the copy is named as an argument, and said to be one."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import common
    import quickstart_model

    monkeypatch.setattr(quickstart_model, "quickstart_model", lambda: "/cache/copy")
    monkeypatch.setattr(sys, "argv", ["recipes/fdpo.py"])
    ran = []
    monkeypatch.setattr(common, "main", lambda *arguments: ran.append(arguments))
    common.run("fdpo")
    said = capsys.readouterr().out
    [(method, arguments, _)] = ran
    assert method == "fdpo" and arguments[arguments.index("--model_name_or_path") + 1] == "/cache/copy"
    assert "/cache/copy" in said and "not equal to" in said and "4-bit" in said
    assert "original" in quickstart_model.describe_source(quickstart_model.BASE_MODEL)


# ---- Dry run --------------------------------------------------------------------------------------------------------


def test_dry_run(tiny_folder, tmp_path, capsys):
    """
    Pairs kept and left out and why, lengths, tokens, parameters, memory, disk, an example; and nothing is written.
    """
    rows = [json.loads(line) for line in tiny.write_jsonl(tmp_path / "some.jsonl", 12).read_text().splitlines()]
    rows[3]["prompt"] = "long " * 200
    rows[5]["chosen"] = " "
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--max_length", "64", "--drop_empty_completions", "true", "--use_peft", "true", "--lora_r", "4"]
    more += ["--precompute_ref_log_probs", "true", "--dry_run", "--max_steps", "10", "--save_steps", "5"]
    assert cli.main(["fdpo", *options(tiny_folder, path, tmp_path / "out", *more)]) == 0
    text = capsys.readouterr().out
    lines = dict(re.findall(r"^ *(\w[\w ]*?)  +(.*)$", text.partition("first example")[0], flags=re.MULTILINE))
    assert lines["training data"] == "10 of 12 pairs"
    assert re.search(r"left out +1: a response is empty", text)
    assert re.search(r"left out +1: the prompt alone fills `max_length=64`", text)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    kept = [row for i, row in enumerate(rows) if i not in (3, 5)]
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in kept]
    assert f"longest {max(lengths)} tokens" in lines["prompt"]
    assert lines["optimizer step"].startswith("2 pairs, about ") and "10 steps" in lines["length"]
    # A LoRA of rank 4 on the query (32 -> 32) and value (32 -> 16) projections of two layers.
    assert re.match(r"(\d+) trained of", lines["parameters"].replace(",", ""))
    assert "2 checkpoints of" in lines["disk"] and "reference" not in lines
    assert "precompute_ref_log_probs" in text
    assert f"| {rows[0]['prompt']}" in text and "<|end|>" in text
    assert not (tmp_path / "out").exists()


def test_dry_run_of_d2po(tiny_folder, tmp_path, capsys):
    """Prompts, sampled tokens, windows, gold labels and their cost, steps as they are; nobody is asked anything."""
    path = tiny.write_jsonl(tmp_path / "pairs.jsonl", 24)
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "long " * 200, "chosen": "a", "rejected": "b"}) + "\n")
    more = ["--use_peft", "true", "--max_completion_length", "4", "--max_length", "32", "--window_size", "8"]
    more += ["--labels_per_window", "3", "--label_budget", "11", "--label_cost", "0.5", "--gold", "word_collector"]
    more += ["--gradient_accumulation_steps", "2", "--num_policy_epochs", "2", "--num_train_epochs", "2"]
    words = ["d2po", *options(tiny_folder, path, tmp_path / "out", *more)]
    assert cli.main([*words, "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"training data +24 of 25 prompts\n +left out +1: .*max_completion_length=4.*max_length=32", text)
    assert re.search(r"completions +2 a prompt, up to 4 tokens", text) and "chosen" not in text
    assert re.search(r"windows +6 of 8 prompts, 4 steps each", text)
    assert re.search(r"gold labels +up to 11 from word_collector.*cost of 5.5: 3 a window, 11 in all", text)
    assert re.search(r"optimizer step +4 prompts, at most [\d,]+ tokens", text)
    assert re.search(r"length +24 steps, 2 epochs", text) and "| What of the" in text
    assert not (tmp_path / "out").exists()
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 24


@pytest.mark.parametrize("accumulated, epochs, expected", [(1, 1.0, 4), (3, 2.0, 4), (64, 1.0, 1), (2, 0.5, 1)])
def test_steps_are_those_of_the_run(accumulated, epochs, expected, tiny_folder, tmp_path):
    """7 pairs in batches of 2: the last step of an epoch has fewer pairs, and is a step."""
    import harness
    from methods import BY_ID

    from trl_ext.launch.dry_run import steps

    trainer = harness.trainer(
        BY_ID["simper"],
        tiny_folder,
        tmp_path,
        train_dataset=tiny.dataset(7),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulated,
        num_train_epochs=epochs,
        max_steps=-1,
    )
    assert steps(trainer) == expected
    trainer.train()
    assert trainer.state.global_step == expected


@pytest.mark.parametrize(
    "optim, state_bytes", [("adamw_torch", 8), ("sgd", 0), ("adamw_8bit", 2), ("adafactor", 0), ("rmsprop", 4)]
)
def test_memory_is_the_sum_of_known_parts(optim, state_bytes, tiny_folder, tmp_path):
    """Of full training in float32: weights, a second copy, gradients and the optimizer's state are known exactly."""
    import harness
    from methods import BY_ID

    from trl_ext.launch.dry_run import checkpoint_bytes, memory, parameter_counts

    trainer = harness.trainer(BY_ID["fdpo"], tiny_folder, tmp_path, optim=optim)
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    parts = memory(trainer)
    assert parameter_counts(trainer.model) == (count, count)
    assert (parts["weights"], parts["reference"], parts["gradients"]) == (4 * count,) * 3
    assert parts["optimizer"] == state_bytes * count and parts["activations"] > 0
    assert checkpoint_bytes(trainer) == (4 * count, (4 + state_bytes) * count)


# ---- A dataset alone ------------------------------------------------------------------------------------------------


def test_data(tiny_folder, tmp_path, capsys):
    """Rows that training would refuse or leave out are named; lengths with a tokenizer; one example as it is read."""
    path = tiny.write_jsonl(tmp_path / "pairs.jsonl", 12)
    assert cli.main(["data", str(path), "--tokenizer", tiny_folder, "--max_length", "20"]) == 0
    text = capsys.readouterr().out
    assert "12 rows" in text and "pairs of texts" in text and "No problems" in text and "<|end|>" in text
    left_out = re.search(r"max_length=20: (\d+) pairs left out .* (\d+) cut", text)
    assert left_out and int(left_out[1]) == 0 and int(left_out[2]) > 0

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["rejected"], rows[4]["chosen"], rows[6] = "", rows[4]["rejected"], rows[0]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["data", str(path)]) == 1
    text = capsys.readouterr().out
    assert re.search(r"1 row \(2\): has an empty `rejected`", text)
    assert re.search(r"1 row \(4\): `chosen` equals `rejected`", text)
    assert re.search(r"1 row \(6\): the same pair .*row 0", text)


@pytest.mark.parametrize("implicit", [False, True], ids=["", "implicit prompt"])
def test_data_and_the_trainers_name_the_same_rows(implicit, tiny_folder, tmp_path):
    """Every row that a trainer refuses alone is a problem of `trl-ext data`, in the trainer's words; and no other."""
    import harness
    from datasets import Dataset
    from methods import BY_ID

    from trl_ext.preference.rows import RowError, is_empty, with_prompt

    def said(role, content):
        return {"role": role, "content": content}

    good = {"prompt": [said("user", "a")], "chosen": [said("assistant", "b")], "rejected": [said("assistant", "c")]}
    text = {"prompt": "What? ", "chosen": "b", "rejected": "c"}
    bad = [
        {"prompt": None},
        {"chosen": None},
        {"rejected": []},
        {"prompt": []},
        {"chosen": [said("assistant", None)]},
        {"chosen": [said(None, "b")]},
        {"rejected": [said("user", "x"), said("assistant", "c")]},
        {"chosen": [*good["prompt"], *good["chosen"]]},
        {"prompt": [said("user", "a"), said("assistant", "So")], "chosen": [said("tool", "b")]},
        {"prompt": [said("user", "a"), said("assistant", "So")]},
    ]
    rows = [good, *({**good, **change} for change in bad)]
    texts = [
        text,
        {**text, "chosen": " "},
        {**text, "prompt": None},
        {**text, "rejected": None},
        {**text, "prompt": ""},
    ]
    if implicit:
        rows = [
            {side: (row["prompt"] or []) + row[side] for side in ("chosen", "rejected")}
            for row in rows
            if row["chosen"] is not None
        ]
        texts = [
            {"chosen": "a b", "rejected": "a c"},
            {"chosen": "", "rejected": "c"},
            {"chosen": "b", "rejected": None},
        ]
    for kind in (rows, texts):
        found = describe_data.inspect_pairs(Dataset.from_list(kind))
        named = {row: what for what, where in found.problems.items() for row in where}
        assert 0 not in named and len(named) >= (2 if kind is texts else 3)
        for i in range(len(kind)):
            dataset = Dataset.from_list(kind).select([0, i])
            try:
                harness.trainer(BY_ID["simper"], tiny_folder, tmp_path, train_dataset=dataset)
            except ValueError as error:
                assert i in named, f"{i}: {error}"
                row = dataset[1]
                assert str(error).startswith("Row 1 of the train dataset")
                column = re.search(r"`(prompt|chosen|rejected)", str(error))[1]
                assert f"`{column}" in named[i], f"{error} / {named[i]}"
                if not any(is_empty(row[side]) for side in ("chosen", "rejected")):
                    with pytest.raises(RowError) as raised:
                        with_prompt(row)
                    assert str(raised.value) in str(error) and str(raised.value) == found.details[named[i]]
            else:
                assert i not in named, f"{i}: {named[i]}"


def test_data_of_many_rows_with_one_problem(tmp_path, capsys):
    """One line a problem, with the first row's value, and not one a row."""
    rows = [{"prompt": [{"from": "human", "value": f"q{i}"}], "chosen": "a", "rejected": "b"} for i in range(40)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["data", str(path)]) == 1
    text = capsys.readouterr().out
    assert text.count("ShareGPT") == 1 and "40 rows (0, 1, 2, 3, 4, ...)" in text and "q0" in text


def test_data_of_prompts_and_d2po_name_the_same_rows(tiny_folder):
    from datasets import Dataset
    from transformers import AutoTokenizer

    from trl_ext.d2po.prompts import prepare_prompts

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    message = {"role": "user", "content": "a"}
    kinds = (["a", "", None, " "], [[message], [], None, [{**message, "content": None}], [{**message, "role": None}]])
    for prompts in kinds:
        rows = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
        named = {row for where in describe_data.inspect_prompts(rows, tokenizer).problems.values() for row in where}
        for i in range(len(rows)):
            try:
                prepare_prompts(rows.select([0, i]), tokenizer, "train", None)
            except ValueError as error:
                assert "Row 1 of the train dataset" in str(error) and i in named
            else:
                assert i not in named


def test_data_of_other_kinds(tmp_path, capsys):
    from datasets import Dataset

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": " "}\n')
    assert cli.main(["data", str(tmp_path / "prompts.jsonl")]) == 1
    said = capsys.readouterr().out
    assert "d2po" in said and re.search(r"1 row \(1\): has an empty prompt", said)
    assert re.search(r"1 row \(2\): a blank prompt", said)
    (tmp_path / "tokens.jsonl").write_text('{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": []}\n')
    assert cli.main(["data", str(tmp_path / "tokens.jsonl")]) == 1
    assert "Row 0 of the train dataset has an empty `rejected`" in capsys.readouterr().out
    (tmp_path / "other.jsonl").write_text('{"question": "a"}\n')
    assert cli.main(["data", str(tmp_path / "other.jsonl")]) == 1
    assert "`chosen` and `rejected`" in capsys.readouterr().out
    assert cli.main(["data", str(tmp_path / "missing.jsonl")]) == 1
    assert "missing.jsonl" in capsys.readouterr().err
    question = {"role": "user", "content": "q"}
    rows = [{side: [question, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}]
    text, whole = describe_data.describe(Dataset.from_list(rows), "train")
    assert whole and "dialogues" in text and "within both responses" in text


# ---- Curves ---------------------------------------------------------------------------------------------------------


def test_points_of_every_evaluation_set():
    log = [
        {"step": 1, "loss": 0.7, "rewards/margins": 0.0},
        {"step": 2, "eval_loss": 0.6, "eval_a_loss": 0.5, "eval_b_loss": 0.4, "eval_runtime": 1.0},
        {"step": 2, "loss": 0.65},
    ]
    assert points(log, "loss") == {
        "training": [(1, 0.7), (2, 0.65)],
        "held out": [(2, 0.6)],
        "held out, a": [(2, 0.5)],
        "held out, b": [(2, 0.4)],
    }
    assert points(log, "rewards/margins") == {"training": [(1, 0.0)]}


def test_nothing_to_draw(tmp_path):
    assert not draw_curves([{"step": 1, "train_runtime": 1.0}], tmp_path / "curves.png", "none")
    assert not (tmp_path / "curves.png").exists()


# ---- Interrupted and resumed ----------------------------------------------------------------------------------------


def test_an_interrupted_run_names_the_command_that_resumes_it(tiny_folder, data, tmp_path, capsys, monkeypatch):
    """The printed command, given to the shell's splitter, continues from the checkpoint and ends like any run."""
    output = tmp_path / "a folder"
    words = ["fdpo", *options(tiny_folder, data, output, "--max_steps", "6", "--save_steps", "2")]
    words += ["--hub_token", "hf_secret"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/trl-ext", *words])
    step = FDPOTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FDPOTrainer, "training_step", interrupted)
        assert cli.main(words) == 130
    said = capsys.readouterr().err
    assert "step 5 of 6" in said and "checkpoint-4" in said and "hf_secret" not in said and "Traceback" not in said
    command = next(line for line in said.splitlines() if line.startswith("    trl-ext"))
    program, *again = shlex.split(command)
    assert program == "trl-ext" and again[-2:] == ["--resume_from_checkpoint", "true"]
    assert (output / FILE_NAME).read_bytes().startswith(b"\x89PNG")

    assert cli.main(again) == 0
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert (output / "model.safetensors").exists()


def test_without_a_checkpoint_there_is_nothing_to_resume(tiny_folder, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(FDPOTrainer, "training_step", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    more = ["--max_steps", "6", "--save_steps", "4"]
    assert cli.main(["fdpo", *options(tiny_folder, data, tmp_path / "out", *more)]) == 130
    said = capsys.readouterr().err
    assert "resume_from_checkpoint" not in said and "step 4" in said


def test_the_resume_command():
    words = ["trl-ext", "fdpo", "--resume_from_checkpoint", "a", "--output_dir", "b c", "--hub-token=x"]
    expected = "trl-ext fdpo --output_dir 'b c' --hub_token ... --resume_from_checkpoint true"
    assert console.resume_command(words) == expected


def test_the_launcher_of_a_recipe_is_part_of_the_command(monkeypatch):
    """Its words are read off the parent processes."""
    import psutil

    class Process:
        def __init__(self, words=()):
            self.words = words

        def cmdline(self):
            return self.words

        def parents(self):
            launch = [
                "/venv/bin/python",
                "/venv/bin/accelerate",
                "launch",
                "--num_processes",
                "2",
                "r/fdpo.py",
                "--seed",
            ]
            return [Process(["bash"]), Process([*launch, "1"])]

    monkeypatch.setattr(psutil, "Process", Process)
    monkeypatch.setattr(sys, "argv", ["r/fdpo.py", "--seed", "1"])
    assert console.typed_command() == ["accelerate", "launch", "--num_processes", "2", "r/fdpo.py", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["r/tdpo.py", "--seed", "1"])
    assert console.typed_command() == ["python", "r/tdpo.py", "--seed", "1"]


def test_errors_of_this_project_have_no_traceback(tiny_folder, data, tmp_path, capsys):
    """One line says what is wrong; an error from elsewhere keeps its traceback."""
    arguments = options(tiny_folder, data, tmp_path / "out", "--dataset_train_split", "validation")
    assert cli.main(["fdpo", *arguments]) == 1
    said = capsys.readouterr().err
    assert "`dataset_train_split='validation'`" in said and "Traceback" not in said
    assert cli.main(["fdpo", *options(str(tmp_path / "nowhere"), data, tmp_path / "out")]) == 1
    assert "Traceback" in capsys.readouterr().err


# ---- The end of a run -----------------------------------------------------------------------------------------------


def test_the_wrapped_model_is_gone_before_the_process_group():
    """
    Its reducer would hold the last reference to the group, whose destructor then joins a thread that waits for the
    interpreter's lock: one of two launches in two processes never ended.
    """
    seen = []

    class Wrapped:  # in a cycle, as modules with hooks are
        def __init__(self):
            self.itself = self

    class Trainer:
        def end(self):
            seen.append(wrapped() is None)

    class Accelerator:
        def wait_for_everyone(self):
            seen.append("waited")

        def free_memory(self):
            self.models = []

    class Run(ResumableRun, Trainer):
        pass

    run, model = Run(), Wrapped()
    run.model, run.model_wrapped, run.accelerator = torch.nn.Linear(1, 1), model, Accelerator()
    run.accelerator.models, wrapped = [model], weakref.ref(model)
    del model
    gc.disable()
    try:
        run.end()
    finally:
        gc.enable()
    assert seen == ["waited", True]


# ---- D2PO -----------------------------------------------------------------------------------------------------------


def test_gold_is_a_function_of_the_users(tmp_path):
    """As `trl-ext evaluate --judge` takes it."""
    (tmp_path / "rewards.py").write_text(
        "def brevity(prompts, completions, **columns):\n    return [-float(len(c)) for c in completions]\n"
    )
    labeller = make_labeller(GoldArguments(gold=f"{tmp_path / 'rewards.py'}:brevity", label_cost=3.0))
    assert list(labeller(["p", "p"], ["long", "a"], ["b", "longer"])) == [0.0, 1.0]
    assert labeller.cost == 3.0 and "brevity" in labeller.name
    for wrong in ("vowels", "nowhere.py:brevity", f"{tmp_path / 'rewards.py'}:length"):
        with pytest.raises(ValueError, match=re.escape(f"--gold {wrong}")):
            make_labeller(GoldArguments(gold=wrong))


def test_quitting_at_the_terminal(tiny_folder, data, tmp_path, capsys, monkeypatch):
    """`q` ends the run with the option that continues it, not with a traceback and a remedy for Python."""
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nq\n"))
    more = ["--use_peft", "true", "--max_completion_length", "4", "--window_size", "4", "--labels_per_window", "4"]
    more += ["--gold", "terminal", "--max_steps", "4"]
    words = ["d2po", *options(tiny_folder, data, tmp_path / "out", *more)]
    monkeypatch.setattr(sys, "argv", ["trl-ext", *words])
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and "trainer.train(" not in said
    assert "--resume_from_checkpoint true" in said and str(tmp_path / "out") in said
    assert len((tmp_path / "out" / "gold_labels.jsonl").read_text().splitlines()) == 1
