"""Preference data of every shape: trained as it is meant, or refused with its row, its column and the remedy."""

import harness
import pandas
import pytest
import tiny
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value
from methods import BY_ID
from tokenizers.processors import TemplateProcessing

from trl_ext.preference import data, rows


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


GOOD = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
TEXT = {"prompt": "a", "chosen": "b", "rejected": "c"}


def trainer(train, folder, tmp_path, method="fdpo", tokenizer=None, **options):
    return harness.trainer(BY_ID[method], folder, tmp_path, train_dataset=train, processing_class=tokenizer, **options)


def decoded(trainer, row=0):
    values = trainer.train_dataset[row]
    return [trainer.processing_class.decode(values[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
@pytest.mark.parametrize(
    "bad, message",
    [
        ({"chosen": assistant("b")}, r"one message as `chosen`.*list"),
        ({"rejected": "c"}, r"messages as `prompt`.*a text as `rejected`"),
        ({"prompt": "a"}, r"a text as `prompt`.*remove_columns"),
        ({"prompt": []}, r"no message in `prompt`"),
        ({"prompt": 3}, r"a int as `prompt`, got 3"),
        ({"prompt": None}, r"`prompt=None`"),
        ({"chosen": [3]}, r"`chosen\[0\]`, got 3"),
        ({"chosen": [{"from": "gpt", "value": "b"}]}, r"ShareGPT.*`chosen\[0\]`.*\"assistant\""),
        ({"chosen": [{"content": "b"}]}, r"without a role as `chosen\[0\]`"),
        ({"prompt": [user("a"), user(None)]}, r"without content as `prompt\[1\]`"),
        ({"chosen": [{"role": None, "content": "b"}]}, r"without a role as `chosen\[0\]`"),
        ({"chosen": [assistant(7)]}, r"a int as content of `chosen\[0\]`"),
        ({"chosen": [user("a"), assistant("b")]}, r"whole dialogue in `chosen`.*remove_columns"),
        ({"chosen": [user("x"), assistant("b")]}, r"`chosen` that begins with the turn of the 'user'"),
        ({"chosen": [assistant("b"), user("x")]}, r"`chosen` that ends with the turn of the 'user'"),
        ({"rejected": [assistant("c"), {"role": "system", "content": "x"}]}, r"ends with the turn of the 'system'"),
        ({"prompt": [{"role": " ", "content": "a"}]}, r"without a role as `prompt\[0\]`"),
        ({"chosen": b"b"}, r"a bytes as `chosen`"),
        ({"chosen": True}, r"a bool as `chosen`"),
        ({"prompt": [user(b"a")]}, r"a bytes as content of `prompt\[0\]`"),
        ({"prompt": [[user("a")]]}, r"a list as `prompt\[0\]`"),
        ({"prompt": ["a"]}, r"a str as `prompt\[0\]`"),
        ({"tools": "{not json"}, r"`tools` that are not JSON"),
        ({"tools": 3}, r"a int as `tools`, got 3"),
        ({"tools": '{"name": "f"}'}, r"a dict as `tools`"),
        ({"chat_template_kwargs": '{"a": 1}'}, r"a str as `chat_template_kwargs`.*json.loads"),
        ({"rejected": [{"role": "system", "content": "x"}]}, r"`rejected` that begins with the turn of the 'system'"),
    ],
)
def test_bad_rows_are_named(bad, message, streaming):
    with pytest.raises(rows.RowError, match=message):
        rows.check_row({**GOOD, **bad})
    if streaming:
        stream = IterableDataset.from_generator(lambda: iter([GOOD, {**GOOD, **bad}]))
        with pytest.raises(ValueError, match=f"Row 1 of the eval dataset.*{message}"):
            list(rows.check_rows(stream, "eval"))


def test_a_prompt_under_another_name_is_pointed_out(caplog):
    """Nothing is shared by the responses, so that they would be trained without a prompt, and the column unused."""
    PartialState()  # which Accelerate's loggers ask, and a trainer has made before it checks its rows
    pairs = [{"instruction": "a", "chosen": "b", "rejected": "c"}] * 4
    rows.check_rows(Dataset.from_list(pairs), "train")
    assert "in 4 of its 4 rows" in caplog.text and "rename_column('instruction', \"prompt\")" in caplog.text
    caplog.clear()
    rows.check_rows(Dataset.from_list([{"chosen": "q b", "rejected": "q c"}] * 4), "train")
    rows.check_rows(Dataset.from_list([TEXT] * 4), "train")
    assert not caplog.text


@pytest.mark.parametrize("column", ["prompt", "chosen"])
def test_messages_as_json_text_are_refused(column):
    """As a CSV file holds them: they would be trained as the text that they are. Other JSON is a text."""
    with pytest.raises(rows.RowError, match=rf"messages as JSON text in `{column}`.*json\.loads"):
        rows.check_row({**TEXT, column: '[{"role": "user", "content": "a"}]'})
    for text in ('["role"]', "[1, 2]", '{"role": "user", "content": "a"}', '[{"role": "user"', '[{"role": "cook"}]'):
        rows.check_row({**TEXT, column: text})


def test_a_stream_of_texts_and_messages():
    for first, other, told in ((TEXT, GOOD, "messages, and its first row has texts"), (GOOD, TEXT, "texts, and")):
        stream = IterableDataset.from_generator(lambda first=first, other=other: iter([first, first, other]))
        with pytest.raises(ValueError, match=f"Row 2 of the train dataset has {told}"):
            list(rows.check_rows(stream, "train"))


@pytest.mark.parametrize("method", ["fdpo", "d2po"])
def test_content_in_parts(method, tiny_folder, tmp_path):
    """A template that knows texts only writes parts as Python does, and the model would be trained on that."""
    row = {**GOOD, "prompt": [user([{"type": "text", "text": "a"}])]}
    with pytest.raises(ValueError, match="content in parts.*chat template.*join"):
        trainer(Dataset.from_list([row] * 4), tiny_folder, tmp_path, method)
    knowing = tiny.tokenizer()
    knowing.chat_template = tiny.VISION_CHAT_TEMPLATE
    run = trainer(Dataset.from_list([row] * 4), tiny_folder, tmp_path, method, knowing)
    assert run.processing_class.decode(run.train_dataset[0]["prompt_ids"]) == "<|user|>a<|end|><|assistant|>"


CALLS = (
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }}{{ call.function.arguments }}{% endfor %}"
)
WITH_CALLS = tiny.CHAT_TEMPLATE.replace("<|end|>", f"{CALLS}<|end|>")


@pytest.mark.parametrize("method", ["fdpo", "d2po"])
@pytest.mark.parametrize("where", ["first row", "later row"])
def test_tool_calls_are_written_or_refused(where, method, tiny_folder, tmp_path):
    """A template that does not know them drops them, and the model would be trained to say nothing instead."""
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}

    def rows_with(content):
        calling = {"role": "assistant", "content": content, "tool_calls": [call]}
        prompts = [[user("a"), calling, {"role": "tool", "content": "b"}], [user("a"), assistant("b"), user("c")]]
        prompts = prompts if where == "first row" else prompts[::-1]
        return Dataset.from_list([{**GOOD, "prompt": prompt} for prompt in prompts * 2])

    def told(content, template):
        knowing = tiny.tokenizer()
        knowing.chat_template = template
        run = trainer(rows_with(content), tiny_folder, tmp_path, method, knowing)
        ids = run.train_dataset[0 if where == "first row" else 1]["prompt_ids"]
        return run.processing_class.decode(ids)

    with pytest.raises(ValueError, match="`tool_calls`, which the chat template of this tokenizer leaves out"):
        told("", tiny.CHAT_TEMPLATE)
    # Transformers 5.17 leaves a missing content to the template, which writes what Python does; later it is empty.
    missing = tiny.tokenizer().apply_chat_template([{"role": "assistant", "content": None}], tokenize=False)
    for content, written in (("", ""), (None, "None" if "None" in missing else "")):
        expected = f"<|user|>a<|end|><|assistant|>{written}<call>look{{}}<|end|><|tool|>b<|end|>"
        assert told(content, WITH_CALLS).startswith(expected)


