"""ChatGLM2 on transformers' own GLM against tensors that the original's code computed.

The golden files hold a tiny random checkpoint in the original's names and what the unmodified
original computes with it: logits, greedy tokens, losses, gradients; bare, under P-Tuning v2, and
under LoRA on the fused query_key_value. The tests run on stock SDPA and on the program's own
attention, on padded batches and through the token trie.
"""

import json
from itertools import pairwise

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GlmConfig, StaticCache

from llm_emo import attention, recipes
from llm_emo.convert import convert
from llm_emo.encoding import Encoded
from llm_emo.inference import generate
from llm_emo.methods import adapt, count_parameters, load_adapter, save_adapter
from llm_emo.models import auto, chatglm2, weights
from llm_emo.training import answer_loss, collate
from llm_emo.trie import TokenTrie, node_logits

LENGTHS = range(5)  # 1, 2, 7, 33, 120 tokens
PREFIXES = ["prefix", "prefix_projection"]
EXACT = 1e-5
"""What logits, losses and gradients on the original's own batches may differ by."""
REORDERED = 5e-5
"""What logits may differ by where sums are taken in another order than the original takes them: a
trie of other shape, or a single token behind a prefix. Logits reach 9.4, so it is 5e-6 of them."""

lengths = pytest.mark.parametrize("length", LENGTHS)
kinds = pytest.mark.parametrize("kind", PREFIXES)
implementations = pytest.mark.parametrize("implementation", ["sdpa", attention.NAME])


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "chatglm2"


@pytest.fixture(scope="module")
def cases(folder):
    return load_file(folder / "cases.safetensors")


@pytest.fixture(scope="module")
def lora_cases(folder):
    return load_file(folder / "lora_cases.safetensors")


@pytest.fixture(scope="module")
def layout(folder):
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    return chatglm2.Layout.from_original(config, folder / "checkpoint")


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    """The folder that `llm-emo convert` makes of the checkpoint."""
    output = tmp_path_factory.mktemp("chatglm2") / "native"
    convert(folder / "checkpoint", output, tokenizer=folder / "tokenizer" / "tokenizer.model")
    return output


@pytest.fixture
def base(converted):
    """Make the converted model as anybody would."""

    def make(implementation="sdpa"):
        return AutoModelForCausalLM.from_pretrained(
            converted, attn_implementation=implementation, trust_remote_code=False
        )

    return make


def to_native(state, layout):
    made = {}
    for name, tensor in state.items():
        made |= chatglm2.to_native(name, tensor, layout)
    return made


@pytest.fixture
def prefixed(base, cases):
    """Make the model under the golden P-Tuning v2 prefix."""

    def make(kind, model=None):
        made = adapt(model or base(attention.NAME), prefix_section(kind, cases))
        set_prefix(made, kind, cases)
        return made.eval()

    return make


def prefix_section(kind, cases):
    projected = kind == "prefix_projection"
    hidden = cases["prefix_projection.weights.transformer.prefix_encoder.trans.0.bias"].shape[0]
    return tiny.p_tuning(
        prefix_length=cases[f"{kind}.flat"].shape[0],
        projection=projected,
        projection_size=hidden if projected else None,
        projection_input="all" if projected else "layer",
    )


ENCODER = {"embedding": "embedding", "transform": "trans"}
"""PEFT's names of the prefix encoder's parts, and the original's."""


def set_prefix(model, kind, cases):
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            parameter.copy_(cases[f"{kind}.weights.{original_name(name)}"])


def original_name(name):
    part, _, rest = name.partition(".")
    return f"transformer.prefix_encoder.{ENCODER[part]}.{rest}"


# --- references ---------------------------------------------------------------------------------


def worst(own, golden):
    return float((own - golden).abs().max())


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def left_padded(cases):
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: cases[f"leftpad.{name}"] for name in names}


def prompts(cases):
    """The rows of the left-padded batch without their padding."""
    pairs = zip(cases["leftpad.input_ids"], cases["leftpad.attention_mask"], strict=True)
    return [tuple(ids[seen.bool()].tolist()) for ids, seen in pairs]


