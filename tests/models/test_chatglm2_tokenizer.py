import functools
import json
import shutil
import subprocess
import sys

import chatglm2_tokens
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from llm_emo.encoding import Encoder
from llm_emo.errors import ModelError, PromptError
from llm_emo.models import chatglm2_tokenizer

ATTRIBUTES = (
    "split_special_tokens", "padding_side", "clean_up_tokenization_spaces", "chat_template",
    "model_input_names", "unk_token_id", "pad_token_id", "bos_token_id", "eos_token_id",
    "all_special_ids", "vocab_size",
)  # fmt: skip


build = functools.cache(chatglm2_tokenizer.build)


@pytest.fixture(scope="module", params=["toy", "real"])
def file(request, tmp_path_factory):
    """A tokenizer.model: one of ours, and the real one where it is."""
    if request.param == "real":
        return request.getfixturevalue("shared_data") / "chatglm2" / "tokenizer" / "tokenizer.model"
    return chatglm2_tokens.write_model(tmp_path_factory.mktemp("toy") / "tokenizer.model")


@pytest.fixture(scope="module")
def tokenizer(file):
    return build(file)


@pytest.fixture(scope="module")
def original(file):
    """What the original wraps."""
    return SentencePieceProcessor(model_file=str(file))


@pytest.fixture(scope="module")
def saved(file, tokenizer, tmp_path_factory):
    """A folder as `convert` leaves it: a native config, and the original file beside."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(folder)
    tiny.config("glm").save_pretrained(folder)
    shutil.copyfile(file, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def cases(shared_data):
    lines = (shared_data / "chatglm2" / "tokenizer" / "cases.jsonl").read_text("utf-8")
    return [json.loads(line) for line in lines.splitlines()]


@pytest.fixture(scope="module")
def real(shared_data):
    return build(shared_data / "chatglm2" / "tokenizer" / "tokenizer.model")


SPELLINGS = (
    "[gMASK]", "[MASK]", "[sMASK]", "sop", "eop", "<sop>", "<eop>", "</s>", "<s>", "<unk>",
    "<pad>", "<bos>", "<eos>", "<0x0A>", "<0xFF>", "[Round 1]", "问：", "答：", "<|user|>",
)  # fmt: skip
PARTS = [part for s in SPELLINGS for part in (s[: len(s) // 2], s[len(s) // 2 :], s[:-1], s[1:])]
NEIGHBOURS = ["[", "]", "<", ">", " ", "  ", "\n", "\t", "\r\n", "▁", "\0", "😀", "好", "a", "1"]
hostile = st.lists(st.sampled_from([*SPELLINGS, *PARTS, *NEIGHBOURS]), max_size=10).map("".join)
# Runs of one character are where an order of merges could show; whole Unicode, the bytes.
runs = st.lists(
    st.tuples(st.sampled_from(" ▁a=-.哈0\n😀"), st.integers(1, 20)).map(
        lambda run: run[0] * run[1]
    ),
    max_size=4,
).map("".join)
texts = hostile | runs | st.text(max_size=40)
many = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def controls(tokenizer):
    """The ids that text must never have: <unk>, <s>, </s> and everything behind the pieces."""
    return {0, 1, 2, *range(tokenizer.vocab_size, tokenizer.vocab_size + 300)}


def leading(tokenizer):
    return tokenizer.convert_tokens_to_ids(["[gMASK]", "sop"])


# --- the ids of the original -------------------------------------------------------------------


def test_every_recorded_text_has_the_recorded_ids_alone_and_in_a_batch(real, cases):
    assert len(cases) == 2020
    batch = real([case["text"] for case in cases], add_special_tokens=False)["input_ids"]
    assert batch == [case["ids"] for case in cases]
    assert [real.encode(case["text"], add_special_tokens=False) for case in cases] == batch


def test_every_recorded_text_comes_back(real, cases):
    for case in cases:
        assert real.decode(case["ids"]) == case["text"].replace("▁", " ")


def test_every_recorded_text_stands_in_a_prompt_as_the_original_has_it(real, cases, shared_data):
    original = SentencePieceProcessor(
        model_file=str(shared_data / "chatglm2" / "tokenizer" / "tokenizer.model")
    )
    examples = [tiny.example(case["text"], answer=case["text"]) for case in cases]
    for example, encoded, case in zip(
        examples, Encoder(real, 10**6).encode(examples), cases, strict=True
    ):
        asked = original.encode(f"[Round 1]\n\n问：{example.message}\n\n答：")
        assert encoded.prompt == (64790, 64792, *asked)
        assert encoded.answer == (*case["ids"], 2)


def test_the_specials_have_the_ids_of_the_original(tokenizer):
    first = tokenizer.vocab_size
    names = ["<unk>", "<s>", "</s>", "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
    ids = [0, 1, 2, *range(first, first + 5)]
    assert tokenizer.convert_tokens_to_ids(names) == ids
    assert sorted(tokenizer.all_special_ids) == ids
    assert len(tokenizer) == first + 5
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id) == (0, 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_the_real_specials_follow_64789_pieces(real):
    assert real.convert_tokens_to_ids(["[gMASK]", "sop"]) == [64790, 64792]
    assert real.vocab_size == chatglm2_tokenizer.PIECES == 64789


@given(text=texts)
@many
def test_any_text_has_the_ids_that_sentencepiece_gives(tokenizer, original, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == original.encode(text)


@given(text=texts)
@many
def test_any_text_comes_back_as_sentencepiece_gives_it_back(tokenizer, original, text):
    ids = tokenizer(text)["input_ids"]
    shown = tokenizer.decode(ids, skip_special_tokens=True)
    assert shown == original.decode(original.encode(text))
    assert shown == text.replace("▁", " ")


# --- no control token from text ----------------------------------------------------------------


@given(text=hostile)
@many
def test_text_never_becomes_a_control_token(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert controls(tokenizer).isdisjoint(ids)
    assert tokenizer(text)["input_ids"] == [*leading(tokenizer), *ids]


@given(text=hostile, turn=hostile, word=hostile, system=st.none() | hostile)
@many
def test_no_part_of_an_example_becomes_a_control_token(tokenizer, text, turn, word, system):
    example = tiny.example(text, history=(turn,), answer=word, system=system)
    [encoded] = Encoder(tokenizer, 10**6).encode([example])
    assert list(encoded.prompt[:2]) == leading(tokenizer)
    assert controls(tokenizer).isdisjoint(encoded.prompt[2:])
    assert controls(tokenizer).isdisjoint(encoded.answer[:-1])
    assert encoded.answer[-1] == 2


@given(text=st.text(max_size=40))
@many
def test_no_character_is_unknown(tokenizer, text):
    assert 0 not in tokenizer(text)["input_ids"]


# --- prompts, answers, chats -------------------------------------------------------------------


@given(text=texts, word=texts)
@many
def test_an_example_has_the_ids_that_the_original_trains_on(tokenizer, original, text, word):
    example = tiny.example(text, answer=word)
    encoder = Encoder(tokenizer, 10**6)
    [encoded] = encoder.encode([example])
    asked = f"[Round 1]\n\n问：{example.message}\n\n答："
    assert list(encoded.prompt) == leading(tokenizer) + original.encode(asked)
    # Tokenised apart, so that an answer begins with the mark of a word's beginning.
    assert list(encoded.answer) == [*original.encode(word), 2]
    if word:  # transformers takes an empty second text for none
        assert tokenizer(asked, word)["input_ids"] == [*encoded.prompt, *encoded.answer]
    assert encoder.decode(encoded.answer) == word.replace("▁", " ")


def test_an_answer_begins_with_the_mark_of_a_word(tokenizer):
    [answer] = Encoder(tokenizer, 512).answers(["高兴"])
    assert tokenizer.convert_ids_to_tokens(answer[0]).startswith("▁")


def test_a_chat_is_rounds_of_questions_and_answers(tokenizer):
    turns = [
        {"role": "user", "content": "Are you sad? "},
        {"role": "assistant", "content": "[gMASK]"},
        {"role": "user", "content": "为什么"},
    ]
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert asked == (
        "[Round 1]\n\n问：Are you sad? \n\n答：[gMASK]\n\n[Round 2]\n\n问：为什么\n\n答："
    )
    for count in (1, 2, 3):
        part = tokenizer.apply_chat_template(turns[:count], tokenize=False)
        assert asked.startswith(part)
    ids = tokenizer(asked)["input_ids"]
    assert ids[:2] == leading(tokenizer)
    assert controls(tokenizer).isdisjoint(ids[2:])


def test_a_system_turn_opens_the_first_question_and_no_other(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    said = tokenizer.apply_chat_template(turns, tokenize=False)
    assert said == "[Round 1]\n\n问：Be brief.\n\na\n\n答：b\n\n[Round 2]\n\n问：c"
    [encoded] = Encoder(tokenizer, 512).encode([tiny.example("late", system="Be brief.")])
    assert "问：Be brief.\n\nClassify" in tokenizer.decode(encoded.prompt)


@pytest.mark.parametrize(
    "roles", [["assistant"], ["user", "user"], ["user", "system"], ["user", "tool"]]
)
def test_turns_that_the_format_cannot_show_are_refused(tokenizer, roles):
    turns = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(Exception, match="ChatGLM2 takes"):
        tokenizer.apply_chat_template(turns, tokenize=False)


def test_the_answer_ends_with_eos_and_generated_specials_are_not_shown(tokenizer):
    encoder = Encoder(tokenizer, 512)
    assert encoder.end == 2
    [answer] = encoder.answers(["joy"])
    beyond = tokenizer.vocab_size + 100  # a padded embedding has rows that are no token
    assert encoder.decode([*leading(tokenizer), *answer, 0, 1, beyond]) == "joy"


def test_a_batch_is_padded_on_the_left_and_fits_the_model(tokenizer):
    batch = tokenizer(["late", "the train was late again"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    ids, mask = batch["input_ids"][0], batch["attention_mask"][0]
    gap = int((mask == 0).sum())
    assert gap > 0
    assert ids[:gap].tolist() == [0] * gap
    assert ids[gap:].tolist() == tokenizer("late")["input_ids"]
    assert mask.tolist() == [0] * gap + [1] * (len(ids) - gap)
    model = tiny.model("glm", vocab_size=len(tokenizer))
    assert model.generate(**batch, max_new_tokens=2).shape[1] <= len(ids) + 2


# --- shortening --------------------------------------------------------------------------------

LONG = "今天的火车又晚点了😀👩‍👧🇨🇳龘𠮷é, so I was late. [gMASK]</s>" * 4


@given(max_length=st.integers(60, 320), history=st.booleans())
@settings(max_examples=40, deadline=None)
def test_only_the_user_s_text_is_shortened_and_only_between_characters(
    tokenizer, max_length, history
):
    encoder, unlimited = Encoder(tokenizer, max_length), Encoder(tokenizer, 10**6)
    example = tiny.example(LONG, history=("甲：😀你好\n",) if history else ())
    try:
        [encoded] = encoder.encode([example])
    except PromptError:
        [least] = unlimited.encode([tiny.example(LONG[:1])])
        assert len(least.prompt) + len(least.answer) > max_length
        return
    assert len(encoded.prompt) + len(encoded.answer) <= max_length
    [whole] = unlimited.encode([example])
    assert (encoded.dropped > 0) == (len(whole.prompt) + len(whole.answer) > max_length)
    kept = example if not encoded.dropped else tiny.example(LONG)  # the history goes first
    kept = kept.message[: len(example.message) - encoded.dropped]
    assert list(encoded.prompt) == tokenizer(f"[Round 1]\n\n问：{kept}\n\n答：")["input_ids"]
    assert encoded.answer == unlimited.answers(["anger"])[0]
    assert "\ufffd" not in tokenizer.decode(encoded.prompt)


# --- saved and loaded --------------------------------------------------------------------------


def test_a_loaded_tokenizer_is_the_same_in_everything(tokenizer, saved, tmp_path):
    loaded = AutoTokenizer.from_pretrained(saved, trust_remote_code=False)
    loaded.save_pretrained(tmp_path)  # and once more, without config and original file
    for twin in (loaded, AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)):
        for name in ATTRIBUTES:
            assert getattr(twin, name) == getattr(tokenizer, name), name
        assert twin.get_vocab() == tokenizer.get_vocab()
        assert twin.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        for text in (*chatglm2_tokens.SENTENCES, *SPELLINGS, LONG, ""):
            assert twin(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert Encoder(twin, 64).fingerprint() == Encoder(tokenizer, 64).fingerprint()


def test_a_loaded_tokenizer_has_the_recorded_ids(real, cases, tmp_path):
    real.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    batch = loaded([case["text"] for case in cases], add_special_tokens=False)["input_ids"]
    assert batch == [case["ids"] for case in cases]


def test_loading_needs_no_sentencepiece(tmp_path):
    tokenizer = build(chatglm2_tokens.write_model(tmp_path / "tokenizer.model"))
    tokenizer.save_pretrained(tmp_path)
    script = (
        "import sys, json; sys.modules['sentencepiece'] = None\n"
        "from transformers import AutoTokenizer\n"
        f"t = AutoTokenizer.from_pretrained({str(tmp_path)!r}, trust_remote_code=False)\n"
        "print(json.dumps([type(t).__name__, t('答：[gMASK] sop')['input_ids']]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    kind, ids = json.loads(done.stdout.splitlines()[-1])
    assert kind == type(tokenizer).__name__
    assert ids == tokenizer("答：[gMASK] sop")["input_ids"]


def test_a_fingerprint_tells_vocabularies_and_settings_apart(tokenizer, saved, tmp_path):
    own = Encoder(tokenizer, 64).fingerprint()
    other = chatglm2_tokens.write_model(tmp_path / "tokenizer.model", seed=1)
    assert (
        Encoder(chatglm2_tokenizer.build(other), 64).fingerprint()["tokenizer"] != own["tokenizer"]
    )
    loose = AutoTokenizer.from_pretrained(saved, split_special_tokens=False)
    assert Encoder(loose, 64).fingerprint()["template"] != own["template"]


# --- other files -------------------------------------------------------------------------------


def refused(path):
    with pytest.raises(ModelError) as caught:
        chatglm2_tokenizer.build(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_an_absent_file_is_named(tmp_path):
    assert "No such file" in refused(tmp_path / "tokenizer.model")
    assert "directory" in refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a whole SentencePiece model"),
        (b"{}", "not a whole SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"IQ== 0\nIg== 1\n", "GLM-4"),
    ],
)
def test_a_file_that_is_no_sentencepiece_model_is_named_as_what_it_is(content, said, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    assert said in refused(path)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    whole = chatglm2_tokens.write_model(tmp_path / "whole.model")
    content, path = whole.read_bytes(), tmp_path / "tokenizer.model"
    pieces = SentencePieceProcessor(model_file=str(whole))
    # Where a field ends the rest parses: a model with fewer pieces, or without its settings.
    ends = [content.index(f"{pieces.id_to_piece(i)}\x15".encode()) - 4 for i in (100, 300)]
    for end in (*ends, *range(len(content) - 8, 0, -211)):
        path.write_bytes(content[:end])
        refused(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"user_defined_symbols": ["<n>", "<|tab|>"]}, "ChatGLM-1"),
        ({"model_type": "unigram", "pieces": 400}, "BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "BPE"),
        ({"add_dummy_prefix": False}, "BPE"),
        ({"remove_extra_whitespaces": True}, "BPE"),
        ({"user_defined_symbols": ["[gMASK]"]}, "256 bytes"),
        ({"byte_fallback": False, "pieces": 200}, "256 bytes"),
        ({"pad_id": 0, "unk_id": 3}, "256 bytes"),
    ],
)
def test_a_model_of_other_settings_is_refused(changes, said, tmp_path):
    assert said in refused(chatglm2_tokens.write_model(tmp_path / "tokenizer.model", **changes))


@pytest.mark.parametrize(
    ("pieces", "said"), [(32_000, "Llama"), (50_000, "another model"), (64_790, "64,789")]
)
def test_a_vocabulary_of_another_size_is_another_model_s(pieces, said, tmp_path):
    path = chatglm2_tokens.write_model(tmp_path / "tokenizer.model")
    path.write_bytes(chatglm2_tokens.add_pieces(path.read_bytes(), pieces - chatglm2_tokens.PIECES))
    assert said in refused(path)