def test_tool_calls_that_are_none_everywhere(tiny_folder, tmp_path):
    """As files of a server's log have them: nothing is left out."""
    said = [{**message, "tool_calls": None} for message in (user("a"), assistant("b"), assistant("c"))]
    row = {"prompt": said[:1], "chosen": said[1:2], "rejected": said[2:]}
    run = trainer(Dataset.from_list([row] * 4), tiny_folder, tmp_path)
    assert decoded(run)[0] == "<|user|>a<|end|><|assistant|>"


@pytest.mark.parametrize("method", ["fdpo", "d2po"])
@pytest.mark.parametrize(
    "role, usual", [("human", "user"), ("User", "user"), ("gpt", "assistant"), ("SYSTEM", "system")]
)
def test_roles_by_another_name(role, usual, method, tiny_folder, tmp_path):
    """A template that writes any role would open turns that no generation opens."""
    row = {**GOOD, "prompt": [{"role": role, "content": "x"}, user("a")]}
    with pytest.raises(ValueError, match=f"role '{role}'.*chat template.*Rename it to '{usual}'"):
        trainer(Dataset.from_list([row] * 4), tiny_folder, tmp_path, method)
    knowing = tiny.tokenizer()
    knowing.chat_template = "{% if messages[0]['role'] == '" + role + "' %}*{% endif %}" + tiny.CHAT_TEMPLATE
    run = trainer(Dataset.from_list([row] * 4), tiny_folder, tmp_path, method, knowing)
    assert run.processing_class.decode(run.train_dataset[0]["prompt_ids"]).startswith(f"*<|{role}|>x")