def training_rows(cases):
    """The training batch as the program has it: prompts, and answers as far as labels go."""
    made = []
    for ids, labels in zip(cases["train.input_ids"], cases["train.labels"], strict=True):
        at = (labels != -100).nonzero().flatten().tolist()
        assert all(b == a + 1 for a, b in pairwise(at)), "labels are one stretch"
        prompt, answer = ids[: at[0]], ids[at[0] : at[-1] + 1]
        made.append(Encoded(str(len(made)), tuple(prompt.tolist()), tuple(answer.tolist())))
    return made


def padded_loss(model, cases):
    return model(input_ids=cases["train.input_ids"], labels=cases["train.labels"]).loss


def trie_loss(model, cases):
    batch = collate(training_rows(cases))
    return answer_loss(model, batch) / len(batch["labels"])


losses = pytest.mark.parametrize("loss", [padded_loss, trie_loss])


def through_trie(model, sequences):
    """Logits of several sequences of one length in one pass, shape (B, L, V)."""
    trie = TokenTrie.build(sequences)
    with torch.no_grad():
        at_nodes = node_logits(model, trie, torch.arange(len(trie)))
    return at_nodes[trie.nodes]


# --- the model ----------------------------------------------------------------------------------


@implementations
@lengths
def test_logits_are_the_original_s(base, cases, implementation, length):
    own = logits(base(implementation), input_ids=cases[f"nopad.{length}.input_ids"])
    assert worst(own, cases[f"nopad.{length}.logits"]) <= EXACT


@lengths
def test_logits_through_the_trie_are_the_original_s(base, cases, length):
    own = through_trie(base(attention.NAME), cases[f"nopad.{length}.input_ids"].tolist())
    assert worst(own, cases[f"nopad.{length}.logits"]) <= REORDERED


@implementations
def test_left_padding_gives_the_original_s_logits(base, cases, implementation):
    own = logits(base(implementation), **left_padded(cases))
    seen = cases["leftpad.attention_mask"].bool()
    assert worst(own[seen], cases["leftpad.logits"][seen]) <= EXACT
    assert own.isfinite().all(), "nothing may leak out of the padding either"


@implementations
def test_greedy_tokens_are_the_original_s(base, cases, implementation):
    inputs = left_padded(cases)
    written = base(implementation).generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"],
        do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(written, cases["generate.sequences"])


def test_greedy_tokens_through_the_trie_are_the_original_s(base, cases):
    assert written_by_trie(base(attention.NAME), cases) == continuations(cases, "generate")


def written_by_trie(model, cases):
    found = dict(
        generate(model, prompts(cases), ends=frozenset(), max_new_tokens=40, tokens_per_pass=10_000)
    )
    return [list(found[row]) for row in range(len(found))]


def continuations(cases, name):
    written = cases[f"{name}.sequences"]
    return written[:, cases["leftpad.input_ids"].shape[1] :].tolist()


@losses
@implementations
def test_loss_and_gradients_are_the_original_s(base, cases, layout, implementation, loss):
    model = adapt(base(implementation), recipes.Full(kind="full")).train()
    value = loss(model, cases)
    assert abs(float(value.detach()) - float(cases["train.loss"])) <= EXACT
    value.backward()
    own = {name: p.grad for name, p in model.named_parameters()}
    golden = {
        name.removeprefix("train.grad."): tensor
        for name, tensor in cases.items()
        if name.startswith("train.grad.")
    }
    assert len(golden) == 3
    for name, tensor in to_native(golden, layout).items():
        assert worst(own[name], tensor) <= EXACT, name


def test_both_directions_keep_every_bit(folder, converted, tmp_path):
    convert(converted, tmp_path / "back", to="chatglm2")
    original = load_file(folder / "checkpoint" / "model.safetensors")
    back = load_checkpoint(tmp_path / "back")
    assert back.keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in back.items())


def load_checkpoint(folder):
    """Every tensor of a checkpoint folder, whatever its files are called."""
    state = {}
    for path in weights.files_of(folder)[0]:
        state |= weights.read(path)
    return state


