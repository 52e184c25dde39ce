"""What reaches the Hub. The pushes share one process of their own, since the endpoint is read at import."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import yaml
from hub_stub import HubStub
from transformers import AutoModelForSequenceClassification

from trl_ext import SimPERConfig


sys.path.insert(0, str(Path(__file__).resolve().parent / "diffusion"))

import tiny_pipelines  # noqa: E402


TOKEN = "hf_dummyTokenThatMustNotLeak"

SCRIPT = textwrap.dedent(
    """
    import sys
    import diffusion_harness
    import tiny
    import tiny_pipelines
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl_ext import D2POConfig, D2POTrainer, SimPERConfig, SimPERTrainer

    base, folder_of_rewards, folder_of_images = sys.argv[1], sys.argv[3], sys.argv[4]

    def push(folder, lora, model=base, **options):
        args = SimPERConfig(
            folder, max_steps=2, per_device_train_batch_size=2, bf16=False, use_cpu=True, report_to="none",
            disable_tqdm=True, **{"save_strategy": "no"} | options,
        )
        trainer = SimPERTrainer(
            model, args=args, train_dataset=tiny.dataset(8, conversational=True),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if lora else None,
        )
        trainer.train()
        trainer.push_to_hub(dataset_name="tester/pairs")

    push("full", lora=False)
    push("lora", lora=True, hub_private_repo=True, hub_base_model_id="org/tiny-base")
    push(
        "output", lora=True, push_to_hub=True, hub_strategy="every_save", hub_always_push=True, save_strategy="steps",
        save_steps=1, hub_model_id="org/named", hub_token=sys.argv[2],
        hub_base_model_id="org/tiny-base",
    )
    for name, model in (("local-base", base), ("in-memory", tiny.model())):
        try:
            push(name, lora=True, model=model)
        except ValueError as error:
            print("REFUSED", error)
    push("in-memory-named", lora=True, model=tiny.model(), hub_base_model_id="org/tiny-base")

    classifier = AutoModelForSequenceClassification.from_pretrained(folder_of_rewards, num_labels=1)
    args = D2POConfig(
        "d2po", max_steps=1, per_device_train_batch_size=2, bf16=False, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", hub_base_model_id="org/tiny-base", window_size=2, labels_per_window=1,
        max_completion_length=4,
    )
    trainer = D2POTrainer(
        base, args=args, train_dataset=tiny.dataset(8).select_columns(["prompt"]),
        gold_labeller=lambda prompts, completions: [float(len(c)) for c in completions],
        discriminator=get_peft_model(classifier, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")),
        discriminator_processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    trainer.train()
    trainer.save_model()
    trainer.push_to_hub()

    for name, peft_config in (("images", None), ("images-lora", "lora")):
        trainer = diffusion_harness.trainer(
            folder_of_images, name, peft_config=peft_config, max_steps=1, hub_base_model_id="org/tiny-pipeline"
        )
        trainer.train()
        trainer.save_model()
        trainer.push_to_hub()
    push("refused", lora=True, hub_model_id="closed/refused", hub_base_model_id="org/tiny-base")
    """
)

TOKENIZER_FILES = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
ALWAYS = TOKENIZER_FILES | {"README.md", "training_args.bin"}
FULL = ALWAYS | {"config.json", "generation_config.json", "model.safetensors"}
LORA = ALWAYS | {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The Hub after all the pushes, the finished process, and the base's folder."""
    tmp_path = tmp_path_factory.mktemp("push")
    base = tmp_path / "base"
    tiny.save(base)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    classifier.config.pad_token_id = 0
    classifier.save_pretrained(tmp_path / "rewards")
    tiny_pipelines.pipeline("sd").save_pretrained(tmp_path / "pipeline")
    (base / "README.md").write_text("---\nlicense: mit\nbase_model: org/tiny-base\n---\n# A copy\n")

    root = Path(__file__).parents[1]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    with HubStub() as hub:
        env.update(
            HF_ENDPOINT=hub.url,
            HF_TOKEN=TOKEN,
            HF_HOME=str(tmp_path / "home"),
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_XET="1",
            PYTHONPATH=os.pathsep.join(map(str, (root, root / "tests", root / "tests" / "diffusion"))),
            OMP_NUM_THREADS="1",
            NO_PROXY="127.0.0.1",
            no_proxy="127.0.0.1",
        )
        command = [
            sys.executable,
            "-c",
            SCRIPT,
            str(base),
            TOKEN,
            str(tmp_path / "rewards"),
            str(tmp_path / "pipeline"),
        ]
        run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    return hub, run, base


@pytest.mark.parametrize(("repo", "files"), [("tester/full", FULL), ("tester/lora", LORA), ("org/named", LORA)])
def test_files_on_the_hub(pushed, repo, files):
    hub, run, _ = pushed
    assert repo in hub.files, run.stderr
    assert set(hub.files[repo]) == files


@pytest.mark.parametrize("repo", ["tester/full", "tester/lora", "org/named"])
def test_card_on_the_hub(pushed, repo):
    hub, _, base = pushed
    card = hub.files[repo]["README.md"].decode()
    assert "None" not in card
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["base_model"] == "org/tiny-base"
    assert metadata["datasets"] == ["tester/pairs"]
    assert metadata["license"] == "mit"
    assert metadata["library_name"] == ("transformers" if repo == "tester/full" else "peft")
    assert f'"{repo}"' in card, "the quick start loads what was pushed"
    files = {path: content for path, content in hub.files[repo].items() if path != "training_args.bin"}
    assert [path for path in files if str(base.parent).encode() in files[path]] == [], "no folder of this machine"


def test_adapter_of_a_local_base_is_refused(pushed):
    hub, run, base = pushed
    assert f"REFUSED `push_to_hub()`: the base model was loaded from the local path '{base}'" in run.stdout
    assert "tester/local-base" not in hub.files
    config = json.loads(hub.files["tester/lora"]["adapter_config.json"])
    assert config["base_model_name_or_path"] == "org/tiny-base"


def test_adapter_of_a_base_in_memory(pushed):
    """It is refused without the id of its base, which is in what is pushed otherwise."""
    hub, run, _ = pushed
    assert "REFUSED `push_to_hub()`: the base model was built in memory" in run.stdout
    assert "tester/in-memory" not in hub.files
    files = hub.files["tester/in-memory-named"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/tiny-base"
    assert "base_model: org/tiny-base" in files["README.md"].decode()


@pytest.mark.parametrize("repo", ["in-memory-named", "d2po", "images", "images-lora"])
def test_no_folder_of_this_machine_is_pushed(pushed, repo):
    """Not that of a discriminator's base, of a pipeline or of its parts either."""
    hub, run, base = pushed
    files = {path: content for path, content in hub.files[f"tester/{repo}"].items() if path != "training_args.bin"}
    expected = {"d2po": "discriminator/adapter_config.json", "images": "model_index.json"}.get(repo, "README.md")
    assert expected in files, run.stderr
    found = [path for path in files if re.search(re.escape(str(base.parent)).encode(), files[path])]
    assert found == []


def test_private_repository(pushed):
    hub, _, _ = pushed
    visible = {repo: hub.visibility[repo] for repo in ("tester/full", "tester/lora", "org/named")}
    assert visible == {"tester/full": "public", "tester/lora": "private", "org/named": "public"}


def test_every_save_pushes_checkpoints(pushed):
    hub, _, _ = pushed
    assert hub.commits["tester/full"] == ["End of training"]
    messages = hub.commits["org/named"]
    assert {"Training in progress, step 1", "Training in progress, step 2"} <= set(messages)
    assert messages[-1] == "End of training"


def test_a_refused_push_says_why(pushed):
    hub, run, _ = pushed
    assert run.returncode != 0
    assert "403" in run.stderr
    assert "You don't have the rights to create a model under this namespace" in run.stderr
    assert "closed/refused" not in hub.files


def test_nothing_else_was_asked_of_the_hub(pushed):
    hub, _, _ = pushed
    assert {path for path in hub.unknown if "/closed/" not in path} == set()


def test_the_token_stays_here(pushed):
    """Least of all in `training_args.bin`, where Transformers' arguments would put `hub_token`."""
    hub, run, _ = pushed
    assert hub.tokens == {TOKEN}, "requests carried the token, so the test means something"
    assert TOKEN not in run.stdout + run.stderr
    assert [path for files in hub.files.values() for path in files if TOKEN.encode() in files[path]] == []


def test_copies_of_the_arguments_keep_the_token_and_pickles_do_not(tmp_path):
    args = SimPERConfig(str(tmp_path), bf16=False, use_cpu=True, hub_token=TOKEN)
    assert copy.deepcopy(args).hub_token == TOKEN
    assert copy.copy(args).hub_token == TOKEN
    pickled = pickle.dumps(args)
    assert TOKEN.encode() not in pickled
    assert pickle.loads(pickled).learning_rate == args.learning_rate


def test_the_stub_refuses_bad_metadata():
    """The stub's check of a card can fail, so a push that passes it says something."""
    body = json.dumps({"content": "---\nlicense: unheard-of\n---\n", "repoType": "model"})
    status, answer = HubStub().answer("POST", "/api/validate-yaml", body.encode())
    assert status == 400
    assert "unheard-of" in answer["errors"][0]["message"]
