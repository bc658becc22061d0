"""Sentence classifiers over encoders, and their features."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BartConfig,
    BertConfig,
    CLIPConfig,
    DebertaV2Config,
    ElectraConfig,
    FNetConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from llm_emo.baselines import encoder, storage
from llm_emo.baselines.settings import EncoderSettings
from llm_emo.errors import ModelError

SETTINGS = EncoderSettings(max_length=12, dropout=0.0)
WORDS = [
    "[PAD]",
    "[CLS]",
    "[SEP]",
    "[UNK]",
    "so",
    "sad",
    "glad",
    "we",
    "are",
    "cls",
    "sep",
    "[",
    "]",
]
TEXTS = ["so sad", "we are glad", "so", "we are so so so glad", "sad we are", "glad", "are we", ""]


def tokenizer(*, cls=True, pad="[PAD]", longest=16):
    backend = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if cls:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, sep_token="[SEP]", unk_token="[UNK]",
        cls_token="[CLS]", model_max_length=longest,
    )  # fmt: skip


SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 5,
    "num_attention_heads": 2, "intermediate_size": 24, "pad_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
CONFIGS = {
    "bert": lambda **c: BertConfig(**SIZES | c),
    "roberta": lambda **c: RobertaConfig(**SIZES | {"max_position_embeddings": 40} | c),
    "electra": lambda **c: ElectraConfig(**SIZES | {"embedding_size": 16} | c),
    "deberta-v2": lambda **c: DebertaV2Config(**SIZES | c),
}
MODERN = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2,
    "intermediate_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
FEW = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
OTHERS = {
    "modernbert": lambda **c: ModernBertConfig(**MODERN | c),
    "gpt2": lambda: GPT2Config(n_embd=16, n_layer=5, n_head=2, n_positions=40, **FEW),
    "llama": lambda: LlamaConfig(**SIZES | FEW | {"num_key_value_heads": 2}),
    "bert as a decoder": lambda: BertConfig(**SIZES, is_decoder=True),
    "t5": lambda: T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=5, num_heads=2, **FEW | {"eos_token_id": 1}
    ),
    "bart": lambda: BartConfig(
        d_model=16, encoder_layers=5, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        max_position_embeddings=40, **FEW | {"eos_token_id": 1},
    ),
    "fnet": lambda: FNetConfig(**SIZES),
    "clip": lambda: CLIPConfig(
        text_config=SIZES | {"eos_token_id": 2},
        vision_config=SIZES | {"image_size": 8, "patch_size": 4},
    ),
}  # fmt: skip
each_encoder = pytest.mark.parametrize("kind", CONFIGS)
each_pooling = pytest.mark.parametrize("pooling", ["first", "mean"])


def save(folder, kind="bert", *, cls=True, pad="[PAD]", longest=16, **changes):
    torch.manual_seed(0)
    config = (CONFIGS | OTHERS)[kind](**changes)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer(cls=cls, pad=pad, longest=longest).save_pretrained(folder)
    return str(folder)


def made(folder, pooling="first", classes=3):
    """Return a classifier over the encoder in a folder, and its tokenizer."""
    base, tokens = encoder.load(str(folder), SETTINGS, pooling)
    return encoder.network(base, SETTINGS, pooling, classes=classes), tokens


def extracted(model, tokens, texts, budget=1000):
    """Return features and probabilities of texts, in passes of at most so many tokens."""
    ids = encoder.tokenize(tokens, texts, 12)
    whole = encoder.extract(model, ids, padding=0, tokens_per_pass=budget)
    return np.split(whole, [encoder.width(model)], axis=1)


@pytest.fixture
def loaded(tmp_path):
    return made(save(tmp_path / "encoder"))


@each_encoder
def test_features_are_cls_of_the_last_four_layers_in_their_order(kind, tmp_path):
    model, tokens = made(save(tmp_path, kind))
    found, _ = extracted(model, tokens, TEXTS)
    assert found.shape == (len(TEXTS), 4 * 16)
    assert found.dtype == np.float32
    ids = torch.tensor([encoder.tokenize(tokens, ["we are glad"], 12)[0]])
    assert ids[0, 0] == 1
    with torch.no_grad():
        states = model.encoder(ids, output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer][0, 0] for layer in (2, 3, 4, 5)])
    assert torch.allclose(torch.from_numpy(found[1]), expected, atol=1e-5)


@each_encoder
def test_features_are_the_mean_over_the_tokens_of_the_last_layer(kind, tmp_path):
    model, tokens = made(save(tmp_path, kind), "mean")
    found, _ = extracted(model, tokens, TEXTS)
    ids = torch.tensor([encoder.tokenize(tokens, ["we are glad"], 12)[0]])
    with torch.no_grad():
        expected = model.encoder(ids).last_hidden_state[0].mean(0)
    assert torch.allclose(torch.from_numpy(found[1]), expected, atol=1e-5)


@each_pooling
@each_encoder
def test_beside_the_features_stand_the_probabilities_of_the_classes(kind, pooling, tmp_path):
    model, tokens = made(save(tmp_path, kind), pooling)
    _, probabilities = extracted(model, tokens, TEXTS)
    ids, mask = encoder.pad(encoder.tokenize(tokens, TEXTS, 12), 0)
    expected = model.eval()(ids, mask).softmax(1).detach().numpy()
    assert probabilities.shape == (len(TEXTS), 3)
    assert np.allclose(probabilities, expected, atol=1e-5)


@each_pooling
@each_encoder
def test_features_depend_on_the_text_alone(kind, pooling, tmp_path):
    model, tokens = made(save(tmp_path, kind), pooling)
    whole, scores = extracted(model, tokens, TEXTS)
    turned, turned_scores = extracted(model, tokens, TEXTS[::-1], budget=10)
    assert np.allclose(whole, turned[::-1], atol=1e-5)
    assert np.allclose(scores, turned_scores[::-1], atol=1e-5)
    assert not np.allclose(whole[0], whole[1], atol=1e-3)


@each_pooling
def test_running_texts_of_like_length_together_changes_no_score(pooling, tmp_path, monkeypatch):
    model, tokens = made(save(tmp_path), pooling)
    rows = encoder.tokenize(tokens, ["glad", *["so " * n for n in (9, 1, 5)], *TEXTS], 12)
    ids, mask = encoder.pad(rows, 0)
    seen = []
    run = model.encoder.forward

    def counted(input_ids, **arguments):
        seen.append(input_ids)
        return run(input_ids=input_ids, **arguments)

    monkeypatch.setattr(model.encoder, "forward", counted)
    apart = model.eval()(ids, mask)
    assert sum(part.numel() for part in seen) < ids.numel()
    assert sum(len(part) for part in seen) == len(rows)
    monkeypatch.setattr(encoder, "ROWS", 100)
    together = model(ids, mask)
    assert seen[-1].shape == ids.shape
    torch.testing.assert_close(apart, together, atol=1e-6, rtol=1e-5)


@each_pooling
def test_features_are_taken_without_dropout(pooling, tmp_path):
    model, tokens = made(save(tmp_path, hidden_dropout_prob=0.5), pooling)
    one, two = (extracted(model.train(), tokens, TEXTS)[0] for _ in range(2))
    assert np.array_equal(one, two)


@each_pooling
@each_encoder
def test_every_parameter_gets_a_gradient(kind, pooling, tmp_path):
    model, tokens = made(save(tmp_path, kind), pooling)
    ids, mask = encoder.pad(encoder.tokenize(tokens, TEXTS, 12), 0)
    torch.nn.functional.cross_entropy(model(ids, mask), torch.arange(8) % 3).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


def overfits(model, ids, mask, labels):
    """Whether at most 500 steps on the same rows get all of them right."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0)
    for _ in range(500):
        optimizer.zero_grad()
        logits = model(ids, mask)
        if (logits.argmax(1) == labels).all():
            return True
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    return False