# --- P-Tuning v2 --------------------------------------------------------------------------------


@kinds
def test_the_prefix_is_the_original_s(prefixed, cases, kind):
    assert worst(prefixed(kind).prefix().detach().flatten(1), cases[f"{kind}.flat"]) <= EXACT


@kinds
@lengths
def test_logits_behind_a_prefix_are_the_original_s(prefixed, cases, kind, length):
    ids, golden = cases[f"nopad.{length}.input_ids"], cases[f"{kind}.nopad.{length}.logits"]
    model = prefixed(kind)
    bound = EXACT if ids.shape[1] > 1 else REORDERED
    assert worst(logits(model, input_ids=ids), golden) <= bound
    assert worst(through_trie(model, ids.tolist()), golden) <= REORDERED


@kinds
def test_left_padding_behind_a_prefix_gives_the_original_s_logits(prefixed, cases, kind):
    own = logits(prefixed(kind), **left_padded(cases))
    seen = cases["leftpad.attention_mask"].bool()
    assert worst(own[seen], cases[f"{kind}.leftpad.logits"][seen]) <= EXACT
    assert own.isfinite().all()


@kinds
def test_greedy_tokens_behind_a_prefix_are_the_original_s_through_the_trie(prefixed, cases, kind):
    assert written_by_trie(prefixed(kind), cases) == continuations(cases, f"{kind}.generate")


