"""
The cache of the reference's statistics: what hits, what misses, what is never believed.

Bounds. Log-probabilities of the tiny model's responses are about -100 nats, of which fp32 resolves 1e-5; entropies are
about 5. The same pair in another batch (other padding, other rows beside it) is the same to `NOISE`, and so are
numbers from the cache and from a forward in training.
"""

import gc
import json
import logging
import pickle
import shutil
import weakref
from pathlib import Path

import harness
import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from datasets import IterableDataset
from launching import fork, fork_and_kill
from methods import BY_ID
from peft import LoraConfig, get_peft_model
from reading import Reading, make, nearby
from test_method_suite import script
from transformers import BitsAndBytesConfig, Qwen2ForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_ext import FDPOConfig, FDPOTrainer
from trl_ext.preference import reference_cache
from trl_ext.training.text_card import describe_reference


TESTS = Path(__file__).resolve().parent.parent
COLUMNS = [f"ref_{side}_{name}" for name in ("logps", "entropy") for side in ("chosen", "rejected")]
NOISE = {"logps": 3e-5, "entropy": 3e-6}
PRECOMPUTE = dict(precompute_ref_log_probs=True)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Pairs in each batch that a reference has scored."""
    pairs, original = [], Reading.score_reference

    def counted(self, inputs, *args):
        pairs.append(len(inputs["input_ids"]) // 2)
        return original(self, inputs, *args)

    for trainer in (Reading, FDPOTrainer):
        monkeypatch.setattr(trainer, "score_reference", counted)
    return pairs


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="trl_ext")
    return lambda: [record.getMessage() for record in caplog.records if "trl_ext" in record.name]


def build(folder, out, **options):
    return make(Reading, folder, out, **{**PRECOMPUTE, **options})


def statistics(dataset) -> np.ndarray:
    return np.array([[row[column] for column in COLUMNS] for row in dataset])


def assert_close(first, second) -> None:
    for i, column in enumerate(COLUMNS):
        bound = NOISE[column.rsplit("_")[-1]]
        assert np.abs(first[:, i] - second[:, i]).max() < bound, column


def shards(folder) -> list[Path]:
    return sorted(Path(folder).rglob("*.arrow"))


# ---- Values ---------------------------------------------------------------------------------------------------------


def test_values_do_not_depend_on_the_batch(tiny_folder, tmp_path):
    """
    Each pair alone, in threes with what is as long, all together, and padded by 64 tokens: the same numbers, and those
    of a forward in training.
    """
    runs = [
        build(tiny_folder, tmp_path, reference_cache_dir=str(tmp_path / f"cache-{i}"), **options)
        for i, options in enumerate(
            ({"precompute_ref_batch_size": 1}, {"precompute_ref_batch_size": 3}, {}, {"pad_to_multiple_of": 64})
        )
    ]
    first = statistics(runs[0].train_dataset)
    assert first.std(axis=0).min() > 1e-3
    for other in runs[1:]:
        assert_close(statistics(other.train_dataset), first)
    plain = make(Reading, tiny_folder, tmp_path)
    with torch.no_grad():
        scored = plain.score_reference(harness.batch(plain, 8))
    sides = [side for name in ("logps", "entropy") for side in scored.per_response(name).chunk(2)]
    assert_close(torch.stack(sides, dim=1).numpy(), first)


def test_precision_is_that_of_training(tiny_folder, tmp_path):
    """
    Under bf16 autocast the numbers are those of a forward in training under it: a twentieth of what fp32 would differ
    by.
    """
    plain = make(Reading, tiny_folder, tmp_path, bf16=True)
    with torch.no_grad():
        scored = plain.score_reference(harness.batch(plain, 8))
    sides = [side for name in ("logps", "entropy") for side in scored.per_response(name).chunk(2)]
    expected = torch.stack(sides, dim=1).numpy()
    half, single = (
        statistics(build(tiny_folder, tmp_path, bf16=bf16, precompute_ref_batch_size=8).train_dataset)
        for bf16 in (True, False)
    )
    differs = np.abs(half - single).max(axis=0)
    assert (differs > 1e-4).all() and (np.abs(half - expected).max(axis=0) < differs / 20).all()


def with_adapter(folder, seed=7, **options):
    """An instance with a trained adapter: all of it a function of the seed."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "up_proj"], **options})
    return nearby(get_peft_model(harness.load(folder), config), seed=seed, only="lora_")


