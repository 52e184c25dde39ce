"""
A micro-batch as one row: to the bit what the padded batch gives, for every kind of attention; and what must not be
given one raises.
"""

import dataclasses
import inspect

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_ext.preference.scoring import score_tokens
from trl_ext.training.scoring_head import ScoringRequest, add_scoring_head
from trl_ext.training.shared_prompt import (
    NotShareable,
    PackedMask,
    SharedPrompts,
    pack,
    packed_forward,
    unshareable,
)


VOCABULARY = 96
PLAIN = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
PLAIN |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64)
GROUPED = PLAIN | dict(num_key_value_heads=2)
WINDOW = GROUPED | dict(sliding_window=6)  # shorter than the rows
MIXED = WINDOW | dict(layer_types=["sliding_attention", "full_attention"])
EXPERTS = GROUPED | dict(num_experts=4, num_experts_per_tok=2, num_local_experts=4)

# Model type -> its configuration; the statistics of all are equal to the bit.
EXACT = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | dict(head_dim=8),
    "mistral": WINDOW,
    "gemma2": MIXED | dict(head_dim=8, attn_implementation="eager"),
    "gemma3_text": MIXED | dict(head_dim=8),
    "cohere2": MIXED,
    "gpt_oss": MIXED | dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2, attn_implementation="eager"),
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "smollm3": GROUPED,
    "gpt2": dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "gpt_neox": PLAIN,
    "opt": PLAIN | dict(ffn_dim=48, word_embed_proj_dim=32),
    "qwen3_moe": EXPERTS | dict(moe_intermediate_size=16, head_dim=8),
    "mixtral": EXPERTS,
    # An expert's product has fewer rows on the row than on the batch, so in fp32 its last bits may differ; here they
    # do not.
    "deepseek_v3": PLAIN
    | dict(num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
    | dict(first_k_dense_replace=1, moe_intermediate_size=32, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4)
    | dict(qk_nope_head_dim=8, v_head_dim=8),
}
HAS_ROUTER = ("qwen3_moe", "mixtral")


def build(kind: str, dtype=torch.float32, **options):
    options = {**EXACT.get(kind, {}), **options}
    implementation = options.pop("attn_implementation", None)
    config = AutoConfig.for_model(kind, **options)
    config.initializer_range = 0.2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(dtype).eval()
    add_scoring_head(model)
    return model


