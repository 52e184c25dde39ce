"""The model card tells the truth about what was trained, and is never written with holes in it."""

import json
import re
from dataclasses import dataclass, field
from html import unescape

import datasets
import pytest
import tiny
import torch
import transformers
import trl
import yaml
from hub_stub import front_matter_errors
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig

import trl_ext
from trl_ext import SimPERConfig, SimPERTrainer
from trl_ext.preference import PairLoss, PreferenceConfig, PreferenceTrainer
from trl_ext.training.card_facts import BaseModel, TrainingData, is_hub_id
from trl_ext.training.model_card import NOTICE, is_generated


LORA = dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def make_trainer(folder, model=None, trainer_class=SimPERTrainer, train_dataset=None, peft_config=None, **options):
    defaults = dict(
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        seed=7,
    )
    return trainer_class(
        tiny.model() if model is None else model,
        args=trainer_class.config_class(str(folder), **defaults | options),
        train_dataset=tiny.dataset(10) if train_dataset is None else train_dataset,
        eval_dataset=tiny.dataset(6, seed=1),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def read_card(folder) -> ModelCard:
    """Reads the card and checks what holds for every one of them."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "None" not in text
    assert "{{" not in re.sub(r"```bibtex.*?```", "", text, flags=re.DOTALL)
    assert "[More Information Needed]" not in text
    assert not re.search(r"^#+ [^\n]*\n+(#+ |\Z)", re.sub(r"^# .*$", "", text, flags=re.M), flags=re.M), (
        "empty section"
    )
    assert "\n\n\n" not in text
    assert front_matter_errors(text) == []
    return ModelCard.load(folder / "README.md")


def table(card: ModelCard) -> dict[str, list[str]]:
    """Rows of all tables of the card, by their first cell."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in card.text.splitlines() if line[:1] == "|"
    ]
    return {row[0].strip("`"): row[1:] for row in rows}


def run_quick_start(card: ModelCard, capsys) -> str:
    code = re.search(r"```python\n(.*?)```", card.text, flags=re.DOTALL).group(1)
    exec(compile(code.replace("max_new_tokens=128", "max_new_tokens=3"), "quick start", "exec"), {})
    return capsys.readouterr().out


# ---- Whole cards ---------------------------------------------------------------------------------------------------


