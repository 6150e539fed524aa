"""Token ids: known ones, the same from both engines, and what any caption may not break."""

import builtins
import gzip
import html
import json
import pickle
import random
import time

import ftfy
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clip_ray import tokenizer
from clip_ray.config import TokenizerConfig
from clip_ray.errors import ConfigError
from clip_ray.tokenizer import Tokenizer, clean

MIXED = [
    "",
    "a photo of a cat",
    "it's 5 o'clock, they'll say we've 1234 reasons I'd don't",
    "“smart” quotes — and ﬁgures ½",
    "schöne Häuser, Straße, Übergrößenträger",
    "日本の猫が窓辺で眠っている",
    "two &lt;b&gt;tags&amp;lt;/b&gt; &eacute;",
    "emoji 🐈‍⬛ and control \x00 \x1b[31m chars",
    "<start_of_text> inside <end_of_text> a caption",
    "word " * 100,
    "x" * 500,
]
GERMAN_JAPANESE = [
    "Ein roter Drachen über den Dächern der Altstadt",
    "Zwei Hunde spielen am Strand von Sylt",
    "Straßenbahnhaltestelle im Schneegestöber",
    "窓辺で眠る黒い猫",
    "富士山と桜の花、朝の光",
    "東京の夜の交差点を渡る人々",
]


def long_way(text: str) -> str:
    """open_clip tokenizer.py: basic_clean, whitespace_clean, lower."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return " ".join(text.split()).strip().lower()


@pytest.fixture(scope="session")
def merges_text() -> bytes:
    """OpenAI's merges, which instant_clip_tokenizer carries as plain text in its library."""
    module = pytest.importorskip("instant_clip_tokenizer").instant_clip_tokenizer
    with open(module.__file__, "rb") as file:
        library = file.read()
    begin = library.find(b'"bpe_simple_vocab_16e6.txt#version')
    assert begin >= 0, "this build of instant_clip_tokenizer holds its merges in another form"
    return b"\n".join(library[begin:].split(b"\n", 49_000)[:48_990]) + b"\n"


@pytest.fixture(scope="session")
def merges_path(merges_text, tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress(merges_text, 1))
    return path


@pytest.fixture(scope="session")
def clip():
    return Tokenizer.clip()


@pytest.fixture(scope="session")
def from_merges(merges_path):
    return Tokenizer.from_file(merges_path)


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(GERMAN_JAPANESE * 2, vocab_size=600, context_length=16)


def test_clip_gives_the_known_ids(clip):
    ids, truncated = clip(["a photo of a cat"])
    assert ids.dtype == np.int32 and ids.shape == (1, 77) and truncated.dtype == np.bool_
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert not ids[0, 8:].any() and not truncated[0]
    assert (clip.vocab_size, clip.start_id, clip.end_id) == (49408, 49406, 49407)


def test_a_long_text_is_cut_where_no_id_shows_it(clip, from_merges, trained, monkeypatch):
    rng = random.Random(0)
    letters = "abcdefghij123!?-äß日本🐈"
    words = ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(3000)]
    texts = [" ".join(words[start:]) for start in (0, 500, 1000)]
    texts += ["x" * 9000 + " and " + texts[0], texts[0][:9856], texts[0][:9857]]
    for tok in (clip, from_merges, trained):
        cut = tok(texts)
        assert cut[1].all()
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "_beginning", lambda text, context_length: text)
            whole = tok(texts)
        for ours, reference in zip(cut, whole, strict=True):
            np.testing.assert_array_equal(ours, reference)


def test_a_word_of_a_megabyte_takes_the_time_of_a_short_one(clip, from_merges):
    """Ten times the length takes ten times the time of cleaning it; encoded whole it took 100."""
    for tok in (clip, from_merges):
        seconds = []
        for length in (100_000, 1_000_000):
            begun = time.process_time()
            ids, truncated = tok(["\ufffd" * length])
            seconds.append(time.process_time() - begun)
            assert truncated[0] and ids[0, -1] == tok.end_id and ids.all()
        assert seconds[1] < 30 * max(seconds[0], 0.01)


def test_a_vocabulary_is_learnt_past_a_word_of_a_megabyte():
    plain = Tokenizer.train(GERMAN_JAPANESE * 2, vocab_size=600, context_length=16)
    odd = Tokenizer.train(
        [*GERMAN_JAPANESE, "ab" * 500_000, *GERMAN_JAPANESE], vocab_size=600, context_length=16
    )
    assert odd.to_bytes() == plain.to_bytes()


def test_empty_string_is_start_and_end(clip, from_merges, trained):
    for tok in (clip, from_merges, trained):
        ids, truncated = tok([""])
        assert ids[0, :3].tolist() == [tok.start_id, tok.end_id, 0]
        assert not truncated[0]