def test_columns_of_other_types(tiny_folder, tmp_path):
    """Categories and large texts are texts; labels of classes are numbers, whatever their names."""
    table = pandas.DataFrame([TEXT] * 4).astype("category")
    large = Dataset.from_list([TEXT] * 4, features=Features(dict.fromkeys(TEXT, Value("large_string"))))
    for dataset in (Dataset.from_pandas(table), large):
        assert decoded(trainer(dataset, tiny_folder, tmp_path)) == ["a", "b<|end|>", "c<|end|>"]
    answers = ClassLabel(names=["b", "c"])
    features = Features({"prompt": Value("string"), "chosen": answers, "rejected": answers})
    with pytest.raises(ValueError, match="Row 0 of the train dataset.*a int as `chosen`, got 0"):
        trainer(Dataset.from_list([TEXT] * 4, features=features), tiny_folder, tmp_path)


def test_a_response_of_another_role(tiny_folder, tmp_path):
    row = {**GOOD, "rejected": [{"role": "Assistant", "content": "c"}]}
    with pytest.raises(ValueError, match="role 'Assistant'"):
        trainer(Dataset.from_list([row] * 4), tiny_folder, tmp_path)
    other = {**GOOD, "prompt": [{"role": "narrator", "content": "x"}, user("a")]}
    assert decoded(trainer(Dataset.from_list([other] * 4), tiny_folder, tmp_path))[0].startswith("<|narrator|>x")


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_that_is_left_out_is_said(key, tiny_folder, tmp_path, caplog):
    row = {**GOOD, "chosen": [{**assistant("b"), key: "hm"}], "rejected": [{**assistant("c"), key: None}]}
    with caplog.at_level("WARNING", logger="trl_ext"):
        trainer(Dataset.from_list([GOOD] * 4), tiny_folder, tmp_path)
        assert "leaves out" not in caplog.text
        trainer(Dataset.from_list([row] * 4), tiny_folder, tmp_path)
    assert f"Responses have '{key}' beside their content" in caplog.text
    caplog.clear()
    knowing = tiny.tokenizer()
    written = "{{ message['" + key + "'] or '' }}"
    knowing.chat_template = tiny.CHAT_TEMPLATE.replace(
        "{{ message['content'] }}", written + "{{ message['content'] }}"
    )
    run = trainer(Dataset.from_list([row] * 4), tiny_folder, tmp_path, tokenizer=knowing)
    assert "leaves out" not in caplog.text and decoded(run)[1].startswith("hmb")


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
@pytest.mark.parametrize("bad", [["a"], [1.5], [[5]], [5, None]], ids=["texts", "floats", "nested", "none"])
@pytest.mark.parametrize("column", ["prompt_ids", "rejected_ids"])
def test_token_ids_of_another_kind(column, bad, streaming, tiny_folder, tmp_path):
    row = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7], column: bad}
    dataset = Dataset.from_list([row] * 4)
    if streaming:
        dataset = IterableDataset.from_generator(lambda: iter([row] * 4))
    with pytest.raises(ValueError, match=f"`{column}`.*integers"):
        trainer(dataset, tiny_folder, tmp_path)