def test_full_fine_tuning_of_a_local_model(tmp_path, capsys):
    folder, base = tmp_path / "tiny-SimPER", tiny.save(tmp_path / "base")
    trainer = make_trainer(folder, model=base, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    trainer.train()
    trainer.save_model()
    card = read_card(folder)

    assert card.data.to_dict() == {
        "library_name": "transformers",
        "model_name": "tiny-SimPER",
        "pipeline_tag": "text-generation",
        "tags": ["generated_from_trainer", "trl", "trl-ext", "simper"],
    }
    assert f"A fine-tuned version of the local model `{base}`" in card.text
    assert "a dataset built in memory (10 pairs)" in card.text
    assert "https://huggingface.co/papers/2502.00883" in card.text
    assert "- **Adaptation:** full fine-tuning\n" in card.text
    for version in (f"trl_ext: {trl_ext.__version__}", f"trl: {trl.__version__}", f"torch: {torch.__version__}"):
        assert f"- {version}\n" in card.text
    assert f"- transformers: {transformers.__version__}\n" in card.text
    assert "@inproceedings{xiao2025simper" in card.text
    assert "{{TRL: Transformers Reinforcement Learning}}" in card.text

    rows = table(card)
    assert "beta" not in rows, "SimPER has none"
    assert rows["reference"] == ["not used"]
    assert rows["learning rate"] == ["0.002"]
    assert rows["learning rate schedule"] == ["linear"]
    assert rows["steps"] == ["4"]
    assert rows["pairs per step"] == ["4 (2 per device x 2 accumulated x 1 process)"]
    assert rows["maximum length"] == ["1024 tokens (`keep_start`)"]
    assert rows["precision"] == ["trained weights in float32, no autocast"]
    assert rows["seed"] == ["7"]
    assert rows["trained parameters"] == [f"{sum(p.numel() for p in trainer.model.parameters()):,}"]

    # An epoch of 10 pairs is three steps, of 4, 4 and 2; the fourth is the first of the second epoch.
    assert "- Pairs seen: 14 in 4 steps\n" in card.text
    assert f"- Tokens seen: {trainer._progress.num_tokens:,}, without padding\n" in card.text
    assert rows["Metric"] == ["Training, step 4", "Evaluation, step 0", "Evaluation, step 4"]
    history = trainer.state.log_history
    train_log = [log for log in history if "loss" in log][-1]
    eval_logs = [log for log in history if "eval_loss" in log]
    for name in ("loss", "rewards/accuracies", "rewards/margins", "ranking_accuracy/policy"):
        values = [train_log[name], eval_logs[0][f"eval_{name}"], eval_logs[-1][f"eval_{name}"]]
        assert rows[name] == [f"{value:.4g}" for value in values]
    assert not {"grad_norm", "epoch", "runtime", "num_tokens", "logps/chosen"} & set(rows)

    assert run_quick_start(card, capsys)


def test_lora_checkpoint_has_our_card(tmp_path, capsys):
    base = tiny.save(tmp_path / "base")
    trainer = make_trainer(
        tmp_path / "out", model=base, peft_config=LoraConfig(**LORA), save_strategy="steps", save_steps=2
    )
    trainer.train()
    card = read_card(tmp_path / "out" / "checkpoint-2")
    assert card.data.library_name == "peft"
    assert card.data.model_name == "out"
    assert "lora" in card.data.tags
    assert "LoRA (rank 4, alpha 16, dropout 0, target modules `q_proj, v_proj`)" in card.text
    assert "This is a checkpoint, saved at step 2 of 4 (epoch 0.8)." in card.text
    assert f'"{(tmp_path / "out" / "checkpoint-2").as_posix()}"' in card.text
    # In each of two layers: 4 x (32 + 32) for q_proj, 4 x (32 + 16) for v_proj.
    assert table(card)["trained parameters"][0].startswith("896 of ")
    assert "- peft: " in card.text
    run_quick_start(card, capsys)
    assert "This is a checkpoint" not in read_card(tmp_path / "out" / "checkpoint-4").text


def test_before_training_and_details_given_once(tmp_path):
    trainer = make_trainer(tmp_path / "out")
    trainer.create_model_card()
    card = read_card(tmp_path / "out")
    assert "A fine-tuned version of a `Qwen2ForCausalLM` built in memory, to be trained on" in card.text
    assert "It has not been trained yet" in card.text
    assert "## Results" not in card.text

    trainer.create_model_card(model_name="Fine name", dataset_name="org/pairs", tags="mine")
    for _ in range(2):  # the second card was told nothing
        card = read_card(tmp_path / "out")
        assert card.data.model_name == "Fine name"
        assert card.data.datasets == ["org/pairs"]
        assert card.data.tags[-1] == "mine"
        assert "[org/pairs](https://huggingface.co/datasets/org/pairs)" in card.text
        trainer.create_model_card()


def test_best_checkpoint_is_named(tmp_path):
    trainer = make_trainer(
        tmp_path / "out",
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # a perverse wish, so that the best is not the last
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 4
    trainer.save_model()
    card = read_card(tmp_path / "out")
    assert f"The weights are those at step {best}, the best by evaluation (`eval_loss` " in card.text
    assert table(card)["Metric"][-1] == f"Evaluation, step {best}"
    assert table(card)["loss"][-1] == f"{trainer.state.best_metric:.4g}"


def test_qlora(tmp_path):
    pytest.importorskip("bitsandbytes")
    base = tiny.save(tmp_path / "base", hidden_size=64)
    trainer = SimPERTrainer(
        base,
        args=SimPERConfig(str(tmp_path / "out"), bf16=False, use_cpu=True, report_to="none"),
        train_dataset=tiny.dataset(4),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        peft_config=LoraConfig(**LORA),
    )
    trainer.create_model_card()
    card = read_card(tmp_path / "out")
    assert "- **Adaptation:** QLoRA (rank 4" in card.text
    assert "in training:** 4-bit NF4, computing in bfloat16\n" in card.text
    assert "- bitsandbytes: " in card.text


def test_peft_model_built_in_memory(tmp_path):
    trainer = make_trainer(tmp_path / "out", model=get_peft_model(tiny.model(), LoraConfig(**LORA)))
    trainer.create_model_card()
    card = read_card(tmp_path / "out")
    assert "A LoRA adapter for a `Qwen2ForCausalLM` built in memory" in card.text
    assert isinstance(trainer.model, PeftModel)
    assert "PeftModel.from_pretrained(base_model, " in card.text, "no base that AutoPeftModel could load"


@dataclass
class HingeConfig(PreferenceConfig):
    margin: float = field(default=1.5, metadata={"help": "Margin."})
    scale: float | None = field(default=None, metadata={"help": "Scale; from the data by default."})
    offset: float | None = field(default=None, metadata={"help": "Offset."})
    service_api_key: str = field(default="do-not-tell", metadata={"help": "A secret."})


class HingeTrainer(PreferenceTrainer):
    config_class = HingeConfig
    _name = "Hinge | preference"

    def pair_loss(self, chosen, rejected):
        margin = chosen.logratios - rejected.logratios
        return PairLoss(torch.relu(1 - margin), chosen.logratios, rejected.logratios)

    def resolved_hyperparameters(self):
        return {"scale": 0.25}


def test_method_of_a_user_without_a_paper(tmp_path):
    base = tiny.save(tmp_path / "base")
    trainer = make_trainer(tmp_path / "out", model=base, trainer_class=HingeTrainer, beta=0.3)
    trainer.create_model_card()
    card = read_card(tmp_path / "out")
    rows = table(card)
    assert list(rows)[2:5] == ["beta", "margin", "scale"], "the method's own come first"
    assert (rows["beta"], rows["margin"], rows["scale"]) == (["`0.3`"], ["`1.5`"], ["`0.25`"])
    assert "offset" not in rows, "nothing is known of it"
    assert "do-not-tell" not in card.text
    assert rows["reference"] == [f"`{base}`, frozen"]
    assert "papers/" not in card.text
    assert "Trained with `HingeTrainer`" in card.text


def test_options_given_as_objects_are_not_told_from_the_arguments(tmp_path):
    trainer = make_trainer(tmp_path / "out")
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.125)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = SimPERTrainer(
        trainer.model,
        args=trainer.args,
        train_dataset=tiny.dataset(4),
        processing_class=tiny.tokenizer(),
        optimizers=(optimizer, scheduler),
    )
    trainer.create_model_card()
    rows = table(read_card(tmp_path / "out"))
    assert rows["learning rate"] == ["0.125"]
    assert rows["optimizer"] == ["SGD, given by the user"]
    assert rows["learning rate schedule"] == ["ConstantLR, given by the user"]
    assert "warmup" not in rows


def test_secrets_stay_out(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "s3cr3t-value")
    trainer = make_trainer(tmp_path / "out", hub_token="hf_secretvalue")
    trainer.create_model_card()
    text = read_card(tmp_path / "out").content
    assert "hf_secretvalue" not in text
    assert "s3cr3t-value" not in text


# ---- A card that is there already ----------------------------------------------------------------------------------


OWN_CARD = "---\nlicense: mit\n---\n\n# Ours\n\nWritten by hand, and meant to stay.\n"


def test_a_card_written_by_hand_stays(tmp_path, caplog):
    """Neither a save nor a card asked for replaces it, and the warning, which comes once a file, says what to do."""
    trainer = make_trainer(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(OWN_CARD)
    for _ in range(2):
        trainer.save_model()
        trainer.create_model_card(dataset_name="org/pairs")
    assert readme.read_text() == OWN_CARD
    warnings = [record.message for record in caplog.records if "is not a generated model card" in record.message]
    assert len(warnings) == 1 and f"`{readme}`" in warnings[0] and "`create_model_card`" in warnings[0]

    readme.rename(tmp_path / "NOTES.md")
    trainer.save_model()
    assert read_card(tmp_path).data.datasets == ["org/pairs"], "what was said meanwhile was not lost"


def test_a_card_written_by_hand_stays_beside_an_adapter(tmp_path):
    """PEFT adds its metadata and its version; the text is still the user's."""
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(**LORA))
    (tmp_path / "README.md").write_text(OWN_CARD)
    for _ in range(2):
        trainer.save_model()
        card = (tmp_path / "README.md").read_text()
        assert "license: mit\n" in card and "library_name: peft\n" in card
        assert "\n---\n\n# Ours\n\nWritten by hand, and meant to stay.\n" in card and NOTICE not in card


def test_our_card_is_replaced_until_its_notice_is_removed(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(**LORA))
    trainer.save_model()
    readme = tmp_path / "README.md"
    first = readme.read_text()
    assert first.count(NOTICE) == 1
    readme.write_text(first.replace("## Training procedure", "## Changed"))
    trainer.save_model()
    assert "## Changed" not in readme.read_text()
    assert make_trainer(tmp_path).create_model_card() is None and "LoRA" not in readme.read_text(), "a later run's"
    mine = readme.read_text().replace(NOTICE, "").replace("## Training procedure", "## Changed")
    readme.write_text(mine)
    trainer.create_model_card()
    assert readme.read_text() == mine


def test_cards_that_others_generated_are_replaced(tmp_path):
    """PEFT's empty template, also of a quantized base, and the cards of TRL, Transformers and Diffusers."""
    readme = tmp_path / "README.md"
    model = get_peft_model(tiny.model(), LoraConfig(**LORA))
    model.save_pretrained(tmp_path)
    assert "# Model Card for Model ID" in readme.read_text()
    assert is_generated(readme)
    template = readme.read_text()
    quantization = (
        "## Training procedure\n\nThe following `bitsandbytes` quantization config was used during training:"
    )
    readme.write_text(template + f"{quantization}\n- load_in_4bit: True\n- llm_int8_skip_modules: None\n")
    assert is_generated(readme)
    for filled_in in (
        template.replace("- **Developed by:** [More Information Needed]", "- **Developed by:** Us"),
        template.replace("# Model Card for Model ID", "# A model"),
        template + "\nA sentence of ours.\n",
    ):
        assert filled_in != template
        readme.write_text(filled_in)
        assert not is_generated(readme)

    readme.unlink()
    arguments = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    common = dict(args=arguments, train_dataset=tiny.dataset(4), processing_class=tiny.tokenizer())
    trl.DPOTrainer(tiny.save(tmp_path / "base"), **common).create_model_card()
    assert is_generated(readme)

    readme.unlink()
    plain = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    transformers.Trainer(tiny.model(), plain, train_dataset=tiny.dataset(4)).create_model_card()
    assert is_generated(readme)
    readme.write_text(
        "<!-- This model card has been generated automatically according to the information the training script had "
        "access to. -->"
    )
    assert is_generated(readme), "as Diffusers' begins"


@pytest.mark.parametrize("content, generated", [(b" \n", True), (b"# Mine", False), (b"\xff\xfe", False)])
def test_files_that_are_no_cards(tmp_path, content, generated):
    (tmp_path / "README.md").write_bytes(content)
    assert is_generated(tmp_path / "README.md") == generated


@pytest.mark.parametrize("kind", ["a folder in its place", "facts that cannot be told"])
def test_a_card_that_cannot_be_written_costs_no_weights(kind, tmp_path, monkeypatch, caplog):
    """The run goes on and its checkpoints are whole; a push by hand fails, as an older card may name local folders."""
    out = tmp_path / "out"
    trainer = make_trainer(out, save_strategy="steps", save_steps=2)
    if kind == "a folder in its place":
        (out / "README.md").mkdir(parents=True)
    else:
        monkeypatch.setattr(trainer, "card_facts", lambda: 1 / 0)
    trainer.train()
    trainer.save_model()
    assert trainer.state.global_step == 4 and "was not written" in caplog.text
    assert trainer.last_whole_checkpoint() == str(out / "checkpoint-4")
    assert (out / "model.safetensors").exists()
    trainer._is_pushed = True
    with pytest.raises((OSError, ZeroDivisionError)):
        trainer.write_model_card(out)


# ---- The base model ------------------------------------------------------------------------------------------------


def test_base_on_the_hub(tmp_path):
    model = tiny.model()
    model.config._name_or_path = "org/tiny-base"
    trainer = make_trainer(tmp_path / "out", model=model)
    trainer.create_model_card()
    card = read_card(tmp_path / "out")
    assert card.data.base_model == "org/tiny-base"
    assert "[org/tiny-base](https://huggingface.co/org/tiny-base)" in card.text


def base_of(folder) -> BaseModel:
    return BaseModel.of(str(folder), "Qwen2ForCausalLM")


def write_readme(folder, **metadata):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n\n# Card\n")
    return folder


def test_local_base_names_its_nearest_ancestor_on_the_hub(tmp_path):
    older = write_readme(tmp_path / "older", base_model="org/ancestor", license="mit")
    newer = write_readme(tmp_path / "newer", base_model=str(older))
    assert base_of(older).hub_ids == ["org/ancestor"]
    assert base_of(newer).hub_ids == ["org/ancestor"]
    assert base_of(newer).license == {"license": "mit"}
    assert base_of(newer).text == (
        f"`{newer}`, a local model derived from [org/ancestor](https://huggingface.co/org/ancestor)"
    )


@pytest.mark.parametrize(
    "readme",
    [
        "",
        "# No front matter\n",
        "---\nbase_model: [\n---\n",
        "---\n- a list\n---\n",
        "---\nbase_model: /gone/x\n---\n",
    ],
)
def test_local_base_whose_card_tells_nothing(tmp_path, readme):
    (tmp_path / "README.md").write_text(readme)
    base = base_of(tmp_path)
    assert base.hub_ids == []
    assert base.license == {}
    assert base.text == f"the local model `{tmp_path}`"


def test_cards_that_name_each_other_end(tmp_path):
    write_readme(tmp_path / "a", base_model=str(tmp_path / "b"))
    write_readme(tmp_path / "b", base_model=str(tmp_path / "a"))
    assert base_of(tmp_path / "a").hub_ids == []


def test_what_can_be_an_id_on_the_hub(tmp_path):
    assert is_hub_id("org/name")
    assert is_hub_id("gpt2")
    for name in ("", str(tmp_path), "/gone/model", "./model", "~/model", "a/b/c", "my data"):
        assert not is_hub_id(name), name


# ---- The data ------------------------------------------------------------------------------------------------------


def test_data_files(tmp_path):
    folder = tmp_path / "my_pairs"
    folder.mkdir()
    path = tiny.write_jsonl(folder / "train.jsonl", count=5)
    from_file = datasets.load_dataset("json", data_files=str(path), split="train")
    assert TrainingData.of(from_file).text == "JSON files (5 pairs, split `train`)"
    from_folder = datasets.load_dataset(str(folder), split="train")
    assert TrainingData.of(from_folder.map(lambda row: row)).text == "`my_pairs` (JSON files) (5 pairs, split `train`)"
    from_file.save_to_disk(tmp_path / "saved")
    saved = datasets.load_from_disk(tmp_path / "saved")
    assert TrainingData.of(saved).text == "JSON files (5 pairs, split `train`)", "saving records nothing"
    streamed = datasets.load_dataset(str(folder), split="train", streaming=True)
    assert TrainingData.of(streamed).rows is None
    assert TrainingData.of(streamed).text == "`my_pairs` (JSON files) (split `train`)"
    mixed = datasets.concatenate_datasets([from_file, tiny.dataset(3)])
    assert TrainingData.of(mixed).text == "a dataset combined from several sources (8 pairs)"


def test_data_named_by_the_user(tmp_path):
    pairs = tiny.dataset(3)
    assert TrainingData.of(pairs, "org/pairs").hub_ids == ["org/pairs"]
    assert TrainingData.of(pairs, str(tmp_path)).text == f"`{tmp_path}` (3 pairs)"
    assert TrainingData.of(pairs, "my own pairs").text == "`my own pairs` (3 pairs)"
    assert TrainingData.of(pairs, "json").text == "a dataset built in memory (3 pairs)", "a format is not a dataset"


def test_several_data_named_by_the_user(tmp_path):
    """TRL takes a list of names, and so does the card: those on the Hub into the metadata, and all into the text."""
    pairs = tiny.dataset(3)
    data = TrainingData.of(pairs, ["org/a", "my own pairs", "org/b", "json", "org/a"])
    assert data.hub_ids == ["org/a", "org/b"]
    assert data.text == (
        "[org/a](https://huggingface.co/datasets/org/a) and [org/b](https://huggingface.co/datasets/org/b) and "
        "`my own pairs` and JSON files (3 pairs)"
    )
    for nothing in ([], ["json"], [""]):
        assert TrainingData.of(pairs, nothing).text == "a dataset built in memory (3 pairs)"

    trainer = make_trainer(tmp_path)
    trainer.create_model_card(dataset_name=["org/a", "org/b"])
    trainer.save_model()
    assert read_card(tmp_path).data.datasets == ["org/a", "org/b"]


def test_data_reaches_the_card_through_preparation(tmp_path):
    path = tiny.write_jsonl(tmp_path / "pairs.jsonl", count=6)
    data = datasets.load_dataset("json", data_files=str(path), split="train")
    trainer = make_trainer(tmp_path / "out", train_dataset=data)
    trainer.create_model_card()
    assert "- **Training data:** JSON files (6 pairs, split `train`)\n" in read_card(tmp_path / "out").text
    assert json.loads(path.read_text().splitlines()[0])["prompt"] not in read_card(tmp_path / "out").text


def test_names_bring_no_html_and_no_front_matter(tmp_path):
    """
    What a model or dataset is called stays text on one line; the card's metadata have no key that it did not write.
    """
    trainer = make_trainer(tmp_path)
    trainer.create_model_card(
        model_name="<script>alert(1)</script>\n---\nlicense: mit\n---", dataset_name="<img src=x>\n# Heading"
    )
    text = (tmp_path / "README.md").read_text()
    body = text.split("\n---\n", 1)[1]
    assert "<script" not in body and "<img" not in body and "\n# Heading" not in body
    assert "license" not in ModelCard(text).data.to_dict()


@pytest.mark.parametrize("name", ["5e-7", "1E6", ".5e3", "0o17", "null", "yes", "2024-01-01", "0x1F", "1_000", "~"])
def test_names_that_look_like_something_else(name, tmp_path):
    """In the metadata a name is text, for parsers of YAML 1.1 and 1.2, in which `5e-7` is a number."""
    trainer = make_trainer(tmp_path / name)
    trainer.create_model_card(tags=[name])
    text = (tmp_path / name / "README.md").read_text()
    metadata = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert metadata["model_name"] == name and name in metadata["tags"]
    assert text.count(f"'{name}'\n") == 2


def test_details_that_read_well(tmp_path):
    """
    One step of warmup is a step, paths of modules are told by their ends, and an own method is of its package.
    """

    class OwnTrainer(SimPERTrainer):
        pass

    paths = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
    options = dict(warmup_steps=1, lr_scheduler_type="linear")
    trainer = make_trainer(
        tmp_path, trainer_class=OwnTrainer, peft_config=LoraConfig(r=4, target_modules=paths), **options
    )
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "1 step |" in text and "1 steps" not in text
    assert "q_proj, v_proj (4 modules)" in text and paths[0] not in text
    assert "`OwnTrainer` of `test_model_card`, a trainer built on trl_ext, an extension of [TRL]" in text


HOSTILE = "a|b`c` </td><script>alert(1)</script> [x](http://evil) \\| *b* \u2028\n---\nlicense: mit\n# Heading\x00 \ud800: {y: &z !!python/x"
HOSTILE += " _c_ __d__ ~~e~~ $f$ https://evil www.evil.com me@evil.com &lt;i&gt; x_y"


@dataclass
class HostileConfig(SimPERConfig):
    column: str = field(default="", metadata={"help": "Name of a column."})


class HostileTrainer(SimPERTrainer):
    config_class = HostileConfig
    _name = HOSTILE
    _paper = {"id": "2502.00883", "title": HOSTILE, "citation": "@misc{x}"}


def tables(html: str) -> list[list[list[str]]]:
    """Texts of the cells of every table, row by row."""
    rows = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL)
        for row in re.findall(r"<tr>.*?</tr>", html, flags=re.DOTALL)
    ]
    return [[unescape(re.sub(r"<[^>]+>", "", cell)) for cell in row] for row in rows]