@pytest.mark.parametrize("kind", ["full", "lora", "qlora", "ref adapter", "separate", "bf16"])
def test_training_is_the_same(kind, tiny_folder, tmp_path):
    """The run without the cache, for references of every kind: every logged number, entropies weighing the loss."""
    runs = []
    for precompute in (False, True):
        options = dict(max_steps=4, adam_epsilon=1e-3, precompute_ref_log_probs=precompute, bf16=kind == "bf16")
        lora, model = LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), tiny_folder
        if kind == "ref adapter":
            model = with_adapter(tiny_folder)
        elif kind == "separate":
            options["ref_model"] = nearby(harness.load(tiny_folder))
        elif kind in ("lora", "qlora"):
            options["peft_config"] = lora
        if kind == "qlora":
            pytest.importorskip("bitsandbytes")
            options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        trainer = make(Reading, model, tmp_path / str(precompute), eval_dataset=tiny.dataset(4, seed=1), **options)
        trainer.train()
        if kind != "qlora":  # whose repacking for inference cannot take layers as small as these on some CPUs
            trainer.evaluate()
        runs.append(harness.logs(trainer))
    tolerance = dict(rtol=5e-3, atol=5e-3) if kind == "bf16" else dict(rtol=1e-4, atol=5e-5)
    # Where the policy is still its reference, the sign of its reward is that of rounding noise.
    harness.assert_same_logs(*runs, **tolerance, ignore=("rewards/accuracies",))


# ---- The key --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 1e-5},
        {"beta": 0.3},
        {"per_device_train_batch_size": 2, "precompute_ref_batch_size": 5},
        {"seed": 3, "num_train_epochs": 2, "gradient_accumulation_steps": 2},
        {"pad_to_multiple_of": 8},
        {"max_length": 512},  # which cuts no more than 1024 does
        {"gradient_checkpointing": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_hits(options, tiny_folder, tmp_path, computed):
    """What the numbers do not depend on changes nothing: not the output folder, nor any of these."""
    first = build(tiny_folder, tmp_path / "first")
    assert sum(computed) == 8
    computed.clear()
    second = build(tiny_folder, tmp_path / "second", **options)
    assert computed == []
    assert (statistics(second.train_dataset) == statistics(first.train_dataset)).all()  # bitwise


def test_hits_of_content(tiny_folder, tmp_path, computed):
    """
    Neither path, name nor order matters: a copy of the model elsewhere, an instance given as the reference, the base
    under an adapter; rows shuffled, in part, in an evaluation set, tokenized before, or with a column more.
    """
    first = build(tiny_folder, tmp_path)
    expected = statistics(first.train_dataset)
    computed.clear()
    elsewhere = str(shutil.copytree(tiny_folder, tmp_path / "elsewhere"))
    lora = LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"], modules_to_save=["lm_head"])
    for options in (
        {"model": elsewhere},
        {"ref_model": harness.load(tiny_folder)},
        {"peft_config": lora},
        {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)},
    ):
        model = options.pop("model", tiny_folder)
        assert (statistics(build(model, tmp_path, **options).train_dataset) == expected).all()
    order = [5, 2, 7]
    rows = tiny.dataset(8).select(order).add_column("note", list("abc"))
    trainer = build(tiny_folder, tmp_path, train_dataset=rows, eval_dataset={"a": tiny.dataset(8), "b": rows})
    assert (statistics(trainer.train_dataset) == expected[order]).all()
    assert (statistics(trainer.eval_dataset["a"]) == expected).all()
    bare = first.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    assert (statistics(build(tiny_folder, tmp_path, train_dataset=bare).train_dataset) == expected).all()
    assert computed == []


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 1024, 24, 13])
def test_both_ways_to_the_key(truncation, max_length, tiny_folder, tmp_path):
    """The short way from rows to keys is the way through the collator, whatever is cut; no two pairs have one key."""
    rows = make(Reading, tiny_folder, tmp_path, train_dataset=tiny.dataset(32), max_length=None).train_dataset
    rows = rows.filter(lambda row: len(row["prompt_ids"]) < 13).select(range(3, 19))  # with indices, and a slice
    expected = None
    for multiple in (None, 16):
        collator = DataCollatorForPreference(
            pad_token_id=0, max_length=max_length, truncation_mode=truncation, pad_to_multiple_of=multiple
        )
        found = reference_cache.pair_keys(collator(list(rows)))
        assert expected is None or found == expected
        expected = found
    assert reference_cache.row_keys(rows, max_length, truncation) == expected
    assert len(set(expected[0])) == len(rows) and max(expected[1]) == min(max_length or 1024, max(expected[1]))