def batch(lengths=((12, 8, 14), (5, 3, 4), (1, 2, 5), (9, 10, 2)), seed=0, extra=0) -> dict:
    """
    Pairs of (prompt, chosen, rejected) lengths as TRL's collator pads them, `extra` columns of padding more. Responses
    of a pair share their first token, which is not shared in the row.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(3, VOCABULARY, (count,), generator=generator)

    rows, prompts = [], [ids(p) for p, _, _ in lengths]
    for side in (1, 2):
        for prompt, each in zip(prompts, lengths, strict=True):
            rows.append((prompt, torch.cat([torch.tensor([7]), ids(each[side] - 1)])))
    width = max(len(p) + len(r) for p, r in rows) + extra
    inputs = {name: torch.zeros(len(rows), width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    inputs["completion_mask"] = torch.zeros_like(inputs["input_ids"])
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        inputs["input_ids"][i, :end] = torch.cat([prompt, response])
        inputs["attention_mask"][i, :end] = 1
        inputs["completion_mask"][i, len(prompt) : end] = 1
    return inputs


def statistics(model, inputs, rows=None, **options):
    with torch.no_grad():
        return score_tokens(model, inputs, rows=rows, **options)


def assert_equal_bits(scored, expected):
    for name in ("log_probs", "entropy", "mean_logits", "is_top1"):
        assert torch.equal(getattr(scored, name), getattr(expected, name)), name
    assert scored.log_probs.shape == expected.mask.shape and scored.log_probs[expected.mask].all()


def gradient(model, inputs, rows=None, **options) -> torch.Tensor:
    model.zero_grad()
    scored = score_tokens(model, inputs, rows=rows, **options)
    weights = torch.linspace(-1.0, 1.5, len(inputs["input_ids"]))[:, None]
    loss = (weights * scored.log_probs).sum()
    if scored.aux_loss is not None:
        loss = loss + scored.aux_loss
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative(first: torch.Tensor, second: torch.Tensor) -> float:
    return ((first - second).norm() / second.norm()).item()


# ---- The row -------------------------------------------------------------------------------------------------------


def test_row():
    """
    Two pairs by hand. Prompts 5 6 7 and 8; the first pair shares 5 6 and not 7, from which each side predicts its
    first response token; the second shares nothing.
    """
    a, b = [[5, 6, 7, 9, 0], [8, 9, 9, 9, 0]], [[5, 6, 7, 4, 4], [8, 3, 0, 0, 0]]
    completion = [[0, 0, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 1, 1], [0, 1, 0, 0, 0]]
    ids = torch.tensor(a + b)
    rows = pack({"input_ids": ids, "attention_mask": (ids != 0).long(), "completion_mask": torch.tensor(completion)})
    assert rows.input_ids.tolist() == [[5, 6, 7, 9, 8, 9, 9, 9, 7, 4, 4, 8, 3]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 2, 3, 4, 0, 1]]
    assert rows.labels.tolist() == [[-100, -100, -100, 9, -100, 9, 9, 9, -100, 4, 4, -100, 3]]
    assert rows.copies.tolist() == [[2, 2] + [1] * 11]
    assert rows.copies.sum() == (ids != 0).sum()
    assert rows.expand[2].tolist() == [0, 1, 8, 9, 10]
    assert torch.equal(rows.input_ids[0][rows.expand][ids != 0], ids[ids != 0])
    assert rows.shared.tolist() == [0, 1] and rows.omitted.tolist() == [10, 11]
    assert rows.mask.sum() == (rows.labels[:, 1:] != -100).sum() == 7


@pytest.mark.parametrize(
    "lengths, tokens",
    {
        "equal sides": ([(6, 4, 4), (6, 4, 4)], 2 * (6 + 4 + 1 + 4)),
        "prompts of one token": ([(1, 4, 3), (1, 2, 5)], 5 + 4 + 3 + 6),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lengths(lengths, tokens):
    if isinstance(lengths, str):
        lengths, tokens = tokens
    inputs = batch(lengths)
    rows = pack(inputs)
    assert rows.input_ids.size(1) == tokens
    model = build("llama")
    assert_equal_bits(statistics(model, inputs, rows), statistics(model, inputs))


def test_rows_that_are_no_pairs():
    """Of an odd number of rows only padding goes; unrelated halves share nothing."""
    model, inputs = build("llama"), batch()
    for chosen in ([0, 1, 2], [0, 5, 3, 6]):
        part = {name: value[chosen] for name, value in inputs.items()}
        rows = pack(part)
        assert rows.input_ids.size(1) == part["attention_mask"].sum() and not len(rows.shared)
        assert_equal_bits(statistics(model, part, rows), statistics(model, part))


def test_nothing_to_save_and_padding_on_the_left():
    inputs = batch([(1, 4, 4)])
    assert pack(inputs) is None
    flipped = {name: value.flip(1) for name, value in batch().items()}
    assert pack(flipped) is None


def test_prompts_cut_from_the_left_share_what_they_have_in_common():
    """As `truncation_mode="keep_end"` leaves them: prompts of different lengths."""
    inputs, model = batch([(12, 3, 9)]), build("mistral")
    cut = {name: value.clone() for name, value in inputs.items()}
    for value in cut.values():  # the rejected side keeps its last 14 tokens
        value[1] = torch.cat([value[1, 7:21], value.new_zeros(7)])[: value.size(1)]
    rows = pack(cut)
    assert len(rows.shared) == 0
    assert_equal_bits(statistics(model, cut, rows), statistics(model, cut))


# ---- Bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXACT)
def test_statistics_are_those_of_padded_rows(kind):
    """To the bit in both precisions; gradients within 1e-6; the auxiliary loss of a router is that of two prompts."""
    inputs = batch(extra=2)
    rows = pack(inputs)
    routed = dict(output_router_logits=kind in HAS_ROUTER)
    for dtype in (torch.bfloat16, torch.float32):
        model = build(kind, dtype)
        assert unshareable(model) is None
        scored, expected = (statistics(model, inputs, r, **routed) for r in (rows, None))
        assert_equal_bits(scored, expected)
    if kind in HAS_ROUTER:
        torch.testing.assert_close(scored.aux_loss, expected.aux_loss, rtol=1e-6, atol=0)
        assert scored.aux_loss > 0
    assert relative(*(gradient(model, inputs, r, **routed) for r in (rows, None))) <= 1e-6


def test_windows_matter():
    """The rows of these tests are longer than the windows: without them, the numbers are others."""
    inputs = batch()
    with_window, without = (build("mistral", sliding_window=size) for size in (6, 60))
    assert not torch.equal(statistics(with_window, inputs).log_probs, statistics(without, inputs).log_probs)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpointing(reentrant):
    """Layers that run again, after the forward is over, give the gradient of a forward that kept everything."""
    inputs = batch()
    rows, model = pack(inputs), build("gemma3_text")
    plain = gradient(model, inputs, rows)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    assert torch.equal(gradient(model, inputs, rows), plain)
    assert relative(plain, gradient(model, inputs)) <= 1e-6


def test_adapter_and_two_models_in_one_pass():
    """LoRA; and the paired head, whose KL has a gradient on one side only, beside the base as reference."""
    inputs = batch()
    rows = pack(inputs)
    base = build("qwen2")
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    results = []
    for r in (None, rows):
        kept = ScoringRequest(keep_states=True)
        with torch.no_grad(), model.disable_adapter():
            score_tokens(model, inputs, kept, rows=r)
        for sides in ((True, False), (False, True)):
            model.zero_grad()
            request = ScoringRequest(reference=kept.states, kl_gradient=sides, ref_entropy=True)
            scored = score_tokens(model, inputs, request, rows=r)
            (scored.token_kl.sum() + scored.log_probs.mean()).backward()
            grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            results.append((scored, grads))
    for (expected, gradients), (scored, packed_gradients) in zip(results[:2], results[2:], strict=True):
        assert_equal_bits(scored, expected)
        for name in ("ref_log_probs", "token_kl", "ref_entropy"):
            assert torch.equal(getattr(scored, name), getattr(expected, name)), name
        assert relative(packed_gradients, gradients) <= 1e-6
    assert relative(results[0][1], results[1][1]) > 0.01  # the two sides' gradients are not the same


def test_chosen_tokens_do_not_reach_the_rejected_side():
    """Other chosen responses leave every number of the rejected ones as it was."""
    model, inputs = build("mistral"), batch()
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    chosen = changed["completion_mask"].bool()
    chosen[4:] = False
    changed["input_ids"][chosen] = 5
    scored, other = (statistics(model, i, pack(i)) for i in (inputs, changed))
    assert torch.equal(scored.log_probs[4:], other.log_probs[4:])
    assert not torch.equal(scored.log_probs[:4], other.log_probs[:4])


# ---- Mutants: each of the row's four devices is needed -------------------------------------------------------------


def test_mutants_of_positions_and_multiplicities():
    inputs, model = batch(), build("mixtral")
    rows, routed = pack(inputs), dict(output_router_logits=True)
    expected = statistics(model, inputs, **routed)
    running = dataclasses.replace(rows, position_ids=torch.arange(rows.input_ids.size(1))[None])
    assert not torch.allclose(statistics(model, inputs, running).log_probs, expected.log_probs, atol=1e-3)
    once = dataclasses.replace(rows, copies=torch.ones_like(rows.copies))
    scored = statistics(model, inputs, once, **routed)
    assert torch.equal(scored.log_probs, expected.log_probs)
    assert abs(scored.aux_loss - expected.aux_loss) > 1e-4


def test_mutant_without_the_first_label_hidden():
    """Without the -100 where a sequence begins, one that has no prompt has its first token predicted by another's."""
    inputs = batch([(3, 4, 5), (3, 2, 6)])
    bare = inputs["completion_mask"].index_put((torch.tensor([3, 1]),), torch.tensor(0))
    bare[[1, 3]] = inputs["attention_mask"][[1, 3]]
    inputs["completion_mask"] = bare
    model, rows = build("llama"), pack(inputs)
    assert_equal_bits(statistics(model, inputs, rows), statistics(model, inputs))
    labels = torch.where((rows.position_ids == 0) & (rows.labels.roll(-1) != -100), rows.input_ids, rows.labels)
    scored = statistics(model, inputs, dataclasses.replace(rows, labels=labels))
    assert not torch.allclose(scored.log_probs, statistics(model, inputs).log_probs, atol=1e-3)