@kinds
@pytest.mark.parametrize("kept", ["nothing", "dynamic", "static"])
def test_greedy_tokens_behind_a_prefix_are_the_original_s_with_any_cache(
    prefixed, cases, kind, kept
):
    """The cache, if there is one, holds tokens only: the prefix is not in it."""
    model = prefixed(kind)
    batch = left_padded(cases)
    ids, seen, positions = batch["input_ids"], batch["attention_mask"], batch["position_ids"]
    cache = {
        "nothing": None,
        "dynamic": DynamicCache(),
        "static": StaticCache(model.config, max_cache_len=ids.shape[1] + 40),
    }[kept]
    step, step_positions = ids, positions
    for _ in range(40):
        last = logits(
            model,
            input_ids=step,
            attention_mask=seen,
            position_ids=step_positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )[:, -1]
        token = last.argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        seen = torch.cat([seen, torch.ones_like(token)], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
        step, step_positions = (token, positions[:, -1:]) if cache else (ids, positions)
    assert torch.equal(ids, cases[f"{kind}.generate.sequences"])


@kinds
@losses
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_of_a_prefix_are_the_original_s(
    prefixed, cases, kind, loss, checkpointing
):
    model = prefixed(kind).train()
    runs = []
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        layer = model.base.get_decoder().layers[0].mlp
        layer.register_forward_pre_hook(lambda *_: runs.append(1))
    value = loss(model, cases)
    assert abs(float(value.detach()) - float(cases[f"{kind}.train.loss"])) <= EXACT
    value.backward()
    assert len(runs) == 2 * checkpointing, "one more forward pass of a layer if checkpointing"
    for name, parameter in model.encoder.named_parameters():
        golden = cases[f"{kind}.train.grad.{original_name(name)}"]
        bound = EXACT if loss is padded_loss else REORDERED
        assert worst(parameter.grad, golden) <= bound, name


@kinds
def test_a_saved_golden_prefix_comes_back_and_is_the_original_s(
    prefixed, base, cases, kind, tmp_path
):
    save_adapter(prefixed(kind), tmp_path)
    other = adapt(base(attention.NAME), prefix_section(kind, cases)).eval()
    load_adapter(other, tmp_path)
    own = logits(other, input_ids=cases["nopad.3.input_ids"])
    assert worst(own, cases[f"{kind}.nopad.3.logits"]) <= REORDERED


def four_bits(converted, dtype, *, written_out=False):
    section = recipes.Model(name=str(converted), revision=None, dtype=dtype, quantization="nf4")
    model = auto.load(section, tiny.lora()).model
    return model.dequantize(torch.float32) if written_out else model


@kinds
def test_a_prefix_on_a_four_bit_base_is_that_prefix_on_the_same_weights_written_out(
    prefixed, cases, converted, kind
):
    """In float32, NF4 differs from its own weights written out by the order of sums at most."""
    packed = prefixed(kind, four_bits(converted, "float32"))
    plain = prefixed(kind, four_bits(converted, "float32", written_out=True))
    for length in LENGTHS:
        ids = cases[f"nopad.{length}.input_ids"]
        golden = logits(plain, input_ids=ids)
        assert worst(logits(packed, input_ids=ids), golden) <= REORDERED
        # Two orders of sums differ here: the dequantised weights' and the trie's.
        assert worst(through_trie(packed, ids.tolist()), golden) <= 2 * REORDERED
        # What four bits cost is another matter, and a thousand times as much.
        assert worst(golden, cases[f"{kind}.nopad.{length}.logits"]) > 100 * REORDERED
    assert written_by_trie(packed, cases) == written_by_trie(plain, cases)


@kinds
@losses
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_prefix_on_a_four_bit_base_learns_as_on_the_same_weights_written_out(
    prefixed, cases, converted, kind, loss, checkpointing
):
    packed = prefixed(kind, four_bits(converted, "float32")).train()
    plain = prefixed(kind, four_bits(converted, "float32", written_out=True)).train()
    if checkpointing:
        packed.activation_checkpointing_enable({"use_reentrant": False})
    values = [loss(model, cases) for model in (packed, plain)]
    assert abs(float((values[0] - values[1]).detach())) <= EXACT
    for value in values:
        value.backward()
    assert worst(tiny.gradients(packed), tiny.gradients(plain)) <= EXACT


@kinds
def test_a_prefix_on_those_weights_learns_through_a_trie_as_on_padded_rows(
    prefixed, cases, converted, kind
):
    """In float64: gradients through these weights differ in float32 by more than 1e-5 as it is."""
    model = prefixed(kind, four_bits(converted, "float32", written_out=True)).double().train()
    gradients = []
    for loss in (trie_loss, padded_loss):
        model.zero_grad()
        loss(model, cases).backward()
        gradients.append(tiny.gradients(model))
    assert worst(*gradients) <= 1e-12


# --- LoRA on the fused query_key_value ----------------------------------------------------------

FUSED = "base_model.model.transformer.encoder.layers.{}.self_attention.query_key_value"
SPLIT = "base_model.model.model.layers.{}.self_attn.{}_proj"


@pytest.fixture
def tied(base, lora_cases, layout):
    """Make the model under LoRA with one A for q, k and v, as the golden training starts."""

    def make(implementation=attention.NAME, state=lora_cases, name="init.{}.lora_{}.default"):
        section = tiny.lora(rank=8, alpha=32.0, target_modules=recipes.QUERY_KEY_VALUE, tie_a=True)
        model = adapt(base(implementation), section)
        own = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for layer in range(layout.layers):
                fused = FUSED.format(layer)
                a, b = (state[name.format(fused, half) + ".weight"] for half in "AB")
                for part, piece in zip("qkv", b.split(chatglm2.split_rows(layout)), strict=True):
                    at = SPLIT.format(layer, part)
                    own[f"{at}.lora_A.default.weight"].copy_(a)
                    own[f"{at}.lora_B.default.weight"].copy_(piece)
        return model

    return make


@pytest.fixture
def trained(tied, folder):
    """Make the model under the trained golden adapter, fused in the file, split here."""
    state = load_file(folder / "lora_adapter_fused" / "adapter_model.safetensors")
    return lambda: tied(state=state, name="{}.lora_{}").eval()


def sgd(model, loss, cases, steps):
    """Losses of the golden training: plain SGD with learning rate 0.05."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    values = []
    for _ in range(steps):
        value = loss(model, cases)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(float(value.detach()))
    return torch.tensor(values, dtype=torch.float64)


@losses
@implementations
def test_one_a_for_all_three_learns_what_lora_on_the_fused_layer_learns(
    tied, cases, lora_cases, implementation, loss
):
    """The first losses are equal; from then on this training doubles each rounding every step.

    So the golden trail, which was computed in float32, is held against one in float64, which leaves
    its own roundings alone, and the float32 one against that one and, in the first steps, both.
    """
    golden = lora_cases["losses"].double()
    own = sgd(tied(implementation), loss, cases, len(golden))
    finer = sgd(tied(implementation).double(), loss, cases, len(golden))
    assert worst(own[:5], golden[:5]) <= EXACT
    steps = torch.arange(len(golden), dtype=torch.float64)
    assert ((finer - golden).abs() <= EXACT * 1.5**steps).all()
    assert ((own - finer).abs() <= EXACT * 2.0**steps).all()


def test_a_separate_a_for_each_learns_something_else(tied, cases, lora_cases):
    model = tied()
    for name, module in model.named_modules():
        if name.endswith(("k_proj.lora_A.default", "v_proj.lora_A.default")):
            module.weight = nn.Parameter(module.weight.detach().clone())
    own = sgd(model, padded_loss, cases, 5)
    assert worst(own, lora_cases["losses"][:5]) > 100 * EXACT


def test_the_trained_fused_adapter_gives_its_logits_when_split(trained, cases, lora_cases):
    own = logits(trained(), **left_padded(cases))
    seen = cases["leftpad.attention_mask"].bool()
    assert worst(own[seen], lora_cases["leftpad.logits"][seen]) <= EXACT


def test_the_split_adapter_merges_into_the_fused_adapter_s_weights(trained, lora_cases, layout):
    merged = trained().merge_and_unload().state_dict()
    golden = {k.removeprefix("merged."): v for k, v in lora_cases.items() if "merged." in k}
    assert len(golden) == 2 * layout.layers
    for name, tensor in to_native(golden, layout).items():
        assert worst(merged[name], tensor) <= EXACT, name


def test_the_split_adapter_fuses_into_the_file_it_came_from(trained, folder, layout, tmp_path):
    """Equal A: one of them, and the rows of B put together again, bit for bit."""
    save_adapter(trained(), tmp_path)
    split = load_file(tmp_path / "adapter_model.safetensors")
    fused = load_file(folder / "lora_adapter_fused" / "adapter_model.safetensors")
    for layer in range(layout.layers):
        at = [SPLIT.format(layer, part) for part in "qkv"]
        for part in at:
            a = split[f"{part}.lora_A.weight"]
            assert torch.equal(a, fused[f"{FUSED.format(layer)}.lora_A.weight"])
        b = torch.cat([split[f"{part}.lora_B.weight"] for part in at])
        assert torch.equal(b, fused[f"{FUSED.format(layer)}.lora_B.weight"])


# --- ChatGLM2-6B's own size, without its weights ------------------------------------------------


@pytest.fixture
def six_b():
    """The 6B model on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            GlmConfig(**chatglm2.CHATGLM2_6B.native_config()), dtype=torch.bfloat16
        )


@pytest.mark.parametrize(
    ("section", "trainable"),
    [
        (tiny.lora(rank=8, target_modules=recipes.QUERY_KEY_VALUE), 3_784_704),
        (tiny.lora(rank=8, target_modules=recipes.QUERY_KEY_VALUE, tie_a=True), 1_949_696),
        (tiny.p_tuning(prefix_length=32), 458_752),
        (
            tiny.p_tuning(
                prefix_length=32, projection=True, projection_size=4096, projection_input="all"
            ),
            # embedding 32 x 14336, two matrices 14336 x 4096, their biases
            32 * 14336 + 2 * 14336 * 4096 + 4096 + 14336,
        ),
    ],
)
def test_the_6b_model_has_the_parameters_that_are_reported_of_it(six_b, section, trainable):
    assert count_parameters(six_b).total == 6_243_584_000
    count = count_parameters(adapt(six_b, section))
    assert count.trainable == trainable
    assert count.total == 6_243_584_000 + trainable