def changed_row(count=8):
    rows = list(tiny.dataset(count))
    rows[3] = dict(rows[3], chosen=rows[3]["chosen"] + " Yes.")
    return tiny.Dataset.from_list(rows)


def changed_model(folder, out, **config) -> str:
    """The tiny model with one weight moved by one step of fp32, or its configuration changed."""
    model = harness.load(folder)
    if not config:
        weight = model.model.layers[1].mlp.up_proj.weight.data
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(10.0))
    model.config.update(config)
    model.save_pretrained(out)
    tiny.tokenizer().save_pretrained(out)
    return str(out)


@pytest.mark.parametrize(
    "change, pairs",
    [
        ("max_length", 8),
        ("truncation_mode", 8),
        ("row", 1),
        ("weight", 8),
        ("config", 8),
        ("dtype", 8),
        ("autocast", 8),
        ("quantization", 8),
        ("ref adapter", 8),
        ("collator", 8),
    ],
)
def test_misses(change, pairs, tiny_folder, tmp_path, computed):
    """What the numbers depend on is computed anew: pairs that the change touches, and no others."""
    before = dict(max_length=20) if change == "truncation_mode" else {}
    build(tiny_folder, tmp_path / "first", **before)
    assert sum(computed) == 8
    computed.clear()
    model, options = tiny_folder, {}
    if change == "max_length":
        options = {"max_length": 20}
    elif change == "truncation_mode":
        options = {"max_length": 20, "truncation_mode": "keep_end"}
    elif change == "row":
        options = {"train_dataset": changed_row()}
    elif change == "weight":
        model = changed_model(tiny_folder, tmp_path / "model")
    elif change == "config":
        model = changed_model(tiny_folder, tmp_path / "model", rms_norm_eps=1e-3)
    elif change == "dtype":
        options = {"model_init_kwargs": {"dtype": "bfloat16"}}
    elif change == "autocast":
        options = {"bf16": True}
    elif change == "quantization":
        pytest.importorskip("bitsandbytes")
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        options = {"quantization_config": quantization, "peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
    elif change == "ref adapter":
        model = with_adapter(tiny_folder)
    elif change == "collator":
        options = {"data_collator": ShortCollator(pad_token_id=0)}
    build(model, tmp_path / "second", **options)
    assert sum(computed) == pairs
    computed.clear()
    if change != "ref adapter":  # whose policy is an instance, with the copy in it now
        build(model, tmp_path / "third", **options)
        assert computed == []


def test_another_adapter_is_another_reference(tiny_folder, tmp_path, computed):
    """The frozen copy of an adapter: its weights and its scaling count, the policy's own do not."""

    def run(seed=7, alpha=8):
        build(with_adapter(tiny_folder, seed, lora_alpha=alpha), tmp_path)
        return sum(computed), computed.clear()

    assert [run()[0], run()[0], run(seed=8)[0], run(alpha=16)[0], run()[0]] == [8, 0, 8, 8, 0]


def test_statistics_asked_for(tiny_folder, tmp_path, computed):
    """Log-probabilities alone do not do for a method that reads entropies as well; the other way round they do."""

    def f_dpo(beta):
        args = FDPOConfig(**{**harness.defaults(tmp_path), **PRECOMPUTE, "beta": beta})
        trainer = FDPOTrainer(model=tiny_folder, args=args, train_dataset=tiny.dataset(8))
        assert "ref_chosen_entropy" not in trainer.train_dataset.column_names
        return sum(computed), computed.clear()

    assert f_dpo(0.1)[0] == 8
    build(tiny_folder, tmp_path)
    assert sum(computed) == 8
    computed.clear()
    for shard in shards(reference_cache.default_cache_dir()):
        if "ref_chosen_entropy" not in pa.ipc.open_file(shard).schema.names:
            shard.unlink()
    assert f_dpo(0.2)[0] == 0


class ShortCollator(DataCollatorForPreference):
    """A user's collator with a truncation of its own."""

    def __call__(self, examples):
        return super().__call__([dict(example, chosen_ids=example["chosen_ids"][:5]) for example in examples])


# ---- Interruptions, other runs, bad files ---------------------------------------------------------------------------


def test_killed_and_resumed(tiny_folder, tmp_path, computed):
    """After SIGKILL in the middle, only what no shard holds is computed, and all is as if nothing had happened."""
    cache = tmp_path / "cache"
    arguments = (tiny_folder, str(cache), str(tmp_path / "out"))
    fork_and_kill(lambda: len(shards(cache)) >= 3, TESTS / "scripts" / "precompute.py", *arguments)
    kept = 2 * len(shards(cache))
    assert 6 <= kept < 16
    resumed = build(tiny_folder, tmp_path / "out", train_dataset=tiny.dataset(16), reference_cache_dir=str(cache))
    assert sum(computed) == 16 - kept
    fresh = build(tiny_folder, tmp_path / "out", train_dataset=tiny.dataset(16))
    assert_close(statistics(resumed.train_dataset), statistics(fresh.train_dataset))


def test_stopped_by_an_error(tiny_folder, tmp_path, monkeypatch, computed, capsys):
    """An error or Ctrl-C loses nothing that was computed; the next run says with how much it resumes."""
    monkeypatch.setattr(reference_cache, "SHARD_PAIRS", 4)
    counted = Reading.score_reference

    def fails(self, *args):
        if len(computed) == 3:
            raise KeyboardInterrupt
        return counted(self, *args)

    monkeypatch.setattr(Reading, "score_reference", fails)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_folder, tmp_path, precompute_ref_batch_size=2)
    assert len(shards(reference_cache.default_cache_dir())) == 2  # of 4 and of the remaining 2 pairs
    monkeypatch.setattr(Reading, "score_reference", counted)
    computed.clear()
    build(tiny_folder, tmp_path, precompute_ref_batch_size=2, disable_tqdm=False)
    assert computed == [2]
    build(tiny_folder, tmp_path, disable_tqdm=False)
    build(tiny_folder, tmp_path, train_dataset=tiny.dataset(4, seed=5), disable_tqdm=False)
    build(tiny_folder, tmp_path, train_dataset=tiny.dataset(4, seed=6))  # says nothing
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Reference statistics")]
    assert len(lines) == 3
    assert "resuming with 6 of 8 pairs found in" in lines[0] and "computing 2" in lines[0]
    assert "all 8 pairs found in" in lines[1] and "computing 4 pairs, kept in" in lines[2]


