"""
Runs that are killed with SIGKILL and resumed, beside one that is not; started by `test_killed.py` in a process of its
own, which forks a child a run: importing everything once makes each run cost about a second.

    killed_runs.py <model folder> <output folder> <number of kills>

Prints one JSON object: what each killed and resumed run has in common with the uninterrupted one.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import conftest  # noqa: E402, F401 - sets the environment
import harness  # noqa: E402
import online  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from trl_ext.d2po import d2po_trainer, labelling, ledger  # noqa: E402
from trl_ext.training import record_file  # noqa: E402


class RecordedLabeller(online.CountedLabeller):
    """Writes down every comparison it is asked, as a bill would."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def __call__(self, prompts, completions_a, completions_b, **columns):
        with open(self.path, "a") as file:
            for row in zip(prompts, completions_a, completions_b, strict=True):
                file.write(json.dumps(row) + "\n")
        return super().__call__(prompts, completions_a, completions_b, **columns)


PLACES = ("anywhere", "saving", "buying")


class KillAt:
    """
    Counts the calls of functions in each of the places, a profiler of the interpreter, and kills the process at one of
    them: anywhere in training, while a checkpoint is written, or while labels are bought and put into the ledger.
    """

    buying_files = {module.__file__ for module in (labelling, ledger, record_file)}

    def __init__(self, place: str = "anywhere", at: int | None = None):
        self.place = place
        self.at = at
        self.calls = dict.fromkeys(PLACES, 0)
        self.saving = 0

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if code.co_name == "_save_checkpoint" and code.co_filename == d2po_trainer.__file__:
            self.saving += {"call": 1, "return": -1}.get(event, 0)
        if event not in ("call", "c_call"):
            return
        self.calls["anywhere"] += 1
        self.calls["saving"] += self.saving > 0
        self.calls["buying"] += code.co_filename in self.buying_files
        if self.calls[self.place] == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def train(model: str, folder: Path, kill: KillAt | None, resume: bool) -> None:
    trainer = online.trainer(
        model,
        folder,
        labeller=RecordedLabeller(folder.with_suffix(".bill")),
        train_dataset=online.prompts(16),  # two windows an epoch
        peft_config=online.lora(lora_dropout=0.2),
        disable_dropout=False,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        label_batch_size=2,
        save_strategy="steps",
        save_steps=3,  # in the middle of a window
        save_total_limit=1,
        logging_steps=2,
    )
    sys.setprofile(kill)
    trainer.train(resume_from_checkpoint=resume)
    sys.setprofile(None)
    weights = harness.weights(trainer.model)
    weights |= {f"discriminator/{name}": value for name, value in trainer.discriminator.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    result = {"logs": harness.logs(trainer), "calls": kill.calls if kill else None}
    (folder / "result.json").write_text(json.dumps(result))


def run(*arguments) -> bool:
    """Runs in a child; whether it came to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(*arguments)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"A run failed: {arguments}")
    return os.WIFEXITED(status)


def read_ledger(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "gold_labels.jsonl").read_text().splitlines()]


def compare(folder: Path, whole: Path) -> dict:
    first, second = (json.loads((path / "result.json").read_text())["logs"] for path in (folder, whole))
    entries, expected = read_ledger(folder), read_ledger(whole)
    bill, expected_bill = (path.with_suffix(".bill").read_text().splitlines() for path in (folder, whole))
    return {
        "same ledger": entries == expected,
        "same weights": (folder / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes(),
        "same logs": first == second,
        "labels": len(entries),
        "labels bought twice": len(entries) - len({entry["key"] for entry in entries}),
        "asked for again": len(bill) - len(expected_bill),
    }


def main(model: str, output: str, kills: str) -> None:
    output, count = Path(output), int(kills)
    whole = output / "whole"
    assert run(model, whole, KillAt(), False)
    calls = json.loads((whole / "result.json").read_text())["calls"]
    generator = random.Random(0)
    outcomes = []
    for i in range(count):
        folder, place = output / f"killed-{i}", PLACES[i % len(PLACES)]
        killed = 0
        # Every fifth run is killed again as it resumes.
        for attempt in range(2 if i % 5 == 4 else 1):
            at = generator.randrange(1, calls[place] // (1 + attempt))
            killed += not run(model, folder, KillAt(place, at), attempt > 0)
        found = [path.name for path in folder.glob("checkpoint-*")]
        labels = len(read_ledger(folder)) if (folder / "gold_labels.jsonl").exists() else 0
        run(model, folder, None, True)
        outcome = {"place": place, "at": at / calls[place], "killed": killed, "found": found, "labels found": labels}
        outcomes.append({**outcome, **compare(folder, whole)})
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