@each_pooling
@each_encoder
def test_it_overfits_32_rows(kind, pooling, tmp_path):
    model, tokens = made(save(tmp_path, kind), pooling, classes=4)
    words = ["so", "sad", "glad", "we", "are"]
    texts = [f"{a} {b}" for a in words for b in words] + [f"{a} so sad" for a in words]
    texts += ["we are glad", "so so so"]
    ids, mask = encoder.pad(encoder.tokenize(tokens, texts, 12), 0)
    assert overfits(model, ids, mask, torch.arange(32) % 4)


def test_the_head_has_roberta_s_parameters(loaded):
    model, _ = loaded
    own = sum(p.numel() for p in model.parameters())
    inner = sum(p.numel() for p in model.encoder.parameters())
    assert own - inner == 16 * 16 + 16 + 16 * 3 + 3


def test_saved_and_loaded_it_gives_the_same_bits(loaded, tmp_path):
    model, tokens = loaded
    ids, mask = encoder.pad(encoder.tokenize(tokens, TEXTS, 12), 0)
    storage.save_weights(tmp_path / "stage1.safetensors", model.eval())
    torch.manual_seed(5)
    again, _ = made(tmp_path / "encoder")
    assert not torch.equal(again.eval()(ids, mask), model(ids, mask))
    storage.load_weights(tmp_path / "stage1.safetensors", again)
    assert torch.equal(again(ids, mask), model(ids, mask))


def test_control_tokens_in_a_text_are_text(loaded):
    _, tokens = loaded
    [ids] = encoder.tokenize(tokens, ["so [SEP] sad [CLS]"], 12)
    assert ids.count(1) == 1
    assert ids.count(2) == 1


def test_what_is_too_long_loses_its_end(loaded):
    _, tokens = loaded
    [ids] = encoder.tokenize(tokens, ["so " * 40 + "sad"], 12)
    assert len(ids) == 12
    assert (ids[0], ids[-1]) == (1, 2)


def test_passes_keep_to_the_budget_and_hold_every_row_once():
    lengths = [3, 9, 1, 4, 4, 30, 2]
    order = sorted(range(7), key=lambda row: lengths[row])
    passes = encoder._passes(order, lengths, 12)
    assert sorted(row for batch in passes for row in batch) == list(range(7))
    for batch in passes:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 12
    assert len(passes) == 4