def test_two_runs_at_once(tiny_folder, tmp_path, monkeypatch, computed):
    """
    A second run does all of its own while the first is in the middle: both are right, every shard is whole, and from
    then on everyone reads the same numbers.
    """
    monkeypatch.setattr(reference_cache, "SHARD_PAIRS", 2)
    counted, inner = Reading.score_reference, []

    def interleaved(self, *args):
        if len(computed) == 2 and not inner:
            inner.append(None)
            inner[0] = statistics(build(tiny_folder, tmp_path / "b", precompute_ref_batch_size=3).train_dataset)
        return counted(self, *args)

    monkeypatch.setattr(Reading, "score_reference", interleaved)
    outer = statistics(build(tiny_folder, tmp_path / "a", precompute_ref_batch_size=2).train_dataset)
    assert_close(outer, inner[0])
    assert len(shards(reference_cache.default_cache_dir())) > 4
    computed.clear()
    assert (statistics(build(tiny_folder, tmp_path / "c").train_dataset) == outer).all() and computed == []


def truncate(path, other):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path, other):
    """In the middle of the numbers, which no format notices."""
    data = bytearray(path.read_bytes())
    table = pa.ipc.open_file(pa.BufferReader(bytes(data))).read_all()
    place = data.index(table["ref_chosen_logps"].chunks[0].buffers()[1].to_pybytes()[:32])
    data[place + 5] ^= 64
    path.write_bytes(data)