def test_no_captions_give_no_rows(clip, trained):
    assert clip([])[0].shape == (0, 77)
    assert trained([])[0].shape == (0, 16)


def test_merges_file_gives_the_same_ids(clip, from_merges):
    assert from_merges.vocab_size == 49408
    for ours, reference in zip(from_merges(MIXED), clip(MIXED), strict=True):
        np.testing.assert_array_equal(ours, reference)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60))
def test_merges_file_gives_the_same_ids_for_any_text(clip, from_merges, text):
    """Any text of assigned characters: each engine brings the Unicode version it was built with.

    U+13460, for one, is a letter since Unicode 16, and unassigned to instant_clip_tokenizer 0.1.
    """
    np.testing.assert_array_equal(from_merges([text])[0], clip([text])[0])


def test_merges_file_may_be_uncompressed(merges_text, tmp_path, clip):
    path = tmp_path / "merges.txt"
    path.write_bytes(merges_text)
    np.testing.assert_array_equal(Tokenizer.from_file(path)(MIXED)[0], clip(MIXED)[0])


def test_hugging_face_file_gives_the_same_ids(from_merges, tmp_path, clip):
    """The published file of openai/clip-vit-*: other names, a normalizer, a post-processor."""
    document = json.loads(from_merges.to_bytes())["tokenizer"]
    vocab = document["model"]["vocab"]
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    for token in document["added_tokens"]:
        token["content"] = names[token["content"]]
        vocab[token["content"]] = token["id"]
    document["model"]["unk_token"] = "<|endoftext|>"
    document["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ],
    }
    document["post_processor"] = {
        "type": "RobertaProcessing",
        "sep": ["<|endoftext|>", 49407],
        "cls": ["<|startoftext|>", 49406],
        "trim_offsets": False,
        "add_prefix_space": False,
    }
    document["truncation"] = {
        "direction": "Right",
        "max_length": 5,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    captions = [text for text in MIXED if "_of_text>" not in text]
    ours = Tokenizer.from_file(path)
    assert (ours.vocab_size, ours.start_id, ours.end_id) == (49408, 49406, 49407)
    np.testing.assert_array_equal(ours(captions)[0], clip(captions)[0])


@pytest.mark.parametrize("engine", ["clip", "from_merges"])
def test_truncation_keeps_the_end_and_is_flagged(engine, request):
    tok = Tokenizer.load(
        json.dumps(
            {**json.loads(request.getfixturevalue(engine).to_bytes()), "context_length": 6}
        ).encode()
    )
    ids, truncated = tok(["cat cat cat", "cat cat cat cat", "cat cat cat cat cat"])
    cat = 2368
    assert ids.tolist() == [
        [49406, cat, cat, cat, 49407, 0],
        [49406, cat, cat, cat, cat, 49407],
        [49406, cat, cat, cat, cat, 49407],
    ]
    assert truncated.tolist() == [False, False, True]


def test_argmax_is_the_end_token(clip, trained):
    for tok in (clip, trained):
        ids, _ = tok(MIXED + GERMAN_JAPANESE)
        assert (ids[np.arange(len(ids)), ids.argmax(1)] == tok.end_id).all()
        assert (ids[:, 0] == tok.start_id).all()


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=50) | st.text(st.characters(max_codepoint=127), max_size=50))
@example("a\x1cb")
@example("a\x7fb \x1b[1mc")
@example("&amp;lt; A&B &#65;")
@example("  Two  Spaces\t")
def test_shortcut_equals_the_long_way(text):
    assert clean(text) == long_way(text)


def test_mojibake_is_repaired():
    broken = "Größe – “naïve” café".encode().decode("windows-1252", errors="ignore")
    assert broken != "Größe – “naïve” café"
    assert clean("schÃ¶ne HÃ¤user") == "schöne häuser"
    assert clean("itâ€™s") == "it's"


@pytest.mark.parametrize("text", ["\ud800 lone", "&#" + "9" * 5000 + "; x", "&amp;#" + "9" * 5000])
def test_hostile_captions_are_encoded(clip, trained, text):
    for tok in (clip, trained):
        assert tok([text])[0].shape == (1, tok.context_length)


def test_training_is_deterministic_and_free_of_order(trained):
    again = Tokenizer.train(list(reversed(GERMAN_JAPANESE * 2)), 600, context_length=16)
    assert again.to_bytes() == trained.to_bytes()


def test_training_ignores_hash_seeds():
    """Ties are everywhere in so few captions; each training hashes with another seed."""
    captions = ["ab cd ef gh", "cd ab gh ef", "ij kl mn op qr st uv wx yz"] * 2
    learnt = {Tokenizer.train(captions, 540, 8).to_bytes() for _ in range(8)}
    assert len(learnt) == 1


def test_trained_vocabulary_ends_with_start_and_end(trained):
    assert (trained.start_id, trained.end_id) == (trained.vocab_size - 2, trained.vocab_size - 1)
    assert 514 < trained.vocab_size <= 600