def test_good_rows_pass():
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    for row in (GOOD, TEXT, {**GOOD, "chosen": [call]}, {"chosen": "x", "rejected": "y"}, {**TEXT, "prompt": ""}):
        rows.check_row(row)


def test_rows_are_named_whichever_column_comes_first(tiny_folder, tmp_path):
    """
    Messages beside texts: TRL looks at one column, picked by the order of a set of strings, which differs between
    processes.
    """
    mixed = {"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]}
    with pytest.raises(
        ValueError, match=r"Row 0 of the train dataset has a text as `prompt` and messages as `chosen`"
    ):
        trainer(Dataset.from_list([mixed] * 4), tiny_folder, tmp_path)


def test_template_options_of_none(tiny_folder, tmp_path):
    """A row without `chat_template_kwargs` beside rows that have some; and a column of nothing else."""
    some = [{**GOOD, "chat_template_kwargs": {"x": True}}] * 2 + [{**GOOD, "chat_template_kwargs": None}] * 2
    none = [{**GOOD, "chat_template_kwargs": None}] * 4
    expected = decoded(trainer(Dataset.from_list([GOOD] * 4), tiny_folder, tmp_path))
    for dataset in (some, none):
        assert decoded(trainer(Dataset.from_list(dataset), tiny_folder, tmp_path), row=3) == expected


def test_prompt_that_ends_in_the_assistants_turn_is_continued(tiny_folder, tmp_path):
    opened = {
        "prompt": [user("a"), assistant("The answer")],
        "chosen": [assistant(" is four")],
        "rejected": [assistant(" was five")],
    }
    prompt, chosen, rejected = decoded(trainer(Dataset.from_list([opened, GOOD] * 2), tiny_folder, tmp_path))
    assert prompt.endswith("The answer") and chosen.startswith(" is four") and rejected.startswith(" was five")
    whole = {
        "prompt": [user("a")],
        "chosen": [assistant("The answer is four")],
        "rejected": [assistant("The answer was five")],
    }
    reference = decoded(trainer(Dataset.from_list([whole] * 4), tiny_folder, tmp_path))
    assert prompt + chosen == reference[0] + reference[1]
    assert decoded(trainer(Dataset.from_list([opened, GOOD] * 2), tiny_folder, tmp_path), row=1) == decoded(
        trainer(Dataset.from_list([GOOD] * 4), tiny_folder, tmp_path)
    )
    with pytest.raises(ValueError, match="ends in an assistant's turn.*`chosen`"):
        trainer(
            Dataset.from_list([{**opened, "chosen": [{"role": "tool", "content": "x"}]}] * 4), tiny_folder, tmp_path
        )


@pytest.mark.parametrize("template", ["<|system|> $A", "$A <|end|>", "<|system|> $A <|end|>"])
def test_rendered_texts_have_one_of_each_token(template, tiny_folder, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<|end|>", 1), ("<|system|>", 4)]
    )
    row = {"prompt": "<|system|>hi ", "chosen": "good<|end|>\n", "rejected": "bad"}
    prompt, chosen, rejected = decoded(
        trainer(Dataset.from_list([row] * 4), tiny_folder, tmp_path, tokenizer=tokenizer)
    )
    assert (prompt, chosen, rejected) == ("<|system|>hi ", "good<|end|>", "bad<|end|>")


def test_whole_texts_beside_a_prompt_are_warned_of(tiny_folder, tmp_path, caplog):
    whole = {"prompt": "Once upon ", "chosen": "Once upon a time", "rejected": "Once upon no"}
    trainer(Dataset.from_list([whole] * 4), tiny_folder, tmp_path)
    assert "4 of the 4 rows of the train dataset both responses begin with the text of `prompt`" in caplog.text


IDS = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 1], "rejected_ids": [10, 11, 1]}