def flip_a_bit_of_a_name(path, other):
    """In the header's copy of the schema, which the format does not read: what it does read is as it was."""
    data = bytearray(path.read_bytes())
    data[data.index(b"ref_chosen_logps")] ^= 1
    path.write_bytes(data)


def of_another_reference(path, other):
    shutil.copy(other, path)


def of_another_program(path, other):
    table = pa.table({"key": pa.array([b"0" * 16], pa.binary(16)), **{column: [0.0] for column in COLUMNS}})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def pickled(path, other):
    path.write_bytes(pickle.dumps(Explosive()))


def empty(path, other):
    path.write_bytes(b"")


class Explosive:
    def __reduce__(self):
        return pytest.fail, ("a cache file was unpickled",)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (truncate, "cannot be read"),
        (flip_a_bit, "checksum"),
        (flip_a_bit_of_a_name, "checksum"),
        (of_another_reference, "another reference"),
        (of_another_program, "not a shard"),
        (pickled, "cannot be read"),
        (empty, "cannot be read"),
    ],
)
def test_bad_files_are_not_believed(damage, reason, tiny_folder, tmp_path, monkeypatch, computed, warnings):
    """A file that is not wholly one of this reference's shards is named in a warning, and its pairs computed anew."""
    monkeypatch.setattr(reference_cache, "SHARD_PAIRS", 4)
    options = dict(precompute_ref_batch_size=4, reference_cache_dir=str(tmp_path / "cache"))
    first = statistics(build(tiny_folder, tmp_path, **options).train_dataset)
    own = shards(tmp_path / "cache")
    build(changed_model(tiny_folder, tmp_path / "model"), tmp_path, reference_cache_dir=str(tmp_path / "others"))
    assert len(own) == 2 and not warnings()
    damage(own[1], shards(tmp_path / "others")[0])
    computed.clear()
    again = statistics(build(tiny_folder, tmp_path, **options).train_dataset)
    assert computed == [4]
    assert (again == first).all() or damage is flip_a_bit  # the same batch once more
    assert_close(again, first)
    (message,) = warnings()
    assert str(own[1]) in message and reason in message and "Delete the file" in message


def test_unwritable_folder(tiny_folder, tmp_path, computed, warnings):
    """A disk that cannot be written to costs a warning and the next run's time, not this run."""
    (tmp_path / "file").write_text("")
    for _ in range(2):
        trainer = build(tiny_folder, tmp_path / "out", reference_cache_dir=str(tmp_path / "file"))
        assert np.isfinite(statistics(trainer.train_dataset)).all()
    assert computed == [4, 4] * 2
    assert len(warnings()) == 2 and all("Give a writable `reference_cache_dir`" in message for message in warnings())