def test_hostile_names_stay_text(tmp_path):
    """
    Names of models, data, columns, evaluation sets, tags and methods: as rendered they are text in one place, and the
    metadata are those that the card wrote.
    """
    base = write_readme(tmp_path / "base | `x` <b>", base_model=HOSTILE, license="other", license_name=HOSTILE)
    tiny.save(base)
    trainer = HostileTrainer(
        str(base),
        args=HostileConfig(
            str(tmp_path / "out"),
            column=HOSTILE,
            max_steps=1,
            per_device_train_batch_size=2,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=tiny.dataset(4),
        eval_dataset={HOSTILE: tiny.dataset(2)},
    )
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card(model_name=HOSTILE, dataset_name=[HOSTILE, "org/pairs"], tags=HOSTILE)
    text = read_card(tmp_path / "out").content
    metadata = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert set(metadata) == {
        "datasets",
        "library_name",
        "license",
        "license_name",
        "model_name",
        "pipeline_tag",
        "tags",
    }
    assert metadata["license"] == "other" and metadata["datasets"] == ["org/pairs"]
    shown = " ".join(HOSTILE.replace("\u2028", " ").replace("\x00", " ").replace("\ud800", " ").split())
    assert metadata["model_name"] == shown and shown in metadata["tags"]

    html = MarkdownIt("commonmark").enable("table").render(text.split("\n---\n", 1)[1].replace(NOTICE, ""))
    assert "<script" not in html and 'evil"' not in html and html.count("<h1>") == 1
    assert not re.search(r"http://evil|https://evil|www\.evil|@evil", text.split("\n---\n", 1)[1]), "links of GitHub"
    rows = {row[0]: row[1:] for row in tables(html)}
    assert rows["column"] == [shown]
    assert rows["Metric"][-1] == f"Evaluation on {shown}, step 1"
    assert {len(row) for row in rows.values()} == {1, len(rows["Metric"])}
    text_shown = unescape(re.sub(r"<[^>]+>", "", html))
    for place in (
        f"{shown}\n\n",
        f"with {shown}.",
        f"from {shown}\n",
        f"license: the base model's, {shown}",
        f"Training data: org/pairs and {shown} (",
    ):
        assert place.lower() in text_shown.lower(), place


# ---- What is pushed ------------------------------------------------------------------------------------------------


def test_adapter_of_a_local_base_is_not_pushed(tmp_path):
    """Refused before the model is loaded, or at the push; the base's id on the Hub is what makes it useful."""
    base = write_readme(tmp_path / "base", base_model="org/tiny-base", license="mit")
    with pytest.raises(
        ValueError, match=rf"`push_to_hub=True`.*{re.escape(repr(str(base)))}.*`hub_base_model_id`.*'org/tiny-base'"
    ):
        make_trainer(tmp_path / "out", model=str(base), peft_config=LoraConfig(**LORA), push_to_hub=True)
    tiny.save(base)
    trainer = make_trainer(tmp_path / "out", model=str(base), peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match=r"`push_to_hub\(\)`.*`hub_base_model_id`"):
        trainer.push_to_hub()
    with pytest.raises(ValueError, match=rf"`hub_base_model_id='{base}'` .*path on this machine"):
        make_trainer(tmp_path / "out", hub_base_model_id=str(base))


@pytest.mark.parametrize("is_given_later", [False, True])
def test_the_base_s_id_takes_the_place_of_its_path(tmp_path, monkeypatch, is_given_later):
    """Card, `adapter_config.json` and what PEFT writes into somebody's own card name the base on the Hub."""
    monkeypatch.setattr(
        transformers.Trainer, "init_hf_repo", lambda self, token=None: setattr(self, "hub_model_id", "me/out")
    )
    monkeypatch.setattr(
        transformers.Trainer,
        "push_to_hub",
        lambda self, dataset_name=None, **kwargs: self.create_model_card(dataset_name=dataset_name),
    )
    base = tiny.save(write_readme(tmp_path / "base", license="mit"))
    trainer = make_trainer(
        tmp_path / "out",
        model=base,
        trainer_class=HingeTrainer,
        peft_config=LoraConfig(**LORA),
        hub_base_model_id="org/same",
        push_to_hub=not is_given_later,
    )
    trainer.save_model()
    trainer.push_to_hub(dataset_name=str(tmp_path / "data" / "pairs.jsonl"))
    card = read_card(tmp_path / "out")
    assert card.data.base_model == "org/same" and card.data.license == "mit"
    assert "`pairs.jsonl` (10 pairs)" in card.text
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/same"
    (tmp_path / "out" / "README.md").write_text(OWN_CARD)
    trainer.save_model()
    assert "base_model: org/same" in (tmp_path / "out" / "README.md").read_text()
    trainer.write_model_card(tmp_path / "out" / "checkpoint-2")
    for path in (tmp_path / "out").rglob("*.*"):
        assert path.suffix == ".bin" or not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), path


def test_a_whole_model_is_pushed_without_the_path_of_its_base(tmp_path, monkeypatch):
    monkeypatch.setattr(
        transformers.Trainer, "init_hf_repo", lambda self, token=None: setattr(self, "hub_model_id", "me/out")
    )
    base = tiny.save(tmp_path / "base")
    trainer = make_trainer(
        tmp_path / "out", model=base, trainer_class=HingeTrainer, push_to_hub=True, hub_model_id="me/out"
    )
    trainer.create_model_card()
    card = read_card(tmp_path / "out")
    assert "A fine-tuned version of the local model `base`" in card.text and str(tmp_path) not in card.text
    assert table(card)["reference"] == ["`base`, frozen"]
    assert 'model="me/out"' in card.text