def test_mutant_without_the_copied_token():
    """
    If the prompt's last token stands once, at the end of the trunk, the rejected side's first response token follows
    what stands before it in the row, which is another sequence's.
    """
    inputs, model = batch([(6, 4, 5), (6, 4, 3)]), build("llama")
    longer = inputs["completion_mask"].clone()
    longer[:, 6] = 0  # the responses' common first token counts as prompt, so the trunk includes the prompt's last
    mutant = pack({**inputs, "completion_mask": longer})
    assert mutant.input_ids.size(1) == pack(inputs).input_ids.size(1) - 2
    labels = mutant.input_ids.masked_fill(mutant.position_ids < 6, -100)
    mutant = dataclasses.replace(mutant, labels=labels, mask=inputs["completion_mask"][:, 1:].bool())
    assert_equal_bits(statistics(model, inputs, pack(inputs)), statistics(model, inputs))
    wrong = statistics(model, inputs, mutant).log_probs - statistics(model, inputs).log_probs
    assert not wrong[:2].any() and wrong[2:, 5].abs().min() > 1e-3 and not wrong[2:, 6:].any()


# ---- Other kernels --------------------------------------------------------------------------------------------------

OUTLIER = [(3, 2, 4), (5, 3, 4), (1, 2, 5), (18, 12, 10)]  # one long pair, for which all others are padded


