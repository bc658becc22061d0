import re

import pytest
import tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from llm_emo.encoding import Encoder
from llm_emo.errors import ModelError, PromptError
from llm_emo.training import collate

TOKENIZERS = {
    "byte level": tiny.tokenizer(),
    "reasoning": tiny.tokenizer(template=tiny.REASONING_TEMPLATE),
    "metaspace": tiny.metaspace_tokenizer(),
}
tokenizers = pytest.mark.parametrize("kind", sorted(TOKENIZERS))
CONTROLS = [*tiny.CONTROL, *tiny.MARKS]

benign = st.text(alphabet="abc xyz .,!?'\n开心难过😀é▁", max_size=30)

halves = [part for c in CONTROLS for part in (c[: len(c) // 2], c[len(c) // 2 :], c[:-1], c[1:])]
neighbours = [
    "<",
    ">",
    "|",
    " ",
    "\n",
    "im_end",
    "user",
    "assistant",
    "</s>",
    "[Round 1]",
    "答：",
    "▁",
]
hostile = st.lists(
    st.sampled_from([*CONTROLS, *halves, *neighbours, "late", "开心", "Ġ", "\ue000\ue001"]),
    max_size=8,
).map("".join)


def chat(tokenizer, example):
    """The ids that transformers itself gives."""
    turns = [{"role": "system", "content": example.system}] if example.system else []
    turns.append({"role": "user", "content": example.message})
    return tokenizer.apply_chat_template(
        turns,
        tokenize=True,
        return_dict=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )


def encode(kind, example, max_length=512):
    [encoded] = Encoder(TOKENIZERS[kind], max_length).encode([example])
    return encoded


# --- the same ids as everybody else ------------------------------------------------------------


@tokenizers
@given(text=benign, before=benign, after=benign)
@settings(max_examples=30, deadline=None)
def test_a_prompt_has_the_ids_of_the_chat_template(kind, text, before, after):
    example = tiny.example(text, before=before, after=after)
    assert list(encode(kind, example).prompt) == chat(TOKENIZERS[kind], example)


@tokenizers
def test_a_system_turn_stands_where_the_template_puts_it(kind):
    example = tiny.example(system="You read feelings.")
    ids = encode(kind, example).prompt
    assert list(ids) == chat(TOKENIZERS[kind], example)
    assert "You read feelings." in TOKENIZERS[kind].decode(ids)


@tokenizers
def test_prompt_and_answer_are_how_the_template_shows_the_finished_dialogue(kind):
    tokenizer, example = TOKENIZERS[kind], tiny.example()
    encoded = encode(kind, example)
    said = tokenizer.decode(encoded.prompt + encoded.answer)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": example.message}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert said.replace(" ", "") == f"{asked}anger<|im_end|>".replace(" ", "")


def test_white_space_that_a_template_token_swallows_is_swallowed_here_too():
    # Phi-3's turn marks take the line break behind them; the model never saw it.
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(AddedToken("<|user|>", special=True, normalized=False, rstrip=True))
    tokenizer.chat_template = (
        "{% for m in messages %}<|user|>\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    example = tiny.example()
    [encoded] = Encoder(tokenizer, 512).encode([example])
    assert list(encoded.prompt) == chat(tokenizer, example)


def test_white_space_that_is_an_added_token_is_text_like_any_other():
    # Gemma's line break and runs of spaces are; a dialogue without line breaks is another one.
    tokenizer = tiny.tokenizer()
    spaces = ["\n", "\n\n", "  ", "▁▁"]
    tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in spaces])
    example = tiny.example("late\n\nagain  and ▁▁ again\n<think>", history=("A: hi\n", "B: no\n"))
    [encoded] = Encoder(tokenizer, 512).encode([example])
    assert example.message in tokenizer.decode(encoded.prompt)
    assert tokenizer.convert_tokens_to_ids("<think>") not in encoded.prompt
    calm = tiny.example("late\n\nagain  and ▁▁ again\n", history=("A: hi\n", "B: no\n"))
    [encoded] = Encoder(tokenizer, 512).encode([calm])
    assert list(encoded.prompt) == chat(tokenizer, calm)


def test_a_template_that_trims_the_message_is_followed():
    tokenizer = tiny.tokenizer(template=tiny.TEMPLATE.replace("m['content']", "m['content']|trim"))
    example = tiny.example("late again \n", before=" \nWhich emotion? ")
    [encoded] = Encoder(tokenizer, 512).encode([example])
    assert list(encoded.prompt) == chat(tokenizer, example)


def test_a_base_model_without_a_template_gets_the_message_and_a_line_break():
    tokenizer = tiny.tokenizer(template=None)
    [encoded] = Encoder(tokenizer, 512).encode([tiny.example(system="Be brief.")])
    assert tokenizer.decode(encoded.prompt) == f"Be brief.\n{tiny.example().message}\n"
    assert encoded.answer[-1] == tokenizer.eos_token_id


def test_leading_tokens_of_a_base_model_are_kept_once():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer(template=None, bos=True)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    [encoded] = Encoder(tokenizer, 512).encode([tiny.example()])
    assert list(encoded.prompt) == tokenizer(tiny.example().message + "\n")["input_ids"]
    assert encoded.prompt.count(bos) == 1
    assert bos not in encoded.answer


def test_a_template_s_own_leading_token_is_not_doubled():
    tokenizer = tiny.tokenizer(template="<|endoftext|>" + tiny.TEMPLATE, bos=True)
    [encoded] = Encoder(tokenizer, 512).encode([tiny.example()])
    assert encoded.prompt.count(tokenizer.bos_token_id) == 1


TEXT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def unspellable(template):
    """A tokenizer that puts its first token in front, and lets nobody spell one."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer(template=template, bos=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    tokenizer.split_special_tokens = True
    return tokenizer


def test_a_template_that_can_spell_nothing_stands_behind_the_tokenizer_s_own_tokens():
    tokenizer = unspellable(TEXT_TEMPLATE)
    example = tiny.example("late <|endoftext|><think>", system="<|im_end|> Be brief.")
    [encoded] = Encoder(tokenizer, 512).encode([example])
    said = f"system: <|im_end|> Be brief.\nuser: {example.message}\nassistant:"
    assert tokenizer.decode(encoded.prompt) == f"<|endoftext|>{said}"
    assert encoded.prompt[0] == tokenizer.bos_token_id
    assert set(tokenizer.added_tokens_decoder).isdisjoint(encoded.prompt[1:])
    assert encoded.answer[-1] == tokenizer.eos_token_id
    calm = tiny.example()
    [encoded] = Encoder(tokenizer, 512).encode([calm])
    assert list(encoded.prompt) == tokenizer(f"user: {calm.message}\nassistant:")["input_ids"]


def test_a_template_that_spells_its_tokens_is_followed_whatever_the_tokenizer_does_with_text():
    example, spelled = tiny.example(), tiny.tokenizer()
    [encoded] = Encoder(unspellable(tiny.TEMPLATE), 512).encode([example])
    assert list(encoded.prompt) == chat(spelled, example)


# --- no control token from text ----------------------------------------------------------------


def control_ids(kind, ids):
    control = set(TOKENIZERS[kind].added_tokens_decoder)
    return [id_ for id_ in ids if id_ in control]


@tokenizers
@given(text=hostile, turn=hostile, word=hostile)
@settings(max_examples=60, deadline=None)
def test_control_tokens_come_from_the_template_alone(kind, text, turn, word):
    calm = tiny.example("late", history=("A: hello\n",))
    attack = tiny.example(text, history=(turn,), answer=word)
    encoded = encode(kind, attack, 2000)
    assert control_ids(kind, encoded.prompt) == control_ids(kind, encode(kind, calm).prompt)
    assert control_ids(kind, encoded.answer) == [encoded.answer[-1]]


@tokenizers
@given(text=hostile)
@settings(max_examples=30, deadline=None)
def test_text_that_spells_control_tokens_is_still_all_there(kind, text):
    assume("\ue000" not in text)
    encoded = encode(kind, tiny.example(f"a{text}b"), 2000)
    shown = TOKENIZERS[kind].decode(encoded.prompt)
    if kind == "metaspace":  # each torn piece begins with the mark of a word
        assert re.sub("[ ▁]", "", f"a{text}b") in re.sub("[ ▁]", "", shown)
    else:
        assert f"a{text}b" in shown
    assert encoded.dropped == 0


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_token_in_the_text_is_torn_into_plain_ones(control):
    encoder = Encoder(TOKENIZERS["reasoning"], 512)
    own = TOKENIZERS["reasoning"].convert_tokens_to_ids(control)
    calm, attack = encoder.encode([tiny.example("late"), tiny.example(f"late {control}")])
    assert attack.prompt.count(own) == calm.prompt.count(own)
    assert control in TOKENIZERS["reasoning"].decode(attack.prompt)


def test_a_row_does_not_change_how_the_rows_beside_it_are_encoded():
    encoder = Encoder(TOKENIZERS["byte level"], 512)
    rows = [tiny.example("late"), tiny.example("<|im_end|><think>"), tiny.example("开心")]
    assert encoder.encode(rows) == [encoder.encode([row])[0] for row in rows]


def test_the_tokenizer_is_left_as_it_was():
    tokenizer = tiny.tokenizer()
    before = tokenizer("<|im_start|>user<think>")["input_ids"]
    Encoder(tokenizer, 512).encode([tiny.example("<|im_end|>")])
    assert tokenizer("<|im_start|>user<think>")["input_ids"] == before
    assert tokenizer.padding_side == tiny.tokenizer().padding_side


# --- answers -----------------------------------------------------------------------------------


@tokenizers
def test_an_answer_ends_with_the_token_that_ends_a_turn(kind):
    tokenizer = TOKENIZERS[kind]
    encoder = Encoder(tokenizer, 512)
    assert encoder.end == tokenizer.convert_tokens_to_ids("<|im_end|>")
    [answer] = encoder.answers(["anger"])
    assert answer[-1] == encoder.end
    assert encoder.end not in answer[:-1]
    assert encoder.decode(answer) == "anger"


def test_the_end_of_a_turn_counts_before_the_tokenizer_s_eos():
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    assert Encoder(tokenizer, 512).end == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_template_without_an_end_of_turn_ends_with_eos():
    tokenizer = tiny.tokenizer(template="{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert Encoder(tokenizer, 512).end == tokenizer.eos_token_id


def test_a_model_that_cannot_end_is_refused():
    tokenizer = tiny.tokenizer(template=None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="eos_token"):
        Encoder(tokenizer, 512).encode([tiny.example()])


def test_the_end_token_is_learned_although_it_is_also_the_padding_token():
    tokenizer = TOKENIZERS["byte level"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoded = encode("byte level", tiny.example())
    batch = collate([encoded])
    assert batch["labels"].tolist() == list(encoded.answer)
    assert batch["labels"][-1] == tokenizer.pad_token_id


@tokenizers
def test_an_answer_never_merges_with_the_prompt(kind):
    # The same prompt ids whatever the answer, so that training sees what generation sees.
    prompts = {encode(kind, tiny.example(answer=word)).prompt for word in ("anger", "ness", "开心")}
    assert len(prompts) == 1


# --- shortening --------------------------------------------------------------------------------

TURNS = tuple(f"Speaker {i}: I was so happy {i}.\n" for i in range(4))


def shown(kind, encoded):
    return TOKENIZERS[kind].decode(encoded.prompt)


@tokenizers
@given(max_length=st.integers(60, 260), length=st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_what_is_too_long_loses_its_oldest_turns_and_then_its_end(kind, max_length, length):
    text = "the late train " * (length // 15 + 1)
    example = tiny.example(text[:length], history=TURNS)
    whole = encode(kind, example, 10**6)
    try:
        encoded = encode(kind, example, max_length)
    except PromptError:
        least = encode(kind, tiny.example(example.text[:1]), 10**6)
        assert len(least.prompt) + len(least.answer) > max_length
        return
    assert len(encoded.prompt) + len(encoded.answer) <= max_length
    assert encoded.answer == whole.answer
    assert control_ids(kind, encoded.prompt) == control_ids(kind, whole.prompt)
    if len(whole.prompt) + len(whole.answer) <= max_length:
        assert encoded == whole
        return
    # It is a prompt of the same example, with turns missing at the front, and only with all of
    # them missing also letters at the end.
    candidates = [(TURNS[i:], example.text) for i in range(1, len(TURNS) + 1)]
    candidates += [((), example.text[:i]) for i in range(len(example.text))]
    for history, kept in candidates:
        candidate = tiny.example(kept, history=history)
        if encode(kind, candidate, 10**6).prompt == encoded.prompt:
            assert encoded.dropped == len(example.message) - len(candidate.message)
            break
    else:
        pytest.fail(f"not a shortened form of the example: {shown(kind, encoded)}")


def test_no_turn_is_dropped_that_would_have_fitted():
    example = tiny.example(history=TURNS)
    two = encode("byte level", tiny.example(history=TURNS[2:]), 10**6)
    room = len(two.prompt) + len(two.answer)
    assert encode("byte level", example, room).prompt == two.prompt
    assert len(encode("byte level", example, room - 1).prompt) < len(two.prompt)
    assert shown("byte level", encode("byte level", example, room - 1)).count("Speaker") == 1


def test_text_is_cut_at_its_end_and_filled_up_to_the_last_token():
    example = tiny.example("joy " * 50)
    encoded = encode("byte level", example, 70)
    assert len(encoded.prompt) + len(encoded.answer) == 70
    assert encoded.dropped > 0
    before, _, behind = shown("byte level", encoded).partition("Sentence: ")
    assert before.endswith("anger or joy.\n")
    assert behind.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert example.text.startswith(behind.partition("<|im_end|>")[0])


def test_what_stands_behind_the_text_survives_shortening():
    example = tiny.example("joy " * 50, after="\nWhich emotion is it?")
    assert "Which emotion is it?<|im_end|>" in shown(
        "byte level", encode("byte level", example, 80)
    )


@tokenizers
def test_no_room_for_text_is_an_error_that_names_row_and_setting(kind):
    with pytest.raises(PromptError, match=r"row-1.*max_length = 20"):
        encode(kind, tiny.example(), 20)


def test_room_that_does_not_hold_one_letter_of_the_text_is_no_room():
    # An instruction about an empty text would be trained and scored as if it were the row.
    bare = encode("byte level", tiny.example(""), 512)
    room = len(bare.prompt) + len(bare.answer) + 1
    with pytest.raises(PromptError, match="row-1"):
        encode("byte level", tiny.example("😀😀😀"), room)


def test_shortening_tears_no_hostile_text_open():
    example = tiny.example("<|im_end|>" * 40)
    encoded = encode("byte level", example, 90)
    expected = control_ids("byte level", encode("byte level", tiny.example()).prompt)
    assert control_ids("byte level", encoded.prompt) == expected


# --- fingerprints ------------------------------------------------------------------------------


def test_a_fingerprint_tells_tokenizers_and_templates_apart_and_nothing_else():
    prints = [Encoder(tiny.tokenizer(), length).fingerprint() for length in (64, 512)]
    assert prints[0] == prints[1]
    padded = tiny.tokenizer()
    padded(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert Encoder(padded, 64).fingerprint() == prints[0]
    other_template = Encoder(tiny.tokenizer(template=tiny.REASONING_TEMPLATE), 64).fingerprint()
    assert other_template["tokenizer"] == prints[0]["tokenizer"]
    assert other_template["template"] != prints[0]["template"]
    more = tiny.tokenizer()
    more.add_tokens("<extra>")
    assert Encoder(more, 64).fingerprint()["tokenizer"] != prints[0]["tokenizer"]


def test_a_template_that_hides_the_message_is_refused():
    tokenizer = tiny.tokenizer(template="{% for m in messages %}<|im_start|>{% endfor %}")
    with pytest.raises(ModelError, match="chat template"):
        Encoder(tokenizer, 512).encode([tiny.example()])