def test_training_learns_the_commonest_pair_first():
    """By hand: "ab" is twice as common as "cd", so the first merge is a + b-at-the-end."""
    tok = Tokenizer.train(["ab ab cd", "ab ab cd"], vocab_size=515, context_length=8)
    merges = json.loads(tok.to_bytes())["tokenizer"]["model"]["merges"]
    assert merges == [["a", "b</w>"]]
    assert tok(["ab"])[0][0, :4].tolist() == [513, 512, 514, 0]


def test_training_stops_where_the_captions_end():
    tok = Tokenizer.train(["ab ab"], vocab_size=5000, context_length=8)
    assert tok.vocab_size == 515
    assert tok.end_id == 514


def test_trained_vocabulary_spells_what_it_never_saw(trained):
    """One id a byte at worst: nothing is unknown, nothing is dropped."""
    ids, _ = Tokenizer.load(trained.to_bytes())(["ж🐈"])
    assert (ids[0] != 0).sum() == 1 + len("ж".encode()) + len("🐈".encode()) + 1


def test_long_captions_are_flagged(trained):
    long = ["".join(GERMAN_JAPANESE[3:]), " ".join(GERMAN_JAPANESE[:3])]
    ids, truncated = trained([*long, "猫"])
    assert truncated.tolist() == [True, True, False]
    assert (ids[:2, -1] == trained.end_id).all()


@pytest.mark.parametrize("kind", ["clip", "from_merges", "trained"])
def test_serialised_and_pickled_alike(kind, request):
    tok = request.getfixturevalue(kind)
    captions = MIXED + GERMAN_JAPANESE
    for other in (Tokenizer.load(tok.to_bytes()), pickle.loads(pickle.dumps(tok))):
        assert other.to_bytes() == tok.to_bytes()
        assert (other.vocab_size, other.start_id) == (tok.vocab_size, tok.start_id)
        for ours, reference in zip(other(captions), tok(captions), strict=True):
            np.testing.assert_array_equal(ours, reference)


def test_serialised_form_is_a_vocabulary_file(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(trained.to_bytes())
    tok = Tokenizer.from_file(path, context_length=20)
    assert tok.context_length == 20
    np.testing.assert_array_equal(tok(["窓辺"])[0][:, :16], trained(["窓辺"])[0])


def test_from_config(trained, merges_path):
    train = TokenizerConfig(train_vocab=600)
    assert Tokenizer.from_config(TokenizerConfig(), 32).context_length == 32
    assert Tokenizer.from_config(TokenizerConfig(vocab=str(merges_path)), 77).vocab_size == 49408
    learnt = Tokenizer.from_config(train, 16, captions=iter(GERMAN_JAPANESE * 2))
    assert learnt.to_bytes() == trained.to_bytes()
    with pytest.raises(ConfigError, match="train_vocab 600: there are no captions"):
        Tokenizer.from_config(train, 16)


def test_missing_package_names_the_way_out(monkeypatch):
    real = builtins.__import__

    def without_instant(name, *args, **kwargs):
        if name == "instant_clip_tokenizer":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_instant)
    with pytest.raises(ConfigError, match=r"set tokenizer\.vocab to the path of .*16e6"):
        Tokenizer.clip()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello\nworld\n", "expected a tokenizer.json, or merges"),
        (b"#version: 0.2\na b c\n", "line 2 is 'a b c'"),
        (b"#version: 0.2\nab c\n", "joins tokens that no earlier one made"),
        (b'{"a": 1}', "not a tokenizer.json"),
        (b'{"a": ', "Expecting value"),
        (b'{"kind": "clip", "format": 7}', "format 7: expected 1"),
        (b"\x1f\x8b\x08\x00broken", "tokenizer.vocab"),
        (b"\xff\xfe", "codec can't decode"),
    ],
)
def test_a_bad_vocabulary_file_is_named(tmp_path, content, message):
    path = tmp_path / "vocab"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        Tokenizer.from_file(path)
    assert str(path) in str(caught.value)


def test_a_missing_vocabulary_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.json: No such file"):
        Tokenizer.from_file(tmp_path / "nowhere.json")


def test_an_end_token_below_another_is_refused(trained):
    document = json.loads(trained.to_bytes())
    start, end = document["tokenizer"]["added_tokens"]
    start["id"], end["id"] = end["id"], start["id"]
    document["tokenizer"]["added_tokens"] = [end, start]
    with pytest.raises(ConfigError, match="expected the highest"):
        Tokenizer.load(json.dumps(document).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b'{"format": 1, "kind": "x", "context_length": 9}'])
def test_other_bytes_are_no_tokenizer(data):
    with pytest.raises(ConfigError, match="serialised tokenizer"):
        Tokenizer.load(data)