def test_no_texts_have_no_features(loaded):
    model, tokens = loaded
    assert extracted(model, tokens, [])[0].shape == (0, 64)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_hidden_layers": 3}, "has 3 layers"),
        ({"cls": False}, "no classification token"),
    ],
)
def test_an_encoder_without_these_features_is_refused(how, message, tmp_path):
    folder = save(tmp_path, **how)
    with pytest.raises(ModelError, match=message):
        made(folder)
    made(folder, "mean")  # it needs neither


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    # transformers would fill them with random numbers, and train on.
    folder = Path(save(tmp_path))
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layer.2.output.dense.weight"))
    save_file(
        {name: value for name, value in weights.items() if name != lost},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match=f"lacks 1 of the encoder's tensors, such as .*{lost}"):
        made(folder)


@each_pooling
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gpt2", "GPT2Model is a decoder, .*expected an encoder"),
        ("llama", "LlamaModel is a decoder"),
        ("bert as a decoder", "BertModel is a decoder"),
        ("t5", "type t5 is an encoder with a decoder behind it; expected an encoder alone"),
        ("bart", "type bart is an encoder with a decoder behind it"),
        ("fnet", "FNetModel reads padding as text"),
        ("clip", "CLIPModel cannot be run on token ids and their mask"),
    ],
)
def test_what_gives_no_state_of_a_whole_text_is_refused(kind, message, pooling, tmp_path):
    with pytest.raises(ModelError, match=rf"(?s){tmp_path}: .*{message}.*take an encoder such as"):
        made(save(tmp_path, kind), pooling)


@each_pooling
def test_a_tokenizer_without_padding_is_refused(pooling, tmp_path):
    with pytest.raises(ModelError, match=r"no padding token.*pad_token in tokenizer_config\.json"):
        made(save(tmp_path, pad=None), pooling)


UNKNOWN = 10**30
"""The longest text of a tokenizer that names none."""


@pytest.mark.parametrize(
    ("kind", "changes", "most"),
    [
        ("bert", {}, 16),  # the tokenizer's own word
        ("bert", {"longest": UNKNOWN, "max_position_embeddings": 20}, 20),
        ("bert", {"longest": 24, "max_position_embeddings": 20}, 20),
        ("electra", {"longest": UNKNOWN, "max_position_embeddings": 20}, 20),
        # Positions are counted from behind the padding id.
        ("roberta", {"longest": UNKNOWN, "max_position_embeddings": 20}, 19),
        ("roberta", {"longest": UNKNOWN, "max_position_embeddings": 20, "pad_token_id": 1}, 18),
        ("deberta-v2", {"longest": UNKNOWN, "max_position_embeddings": 20,
                        "relative_attention": True}, 20),
        ("modernbert", {"longest": UNKNOWN, "max_position_embeddings": 20}, 20),
    ],
)  # fmt: skip
def test_a_length_beyond_the_encoder_s_is_refused(kind, changes, most, tmp_path):
    folder = save(tmp_path, kind, **changes)
    fits = EncoderSettings(max_length=most, dropout=0.0)
    base, tokens = encoder.load(folder, fits, "mean")
    rows = encoder.tokenize(tokens, ["so " * 50], most)
    assert len(rows[0]) == most
    model = encoder.network(base, fits, "mean", classes=3)
    assert encoder.extract(model, rows, padding=0, tokens_per_pass=9).shape == (1, 16 + 3)
    more = EncoderSettings(max_length=most + 1, dropout=0.0)
    message = f"max_length is {most + 1}, but it reads at most {most} tokens"
    with pytest.raises(ModelError, match=message):
        encoder.load(folder, more, "mean")


def test_relative_positions_alone_set_no_limit(tmp_path):
    folder = save(
        tmp_path, "deberta-v2", longest=UNKNOWN, max_position_embeddings=20,
        relative_attention=True, position_biased_input=False, pos_att_type=["c2p", "p2c"],
    )  # fmt: skip
    longer = EncoderSettings(max_length=60, dropout=0.0)
    base, tokens = encoder.load(folder, longer, "first")
    rows = encoder.tokenize(tokens, ["so " * 80], 60)
    model = encoder.network(base, longer, "first", classes=3)
    found = encoder.extract(model, rows, padding=0, tokens_per_pass=9)
    assert len(rows[0]) == 60
    assert np.isfinite(found).all()


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"no folder with a config.json.*minilm-l6"):
        made(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded as an encoder"):
        made(tmp_path)


@pytest.mark.slow
def test_minilm_gives_1536_features():
    model, tokens = made("minilm-l6", classes=7)
    texts = ["I am so glad!", "I am so happy!", "The invoice is attached."]
    found, _ = extracted(model, tokens, texts)
    assert found.shape == (3, 4 * 384)
    near, far = (np.linalg.norm(found[0] - other) for other in found[1:])
    assert near < far