@pytest.mark.parametrize(
    "dataset",
    [
        lambda: Dataset.from_list([IDS] * 8, features=Features({k: List(Value("int64"), length=3) for k in IDS})),
        lambda: Dataset.from_list([IDS] * 8).with_format("torch"),
        lambda: Dataset.from_list([IDS] * 8).with_format("numpy"),
        lambda: Dataset.from_list([IDS] * 9).select(range(1, 9)).with_format("torch"),
    ],
    ids=["fixed size", "torch", "numpy", "selected"],
)
def test_formats_train_as_plain_rows(dataset, tiny_folder, tmp_path):
    plain = trainer(Dataset.from_list([IDS] * 8), tiny_folder, tmp_path / "a", max_steps=1)
    other = trainer(dataset(), tiny_folder, tmp_path / "b", max_steps=1)
    plain.train(), other.train()
    assert plain.state.log_history[0]["loss"] == other.state.log_history[0]["loss"]


def test_transform_is_refused(tiny_folder, tmp_path):
    dataset = Dataset.from_list([TEXT] * 4).with_transform(
        lambda batch: {k: [x.upper() for x in v] for k, v in batch.items()}
    )
    with pytest.raises(ValueError, match=r"train dataset has a transform.*dataset\.map"):
        trainer(dataset, tiny_folder, tmp_path)


@pytest.mark.parametrize(
    "ids, max_length, mode, scored",
    [
        ((0, 1), None, "keep_start", 0),
        ((0, 2), None, "keep_start", 1),
        ((1, 1), None, "keep_start", 1),
        ((3, 5), 4, "keep_start", 1),
        ((0, 5), 1, "keep_start", 0),
        ((3, 5), 4, "keep_end", 3),
        ((3, 2), 4, "keep_end", 2),
        ((9, 1), 1, "keep_end", 0),
    ],
)
def test_scored_tokens(ids, max_length, mode, scored):
    """As many as the mask of TRL's collator, shifted onto the predictions, has."""
    from trl_ext._trl import DataCollatorForPreference

    collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)
    row = {"prompt_ids": [7] * ids[0], "chosen_ids": [8] * ids[1], "rejected_ids": [9] * ids[1]}
    assert int(collator([row])["completion_mask"][0, 1:].sum()) == scored
    assert data._num_scored(*ids, max_length, mode) == scored


@pytest.mark.parametrize("method", ["fdpo", "simper", "tdpo"])
def test_response_without_a_scored_token_is_refused(method, tiny_folder, tmp_path):
    bad = {"prompt_ids": [], "chosen_ids": [7], "rejected_ids": [8, 9]}
    with pytest.raises(ValueError, match=r"Row 2 of the train dataset has no scored token.*`chosen`.*2 such row"):
        trainer(Dataset.from_list([IDS, IDS, bad, bad]), tiny_folder, tmp_path, method)


def test_tokens_beyond_the_embedding_are_refused(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match=r"Token 384 .*train dataset \(row 1\).*384 rows.*resize_token_embeddings"):
        trainer(
            Dataset.from_list([IDS, IDS, {**IDS, "rejected_ids": [384, 1]}, IDS]).select([1, 2, 3]),
            tiny_folder,
            tmp_path,
        )
    with pytest.raises(ValueError, match=r"Token -100 of the train dataset \(row 1\) is negative"):
        trainer(Dataset.from_list([IDS, {**IDS, "prompt_ids": [5, -100]}]), tiny_folder, tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"Token 384 \('\[PAD\]'\) of the padding.*385 tokens"):
        trainer(None, harness.load(tiny_folder), tmp_path, tokenizer=tokenizer)
    built = trainer(None, tiny_folder, tmp_path)
    with pytest.raises(ValueError, match="Token 400 .*eval dataset"):
        built.evaluate(Dataset.from_list([{**IDS, "chosen_ids": [400, 1]}] * 4))


@pytest.mark.parametrize("token", [-1, 384])
def test_tokens_of_a_stream_are_checked_as_it_comes(token, tiny_folder, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([IDS, {**IDS, "chosen_ids": [8, token]}] * 4))
    built = trainer(stream, tiny_folder, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=rf"Token {token} .*the train dataset \(row 1\)"):
        built.train()


def test_vision_prompt_that_fills_max_length(tmp_path):
    tiny.save_vision(tmp_path / "model")
    built = trainer(tiny.vision_dataset(4), str(tmp_path / "model"), tmp_path / "out", max_length=15, max_steps=1)
    with pytest.raises(ValueError, match="`max_length=15` is too short.*all of a response"):
        built.train()
    assert torch.is_tensor(built.model.lm_head.weight)