@pytest.fixture
def calls_are_free(monkeypatch):
    """On rows as short as here, what a call costs has attention by segments never chosen."""
    monkeypatch.setattr("trl_ext.training.shared_prompt._CALL", 0)


def test_when_attention_by_segments_is_chosen():
    """
    The choices of a CPU's clock: for a pair with a long prompt and for one long pair among short ones, not for many
    short pairs, nor where the rejected response, under its mask, computes what causal attention leaves out.
    """
    for lengths, chosen in (
        ([(384, 64, 64)], True),
        ([(192, 64, 64)], True),
        ([(300, 50, 50)] + [(30, 10, 20)] * 3, True),
        ([(20, 20, 20)] * 8, False),
        ([(32, 224, 224)], False),
        ([(64, 192, 192)] * 4, False),
    ):
        assert pack(batch(lengths), by_segments=True).is_cheaper_by_segments == chosen, lengths


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neox", "deepseek_v3"])
def test_attention_by_segments(kind, calls_are_free):
    """The same to 1e-5, statistics and gradients; layers with a window keep their mask."""
    model, inputs = build(kind), batch(OUTLIER)
    rows = pack(inputs, by_segments=True)
    assert rows.is_cheaper_by_segments
    scored, expected = (statistics(model, inputs, r) for r in (rows, None))
    for name in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(getattr(scored, name), getattr(expected, name), rtol=0, atol=1e-5)
    assert relative(*(gradient(model, inputs, r) for r in (rows, None))) <= 1e-5