def test_values_that_are_not_finite(tiny_folder, tmp_path):
    """A broken reference is an error that names the rows, and nothing of it is kept."""
    model = harness.load(tiny_folder)
    model.get_input_embeddings().weight.data[tiny.tokenizer()(" script")["input_ids"][0]] = float("nan")
    with pytest.raises(
        FloatingPointError, match="pair.s. of the train dataset are not finite: rows .*reference's weights"
    ):
        build(tiny_folder, tmp_path, ref_model=model)
    cache = reference_cache.default_cache_dir()
    kept = [table for shard in shards(cache) for table in [pa.ipc.open_file(shard).read_all()]]
    assert sum(table.num_rows for table in kept) < 8
    assert all(np.isfinite(table[column].to_numpy()).all() for table in kept for column in COLUMNS)


# ---- Several processes ----------------------------------------------------------------------------------------------


def test_two_processes(tiny_folder, tmp_path, computed):
    """
    Two processes share the work and train as one does; one process afterward finds all that they have computed, and
    trains the same again.
    """
    method = BY_ID["fdpo"]
    options = dict(adam_epsilon=1e-3, evaluate=True, **PRECOMPUTE, reference_cache_dir=str(tmp_path / "cache"))
    two = dict(options, per_device_train_batch_size=2, per_device_eval_batch_size=2)
    fork(*script(method, tiny_folder, tmp_path / "two", **two))
    rows = [pa.ipc.open_file(shard).read_all().num_rows for shard in shards(tmp_path / "cache")]
    assert sorted(rows) == [8, 8, 15, 15]  # 30 pairs and 16, half of them each
    one = harness.trainer(
        method,
        tiny_folder,
        tmp_path / "one",
        train_dataset=tiny.dataset(30),
        eval_dataset=tiny.dataset(16, seed=1),
        **{key: value for key, value in options.items() if key != "evaluate"},
    )
    assert computed == []
    one.train()
    one.evaluate()
    both = json.loads((tmp_path / "two" / "result.json").read_text())
    assert both["processes"] == 2
    ignored = ("train_loss", "num_tokens", "eval_num_tokens")
    harness.assert_same_logs(harness.logs(one), both["logs"], rtol=1e-4, atol=5e-5, ignore=ignored)


def test_nodes_without_a_common_disk(tmp_path, monkeypatch):
    """What either node's disk knows, every process knows; of what both know, the first node's number counts."""
    caches = [reference_cache.ReferenceCache(tmp_path / node, "f") for node in "ab"]
    keys = [bytes([i]) * 16 for i in range(4)]
    caches[0].write(keys[:2], np.array([[1.0], [2.0]]), ["x"])
    caches[1].write(keys[1:3], np.array([[20.0], [30.0]]), ["x"])
    monkeypatch.setattr(reference_cache, "gather_object", lambda here: here + [caches[1].read(keys, ["x"])])
    accelerator = type("Accelerator", (), {"is_local_main_process": True})
    found = reference_cache._read(caches[0], keys, ["x"], accelerator)
    assert found[:3, 0].tolist() == [1.0, 2.0, 30.0] and np.isnan(found[3, 0])


# ---- The trainer ----------------------------------------------------------------------------------------------------


def models() -> set[int]:
    gc.collect()
    return {id(model) for model in gc.get_objects() if type(model) is Qwen2ForCausalLM}


