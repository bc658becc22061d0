"""Paper 002's three pipelines, with tiny random models of the real classes."""

import copy

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    DebertaV2Config,
    HubertConfig,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from llm_emo import recipes
from llm_emo.baselines import encoder, fusion
from llm_emo.baselines.fusion import AudioClassifier, Fusion
from llm_emo.baselines.settings import EncoderSettings
from llm_emo.baselines.speech_settings import FusionSettings
from llm_emo.errors import DatasetError

soundfile = pytest.importorskip("soundfile")

LAYERS = recipes.load("iemocap/fusion").method.network
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = SHAPE | {"intermediate_size": 24}
CONVOLUTIONS = {
    "conv_dim": (8, 8),
    "conv_kernel": (10, 8),
    "conv_stride": (5, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}


def audio_config(kind):
    match kind:
        case "wav2vec2":  # as wav2vec2-base: one group norm over time, no attention mask
            return Wav2Vec2Config(**WIDE, **CONVOLUTIONS)
        case "wav2vec2-layer":  # as wav2vec2-large-lv60: an attention mask
            return Wav2Vec2Config(**WIDE, **CONVOLUTIONS, feat_extract_norm="layer")
        case "hubert":
            return HubertConfig(**WIDE, **CONVOLUTIONS)
        case "wavlm":
            return WavLMConfig(**WIDE, **CONVOLUTIONS)
    return WhisperConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=20,
        max_source_positions=100,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


def extractor(kind):
    if kind == "whisper":
        return WhisperFeatureExtractor(feature_size=20, chunk_length=2)
    return Wav2Vec2FeatureExtractor(return_attention_mask=kind == "wav2vec2-layer")


def text_classifier(classes=2):
    torch.manual_seed(0)
    config = DebertaV2Config(
        **WIDE, vocab_size=tiny.VOCAB, relative_attention=True, pos_att_type=["p2c", "c2p"]
    )
    settings = EncoderSettings(max_length=16, dropout=0.0)
    return encoder.network(AutoModel.from_config(config), settings, "mean", classes=classes)


def audio_classifier(kind="wav2vec2", classes=4):
    torch.manual_seed(0)
    return AudioClassifier(AutoModel.from_config(audio_config(kind)), classes, 0.0)


def sounds(count, samples=4_000):
    generator = np.random.default_rng(0)
    waves = []
    for n in range(count):
        t = np.arange(samples + 300 * n) / 16_000
        tone = np.sin(2 * np.pi * (200 + 40 * n) * t) + 0.3 * generator.standard_normal(len(t))
        waves.append((0.2 * tone).astype(np.float32))
    return waves


def files(folder, count):
    paths = {}
    for n, wave in enumerate(sounds(count)):
        paths[f"row-{n}"] = folder / f"{n}.wav"
        soundfile.write(paths[f"row-{n}"], wave, 16_000)
    return paths


def memorise(network, inputs, labels, steps, lr):
    """Train until every label is right; say whether it is."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr)
    for _ in range(steps):
        logits = network(**inputs)
        if torch.equal(logits.argmax(1), labels):
            return True
        nn.functional.cross_entropy(logits, labels).backward()
        optimiser.step()
        optimiser.zero_grad()
    return False


every_audio = pytest.mark.parametrize(
    "kind", ["wav2vec2", "wav2vec2-layer", "hubert", "wavlm", "whisper"]
)


@every_audio
def test_every_speech_encoder_gives_a_score_a_class(kind):
    made = audio_classifier(kind).eval()
    logits = made(**fusion.audio_inputs(extractor(kind), sounds(3), 54_622))
    assert logits.shape == (3, 4)
    assert logits.isfinite().all()


@pytest.mark.parametrize("kind", ["wav2vec2-layer", "whisper"])
def test_padding_of_sound_changes_nothing_where_the_encoder_can_tell(kind):
    made = audio_classifier(kind).eval()
    waves = sounds(3, samples=6_000)
    together = made(**fusion.audio_inputs(extractor(kind), waves, 54_622))
    alone = [made(**fusion.audio_inputs(extractor(kind), [wave], 54_622)) for wave in waves]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_features_are_the_mean_of_the_frames_that_hear_the_clip(kind):
    made = audio_classifier(kind).eval()
    inputs = fusion.audio_inputs(extractor(kind), sounds(1), 54_622)
    states = made.encoder(inputs["values"]).last_hidden_state
    # 4,000 samples: strides 5 and 4 of windows 10 and 8; or 25 columns of 10 ms, halved.
    frames = {"wav2vec2": 198, "whisper": 13}[kind]
    features = made.features(inputs["values"], inputs["steps"])
    torch.testing.assert_close(features, states[:, :frames].mean(1))


@every_audio
def test_a_clip_is_cut_and_a_click_is_long_enough(kind):
    made, long = audio_classifier(kind).eval(), sounds(1, samples=9_000)[0]
    cut = made(**fusion.audio_inputs(extractor(kind), [long], 5_000))
    assert torch.equal(cut, made(**fusion.audio_inputs(extractor(kind), [long[:5_000]], 54_622)))
    click = np.ones(1, np.float32)
    assert made(**fusion.audio_inputs(extractor(kind), [click], 54_622)).isfinite().all()
    assert made(**fusion.audio_inputs(extractor(kind), [long], 5)).isfinite().all()


def test_the_paper_cuts_sound_at_a_tenth_of_its_longest_clip():
    assert recipes.load("iemocap/speech_encoder").method.head.max_samples == 546_220 // 10


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_32_sounds_can_be_learned_by_heart(kind):
    inputs = fusion.audio_inputs(extractor(kind), sounds(32, 400), 2_000)
    assert memorise(audio_classifier(kind), inputs, torch.arange(32) * 4 // 32, 300, 5e-3)


def test_the_mlp_has_the_parameters_of_four_layers():
    # Features and classes of deberta-v3-small and wav2vec2-base, nine and six classes.
    made = Fusion(LAYERS, inputs=768 + 9 + 768 + 6, classes=6)
    expected = 1552 * 512 + 513 * 256 + 257 * 128 + 129 * 6
    assert sum(p.numel() for p in made.parameters()) == expected
    assert sum(isinstance(layer, nn.Linear) for layer in made.layers) == 4


def test_32_encodings_can_be_learned_by_heart():
    torch.manual_seed(0)
    made = Fusion(LAYERS.model_copy(update={"dropout": 0.0}), 20, 4)
    x = torch.randn(32, 20)
    assert memorise(made, {"x": x}, torch.arange(32) % 4, 200, 1e-2)


def test_networks_loaded_give_the_logits_of_those_saved(tmp_path):
    sound = fusion.audio_inputs(extractor("wav2vec2"), sounds(2), 54_622)
    for make, inputs in (
        (audio_classifier, sound),
        (lambda: Fusion(LAYERS, 20, 4), {"x": torch.randn(3, 20)}),
    ):
        made, loaded = make().eval(), make().eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.01)
        save_file(made.state_dict(), tmp_path / "network.safetensors")
        loaded.load_state_dict(load_file(tmp_path / "network.safetensors"))
        assert torch.equal(loaded(**inputs), made(**inputs))


# Pipeline 3 on what pipelines 1 and 2 say


def test_encodings_are_features_and_probabilities_of_each_row_alone(tmp_path):
    hears, made, paths = audio_classifier(), extractor("wav2vec2"), files(tmp_path, 3)
    encoding = fusion.encode_sounds(hears, made, paths, 9_000, folder=tmp_path)
    assert encoding.features.shape == (3, 16)
    torch.testing.assert_close(encoding.scores.sum(1), torch.ones(3))
    inputs = fusion.audio_inputs(made, [fusion.decode(paths["row-2"])], 9_000)
    assert torch.equal(encoding.features[2:3], hears.features(**inputs).detach())
    assert torch.equal(encoding.scores[2:3], hears(**inputs).softmax(1).detach())
    fewer = {uid: paths[uid] for uid in ("row-2", "row-0")}  # in other company
    again = fusion.encode_sounds(hears, made, fewer, 9_000, folder=tmp_path)
    assert torch.equal(again.features, encoding.features[[2, 0]])


def test_what_encoders_say_is_computed_once(tmp_path, monkeypatch):
    paths, hears, made = files(tmp_path, 3), audio_classifier(), extractor("wav2vec2")
    calls = []
    encode = fusion.encode

    def counted(classifier, rows):
        calls.append(classifier)
        return encode(classifier, rows)

    monkeypatch.setattr(fusion, "encode", counted)

    def heard(max_samples=54_622):
        cache = tmp_path / "cache"
        return fusion.join([fusion.encode_sounds(hears, made, paths, max_samples, folder=cache)])

    first = heard()
    assert len(calls) == 1
    assert torch.equal(heard(), first)
    assert len(calls) == 1
    heard(max_samples=2_000)  # the sound is cut elsewhere
    assert len(calls) == 2
    soundfile.write(paths["row-1"], sounds(1)[0], 16_000)  # another file of the same name
    assert not torch.equal(heard(), first)
    assert len(calls) == 3
    with torch.no_grad():
        hears.classify.bias[0].add_(1)  # other weights
    heard()
    assert len(calls) == 4


def test_a_missing_sound_is_named_before_anything_is_encoded(tmp_path):
    paths = files(tmp_path, 2)
    paths["row-1"].unlink()
    with pytest.raises(DatasetError, match=r"1\.wav"):
        fusion.encode_sounds(audio_classifier(), extractor("wav2vec2"), paths, 9_000)


def test_encodings_of_different_rows_are_not_joined():
    one = fusion.Encoding(torch.zeros(2, 3), torch.zeros(2, 2))
    other = fusion.Encoding(torch.zeros(3, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="same rows"):
        fusion.join([one, other])
    assert fusion.join([one]).shape == (2, 5)


def test_all_three_pipelines_train_end_to_end_and_the_encoders_stay_frozen(tmp_path):
    # The word says one bit of the class and the sound the other: both are needed.
    paths = files(tmp_path, 16)
    labels = torch.tensor([2 * (n >= 8) + n % 2 for n in range(16)])
    texts = {uid: ("no", "yes")[n % 2] for n, uid in enumerate(paths)}
    reads, hears = text_classifier(2), audio_classifier("wav2vec2", 2)
    made = extractor("wav2vec2")
    waves = [fusion.decode(path) for path in paths.values()]
    ids = encoder.tokenize(tiny.tokenizer(), list(texts.values()), 16)
    words = dict(zip(("input_ids", "attention_mask"), encoder.pad(ids, 0), strict=True))
    assert memorise(reads, words, labels % 2, 100, 1e-2)
    assert memorise(hears, fusion.audio_inputs(made, waves, 9_000), labels // 2, 200, 5e-3)
    before = copy.deepcopy((reads.state_dict(), hears.state_dict()))
    whole = torch.from_numpy(encoder.extract(reads, ids, padding=0, tokens_per_pass=64))
    read = fusion.Encoding(whole[:, :16], whole[:, 16:])
    heard = fusion.encode_sounds(hears, made, paths, 9_000, folder=tmp_path)
    outcomes = []
    for encodings in ([read], [heard], [read, heard]):
        x = fusion.join(encodings)
        torch.manual_seed(0)
        network = Fusion(FusionSettings(hidden=(32, 16, 8), dropout=0.0), x.shape[1], 4)
        outcomes.append(memorise(network, {"x": x}, labels, 400, 1e-2))
    assert outcomes[2]
    assert not outcomes[0]  # the two words cannot tell four classes apart
    for state, module in zip(before, (reads, hears), strict=True):
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[name]), name