def test_routers_flip_under_attention_by_segments(calls_are_free):
    """
    Why it is refused for mixtures of experts: in bf16 its rounding has routers choose other experts, which is no
    rounding any more. On the padded places of the row none does.
    """
    inputs = batch(OUTLIER)
    model = build("mixtral", torch.bfloat16, num_hidden_layers=12, num_local_experts=16)
    chosen: list[torch.Tensor] = []
    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            module.register_forward_hook(lambda module, given, output: chosen.append(output[-1].sort(-1).values))
    by_segments, exact = pack(inputs, by_segments=True), pack(inputs)
    scored = [statistics(model, inputs, rows).log_probs for rows in (by_segments, exact, None)]
    assert torch.equal(scored[1], scored[2]) and not torch.equal(scored[0], scored[1])
    assert len(chosen) == 3 * 12
    assert any(not torch.equal(one, other) for one, other in zip(chosen[:12], chosen[12:24], strict=True))


def test_the_masks_of_segments_matter(calls_are_free):
    model, inputs = build("llama"), batch(OUTLIER)
    rows = pack(inputs, by_segments=True)
    assert [(s.start, s.length, s.prefix) for s in rows.segments[3:5]] == [(16, 30, 0), (46, 5, 2)]
    # Mutants: a prefix that is not seen, and one of another pair.
    expected = statistics(model, inputs).log_probs
    for changed in (dict(prefix=0), dict(prefix_start=1)):
        mutant = pack(inputs, by_segments=True)
        mutant.segments[7] = mutant.segments[7]._replace(**changed)
        assert not torch.allclose(statistics(model, inputs, mutant).log_probs[7], expected[7], atol=1e-3)


def emulated_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False,
):  # fmt: skip
    """
    What `flash_attn_varlen_func` documents: causal masks and windows aligned at the lower right of each sequence's
    scores, soft-capping before the mask.
    """
    assert causal and int(cu_seqlens_q.diff().max()) == max_seqlen_q and int(cu_seqlens_k.diff().max()) == max_seqlen_k
    outputs, groups = [], q.size(1) // k.size(1)
    for i in range(len(cu_seqlens_q) - 1):
        query = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]
        key, value = (x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query, key) * (softmax_scale or q.size(-1) ** -0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(len(key) - len(query), len(key))[:, None]
        hidden = torch.arange(len(key))[None] > place
        if window_size[0] >= 0:
            hidden |= torch.arange(len(key))[None] < place - window_size[0]
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value))
    return torch.cat(outputs)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "deepseek_v3"])