def test_no_reference_is_in_memory(tiny_folder, tmp_path):
    """
    A reference that was given is gone when training starts, from the trainer and from everything it made; a model
    given by name is never loaded twice.
    """
    before = models()
    alive = []
    trainer = build(tiny_folder, tmp_path, ref_model=remembered(nearby(harness.load(tiny_folder)), alive))
    seen = []

    class AtStart(harness.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            seen.append((alive[0](), len(models() - before)))

    trainer.add_callback(AtStart())
    assert trainer.ref_model is None
    trainer.train()
    assert seen == [(None, 1)]
    trainer = build(tiny_folder, tmp_path)
    assert len(models() - before) == 1
    assert "precomputed" in describe_reference(trainer)


def remembered(model, references: list):
    references.append(weakref.ref(model))
    return model


def test_card_of_a_freed_reference(tiny_folder, tmp_path):
    reference = harness.load(tiny_folder)
    reference.config._name_or_path = "someone/reference"
    trainer = build(tiny_folder, tmp_path, ref_model=reference)
    assert describe_reference(trainer) == "`someone/reference`, frozen, log-probabilities precomputed"


def test_datasets_given_later(tiny_folder, tmp_path, computed):
    """
    Under PEFT the reference stays, so `evaluate` and `predict` take any dataset, also dictionaries; they are computed
    once. Without, what the cache holds is served and the rest refused: the policy is not its reference anymore.
    """
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    trainer = build(tiny_folder, tmp_path, peft_config=lora, max_steps=2, learning_rate=1e-2)
    trainer.train()
    computed.clear()
    first = trainer.evaluate({"a": tiny.dataset(4, seed=1), "b": tiny.dataset(6, seed=2)})
    assert sum(computed) == 10 and {"eval_a_loss", "eval_b_loss"} <= set(first)
    assert trainer.predict(tiny.dataset(4, seed=1)).metrics["test_loss"] == pytest.approx(
        first["eval_a_loss"], rel=1e-6
    )
    assert sum(computed) == 10
    plain = make(Reading, tiny_folder, tmp_path, peft_config=lora, max_steps=2, learning_rate=1e-2)
    plain.train()
    assert plain.evaluate(tiny.dataset(4, seed=1))["eval_loss"] == pytest.approx(first["eval_a_loss"], rel=1e-4)

    for ref_model, when in (
        (None, "after training has started"),
        (harness.load(tiny_folder), "once the trainer is built"),
    ):
        trainer = build(tiny_folder, tmp_path, ref_model=ref_model, max_steps=1)
        if ref_model is None:
            trainer.train()
        assert trainer.evaluate(tiny.dataset(4, seed=1))["eval_loss"] > 0
        for call in (trainer.evaluate, trainer.predict):
            mixed = tiny.Dataset.from_list(list(tiny.dataset(4, seed=1)) + list(tiny.dataset(3, seed=9)))
            with pytest.raises(
                ValueError, match=f"cannot be computed {when}.*and 3 of its pairs are not in the cache"
            ):
                call(mixed)


def test_streaming_is_refused(tiny_folder, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(tiny.rows(8)))
    with pytest.raises(ValueError, match="not supported with a streaming dataset, as the train dataset is.*map-style"):
        build(tiny_folder, tmp_path, train_dataset=stream)


def test_progress(tiny_folder, tmp_path, monkeypatch):
    """A bar over all pairs that begins with those found; none with `disable_tqdm`."""
    bars = []

    class Bar(reference_cache.tqdm):
        def __init__(self, *args, **kwargs):
            self.steps = []
            bars.append((kwargs, self.steps))
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n=1):
            self.steps.append(n)

    monkeypatch.setattr(reference_cache, "tqdm", Bar)
    build(tiny_folder, tmp_path, disable_tqdm=False)
    build(tiny_folder, tmp_path, train_dataset=tiny.dataset(14), disable_tqdm=False)
    build(tiny_folder, tmp_path, train_dataset=tiny.dataset(16), disable_tqdm=True)
    (first, steps), (second, more), (quiet, _) = bars
    assert (first["total"], first["initial"], sum(steps)) == (8, 0, 8)
    assert (second["total"], second["initial"], sum(more)) == (14, 8, 6)
    assert "disable" not in first and quiet["disable"]
    assert first["desc"] == "Reference of the train dataset"