def test_flash_attention(kind, monkeypatch):
    """
    One call with variable lengths, through transformers' own function, with a kernel that computes what flash
    attention documents: windows and soft-capping included. No CUDA device is needed, and none was asked.
    """
    from transformers import modeling_flash_attention_utils as flash

    if hasattr(flash, "_process_flash_kwargs_fn"):
        pytest.skip("Transformers 5.18 and older keep the kernel in names of the module")
    calls = []

    def varlen(*args, **kwargs):
        calls.append(kwargs["cu_seqlens_q"])
        return emulated_varlen(*args, **kwargs)

    varlen.__signature__ = inspect.signature(emulated_varlen)
    functions = (None, varlen, None, None, None), (flash._lazy_define_process_function(varlen),) * 2
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *args, **kwargs: functions)
    model, inputs = build(kind, attn_implementation="eager"), batch()
    expected, expected_gradient = statistics(model, inputs), gradient(model, inputs)
    model.config._attn_implementation = "flash_attention_2"
    rows = pack(inputs)
    scored = statistics(model, inputs, rows)
    assert len(calls) == 2 and calls[0].tolist()[-1] == rows.input_ids.size(1)
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(getattr(scored, name), getattr(expected, name), rtol=0, atol=2e-5)
    assert relative(gradient(model, inputs, rows), expected_gradient) <= 1e-5
    monkeypatch.setattr("trl_ext.training.shared_prompt.flash_attn_supports_top_left_mask", lambda: True)
    with pytest.raises(NotShareable, match="upper left"):
        statistics(model, inputs, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_on_cuda(kind, implementation):
    """Within bf16's rounding of padded rows, with the same gradient each time."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    available = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if not available.get(implementation, lambda: True)():
        pytest.skip(f"{implementation} is not installed")
    model = build(kind, torch.bfloat16, head_dim=32, attn_implementation=implementation).cuda()
    inputs = {name: value.cuda() for name, value in batch().items()}
    rows = pack(inputs)
    scored, expected = (statistics(model, inputs, r) for r in (rows, None))
    assert (scored.log_probs - expected.log_probs).abs().sum() / expected.mask.sum() < 5e-2
    first, second = (gradient(model, inputs, pack(inputs)) for _ in range(2))
    if implementation in ("sdpa", "eager"):  # flash attention's own backward is not deterministic
        assert torch.equal(first, second)
    assert relative(first.float(), gradient(model, inputs).float()) < 0.1


# ---- What fails closed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [lambda m: m + 1, lambda m: 1 - m, lambda m: m[:, 0], lambda m: m == 0, bool])
def test_calculating_with_the_mask_raises(operation):
    with pytest.raises(TypeError):
        operation(PackedMask(pack(batch()), None))


STATEFUL = {
    "mamba2": dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, n_groups=1)
    | dict(state_size=8, chunk_size=8),
    "lfm2": GROUPED | dict(layer_types=["conv", "full_attention"], block_ff_dim=48),
    "qwen3_next": GROUPED
    | dict(layer_types=["linear_attention", "full_attention"], head_dim=8, linear_num_value_heads=2)
    | dict(linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=0),
    "bloom": dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4),
}


@pytest.mark.parametrize("kind, reason", {"mamba2": "state", "lfm2": "conv", "qwen3_next": "state"}.items())
def test_what_mixes_tokens_otherwise_is_known(kind, reason):
    model = build(kind, **STATEFUL[kind])
    assert reason in unshareable(model)
    inputs, messages = batch(), []
    shared = SharedPrompts(report=messages.append)
    shared.check(model, inputs, lambda rows: pytest.fail("no forward is needed"))
    assert shared.rows(model, inputs) is None and len(messages) == 1
    shared.check(model, inputs, lambda rows: pytest.fail("decided once"))
    with pytest.raises(ValueError, match="share_prompts=True"):
        SharedPrompts(is_required=True).check(model, inputs, None)


def layout(model, tmp_path, **options):
    """What a trainer makes of its configuration in the constructor."""
    from accelerate import Accelerator

    from trl_ext.preference.layout import Layout
    from trl_ext.preference.preference_config import PreferenceConfig

    own = {name: options.pop(name) for name in ("has_images",) if name in options}
    args = PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, share_prompts=True)
    for name, value in options.items():
        setattr(args, name, value)
    return Layout(args, model, Accelerator(cpu=True), **own)


@pytest.mark.parametrize(
    "kind, reason",
    {"mamba2": "state", "lfm2": "conv", "qwen3_next": "state", "bloom": "position_ids", "falcon": "ALiBi"}.items(),
)
def test_an_explicit_wish_is_refused_in_the_constructor(kind, reason, tmp_path):
    """Also for what only a forward tells; for LLaMA it is accepted, and its first batch is compared all the same."""
    options = STATEFUL.get(kind, dict(PLAIN, alibi=True))
    with pytest.raises(ValueError, match=f"`share_prompts=True` cannot be honored.*{reason}"):
        layout(build(kind, **options), tmp_path)


def test_what_only_a_forward_tells_is_refused_in_the_constructor(tmp_path):
    model = build("llama")
    made = layout(model, tmp_path)
    assert not made._prompts.is_decided(model)
    model.config.is_causal = False  # a mask of its own
    with pytest.raises(ValueError, match="share_prompts=True.*causal mask"):
        layout(model, tmp_path)
    model.config.is_causal = True
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, output: output + output.roll(1, dims=1))
    with pytest.raises(ValueError, match="share_prompts=True.*nats a token"):
        layout(model, tmp_path)


def test_ways_to_train_that_cut_rows_are_refused(tmp_path):
    for options, reason in (
        (dict(_n_gpu=2), "DataParallel"),
        (dict(has_images=True), "images"),
        (dict(torch_compile=True), "torch_compile"),
    ):
        with pytest.raises(ValueError, match=f"share_prompts=True.*{reason}"):
            layout(build("llama"), tmp_path, **options)


def test_both_static_checks_are_needed():
    """LFM2 is not "stateful"; RWKV names no layer types."""
    assert not build("lfm2", **STATEFUL["lfm2"])._is_stateful
    with torch.device("meta"):
        rwkv = AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", num_hidden_layers=1, hidden_size=32))
    assert not getattr(rwkv.config, "layer_types", None) and "state" in unshareable(rwkv)


def test_bloom_takes_no_positions():
    assert "position_ids" in unshareable(build("bloom", **STATEFUL["bloom"]))


def check(model, inputs, **options) -> tuple[SharedPrompts, list[str]]:
    messages = []
    shared = SharedPrompts(report=messages.append, **options)

    def log_probs(rows):
        scored = statistics(model, inputs, rows)
        return scored.log_probs[scored.mask]

    shared.check(model, inputs, log_probs)
    return shared, messages


def test_first_batch_decides():
    model, inputs = build("llama"), batch()
    shared, messages = check(model, inputs)
    assert not messages and torch.equal(shared.rows(model, inputs).expand, pack(inputs).expand)
    assert shared.rows(build("llama"), inputs) is None  # another model, not checked

    calls = []
    shared, messages = check(model, inputs, agree=lambda reason: calls.append(reason) or "of another process")
    assert calls == [None] and shared.rows(model, inputs) is None and "of another process" in messages[0]

    class Convolution(torch.nn.Module):
        """Mixes each token with the one before it, as no static check can know."""

        def forward(self, hidden):
            return hidden + 0.1 * torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]

    model.model.layers[0].mlp = Convolution()
    shared, messages = check(model, inputs)
    assert shared.rows(model, inputs) is None and "nats a token" in messages[0]
    with pytest.raises(ValueError, match="share_prompts=True.*nats a token"):
        check(model, inputs, is_required=True)


def test_models_that_change_the_mask_raise(monkeypatch):
    inputs = batch()
    rows = pack(inputs)
    model = build("llama")
    model.config.is_causal = False  # bidirectional
    with pytest.raises(NotShareable, match="causal mask"):
        statistics(model, inputs, rows)
    assert "causal mask" in check(model, inputs)[1][0]
    model = build("llama")
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda **kwargs: None)
    with pytest.raises(NotShareable, match="without the model's mask"):
        statistics(model, inputs, rows)


def test_registries_are_as_they_were():
    """After a forward, and after an exception in one; other forwards never notice."""
    model, inputs = build("llama"), batch()
    before = dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    expected = statistics(model, inputs)
    with pytest.raises(KeyboardInterrupt), packed_forward(pack(inputs)):
        raise KeyboardInterrupt
    statistics(model, inputs, pack(inputs))
    after = dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    assert after == before
    assert_equal_bits(statistics(model, inputs), expected)
    with pytest.raises(NotShareable, match="no attention mask"), packed_forward(pack(inputs)):
        pass


def test_llava_without_images(tmp_path):
    """Text pairs under a vision-language model; a batch with images is not packed by the trainer."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(tiny.save_vision(tmp_path), dtype=torch.float32).eval()
    add_scoring_head(model)
    inputs = batch()
    assert unshareable(model) is None
    assert_equal_bits(statistics(model, inputs, pack(inputs)), statistics(model, inputs))
