"""Captions -> token ids: CLIP's byte-pair encoding, given or trained.

One vocabulary layout throughout, OpenAI's: 256 bytes, the same 256 as the end of a word, the
merges, and last the start and the end token, so that the end token is the highest id of a row.
Two engines give the ids: `instant_clip_tokenizer` for OpenAI's own vocabulary, which it carries,
and `tokenizers` for every other.
"""

from __future__ import annotations

import gzip
import html
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_ray.config import TokenizerConfig
from clip_ray.errors import ConfigError

if TYPE_CHECKING:
    import tokenizers

FORMAT = 1
WORD_END = "</w>"
# The second spelling is that of OpenAI's own code and of Hugging Face's files.
SPECIAL_TOKENS = (("<start_of_text>", "<end_of_text>"), ("<|startoftext|>", "<|endoftext|>"))
# openai/CLIP simple_tokenizer.py, without its special tokens. Captions are lower case by then.
WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# openai/CLIP simple_tokenizer.py: its file holds 262,144 merges and these many are in use.
CLIP_MERGES = 49152 - 256 - 2
CLIP_VOCAB = 512 + CLIP_MERGES + 2
# No token is longer: those of OpenAI's vocabulary have at most 25 characters, and ours are learnt
# from words of at most so many.
_TOKEN_CHARS = 128
_WORD_CHARS = 4096  # of a word that is encoded whole: 5 ms
# int() refuses more than 4,300 digits, and html.unescape passes that error on.
_HUGE_REFERENCE = re.compile(r"&#[0-9]{1000,};?")


def clean(text: str) -> str:
    """Return `text` repaired, unescaped, with single spaces and in lower case.

    The same as open_clip's default cleaning (`basic_clean`, `whitespace_clean`, lower), except
    that a numeric entity of a thousand digits becomes U+FFFD where open_clip raises.
    """
    # ftfy is most of a caption's cost and has nothing to do on plain ASCII. The isprintable test
    # matters: ftfy removes control characters, and str.split takes some for spaces.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = ftfy.fix_text(text)
        for _ in range(2):
            text = html.unescape(_HUGE_REFERENCE.sub("\ufffd", text))
    return " ".join(text.split()).lower()


class Tokenizer:
    """Captions to rows of token ids.

    Make one with `clip`, `from_file`, `train`, `from_config` or `load`. Pickles as its
    serialised form, so Ray tasks can carry it.

    Attributes:
        context_length: L, tokens of a row, start and end included.
        vocab_size: number of ids.
        start_id: id of the start token.
        end_id: id of the end token, the highest one: `ids.argmax(1)` is its place in a row.
    """

    def __init__(self, backend: tokenizers.Tokenizer | None, context_length: int) -> None:
        """Not for callers; `backend` None is OpenAI's vocabulary."""
        if context_length < 3:
            raise ConfigError(f"context_length {context_length}: start, a token and end need 3")
        self.context_length = context_length
        self._backend = backend
        if backend is None:
            self._instant = _instant_clip()
            self.vocab_size, self.start_id = CLIP_VOCAB, CLIP_VOCAB - 2
        else:
            self.vocab_size = backend.get_vocab_size()
            self.start_id = _start_id(backend)
        self.end_id = self.vocab_size - 1

    @classmethod
    def clip(cls, context_length: int = 77) -> Tokenizer:
        """Return OpenAI's tokenizer (49,408 ids).

        Raises:
            ConfigError: `instant_clip_tokenizer` is not installed.
        """
        return cls(None, context_length)

    @classmethod
    def from_file(cls, path: str | Path, context_length: int = 77) -> Tokenizer:
        """Read a tokenizer.json or a file of merges.

        Args:
            path: one of: Hugging Face's tokenizer.json of a CLIP; OpenAI's
                bpe_simple_vocab_16e6.txt(.gz) or another file of its form; what `to_bytes`
                wrote, whose own context length then gives way to `context_length`.
            context_length: L.

        Raises:
            ConfigError: no such file, or none of these forms.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"tokenizer.vocab {path}: {error.strerror}; expected clip, or the path of a "
                "tokenizer.json or bpe_simple_vocab_16e6.txt.gz"
            ) from error
        try:
            if data.startswith(b"\x1f\x8b"):
                data = gzip.decompress(data)
            text = data.decode("utf-8")
            if not text.lstrip().startswith("{"):
                return cls(_from_merges(_parse_merges(text)), context_length)
            document = json.loads(text)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise ConfigError(f"tokenizer.vocab {path}: {error}") from error
        try:
            if "kind" in document:
                return cls._from_document({**document, "context_length": context_length})
            return cls(_from_tokenizer_json(text), context_length)
        except ConfigError as error:
            raise ConfigError(f"tokenizer.vocab {path}: {error}") from error

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, context_length: int = 77) -> Tokenizer:
        """Learn the merges of `captions`, in OpenAI's layout.

        The same captions, in any order, give the same vocabulary. Merges seen once are not
        learnt, so few captions give fewer ids than asked for; `vocab_size` says how many.

        Raises:
            ConfigError: `vocab_size` is too small for the bytes and the special tokens.
        """
        if vocab_size < 514:
            raise ConfigError(
                f"tokenizer.train_vocab {vocab_size}: 512 bytes and 2 special tokens need 514"
            )
        return cls(_from_merges(_learn_merges(captions, vocab_size - 514)), context_length)

    @classmethod
    def from_config(
        cls, config: TokenizerConfig, context_length: int, captions: Iterable[str] | None = None
    ) -> Tokenizer:
        """Return the tokenizer that `config` describes.

        Args:
            config: the section `tokenizer`.
            context_length: L.
            captions: what a vocabulary is trained on; needed with `config.train_vocab`, and not
                read without it.

        Raises:
            ConfigError: captions are needed and not given, or as `clip` and `from_file`.
        """
        if config.train_vocab is not None:
            if captions is None:
                raise ConfigError(
                    f"tokenizer.train_vocab {config.train_vocab}: there are no captions here to "
                    "train on; load the tokenizer of the run that trained it"
                )
            return cls.train(captions, config.train_vocab, context_length)
        if config.vocab == "clip":
            return cls.clip(context_length)
        return cls.from_file(config.vocab, context_length)

    @classmethod
    def load(cls, data: bytes) -> Tokenizer:
        """Read what `to_bytes` wrote.

        Raises:
            ConfigError: the bytes are something else, or of a later format.
        """
        try:
            document = json.loads(data)
        except ValueError as error:
            raise ConfigError(f"not a serialised tokenizer: {error}") from error
        return cls._from_document(document)

    @classmethod
    def _from_document(cls, document: Any) -> Tokenizer:
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            found = document.get("format") if isinstance(document, dict) else None
            raise ConfigError(f"serialised tokenizer of format {found!r}: expected {FORMAT}")
        kind, context_length = document.get("kind"), document.get("context_length")
        if kind not in ("clip", "bpe") or type(context_length) is not int:
            raise ConfigError(
                f"serialised tokenizer of kind {kind!r} with context_length {context_length!r}: "
                "expected clip or bpe, and an integer"
            )
        if kind == "clip":
            return cls(None, context_length)
        return cls(_from_tokenizer_json(json.dumps(document.get("tokenizer"))), context_length)

    def to_bytes(self) -> bytes:
        """Return a JSON document that `load` reads; it needs no other file."""
        document: dict[str, Any] = {
            "format": FORMAT,
            "kind": "clip" if self._backend is None else "bpe",
            "context_length": self.context_length,
        }
        if self._backend is not None:
            document["tokenizer"] = json.loads(self._backend.to_str())
        # Sorted: these bytes count in the model digest.
        return json.dumps(document, sort_keys=True, ensure_ascii=False).encode()

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.load, (self.to_bytes(),)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Clean and encode captions.

        A literal <start_of_text> or <end_of_text> in a caption becomes the special token, as in
        open_clip; the features are then those of the text before the first end. (Right after
        punctuation, "!<end_of_text>", open_clip and `clip` read it as text, the others do not.)

        Args:
            texts: B captions, of any content.

        Returns:
            ids: int32 (B, L), each row start, tokens, end, and zeros for padding.
            truncated: bool (B,), the captions that lost tokens; their end token stands last.
        """
        assert not isinstance(texts, str), "a sequence of captions is expected, not one"
        L = self.context_length
        cleaned = [_beginning(clean(text), L) for text in texts]
        if self._backend is None:
            # With one place more, the last column is the end token or padding, and it is the
            # end token exactly where L places are too few.
            ids_BL = self._instant.tokenize_batch(cleaned, context_length=L + 1).astype(np.int32)
            truncated_B = ids_BL[:, L] != 0
            ids_BL = np.ascontiguousarray(ids_BL[:, :L])
            ids_BL[truncated_B, -1] = self.end_id
            return ids_BL, truncated_B
        ids_BL = np.zeros((len(cleaned), L), np.int32)
        truncated_B = np.zeros(len(cleaned), bool)
        for row, text in enumerate(cleaned):
            # Not encode_batch: it starts a thread a core in every one of Ray's one-core tasks.
            tokens = self._backend.encode(text, add_special_tokens=False).ids
            truncated_B[row] = len(tokens) > L - 2
            tokens = [self.start_id, *tokens[: L - 2], self.end_id]
            ids_BL[row, : len(tokens)] = tokens
        return ids_BL, truncated_B


def _beginning(text: str, context_length: int) -> str:
    """Return the part of a cleaned text that its row of ids depends on, where the rest is long.

    Encoding a word takes time that grows with the square of its length: minutes for a megabyte.
    A cut between words changes no id; amid a word of thousands of characters it may.
    """
    enough = _TOKEN_CHARS * context_length
    if len(text) <= enough:
        return text
    end = text.find(" ", enough, enough + _WORD_CHARS)
    return text[: end if end >= 0 else enough + _WORD_CHARS]


def _instant_clip() -> Any:
    try:
        import instant_clip_tokenizer
    except ImportError as error:
        raise ConfigError(
            "tokenizer.vocab clip needs the package instant_clip_tokenizer, which this machine "
            "does not have; set tokenizer.vocab to the path of a tokenizer.json of CLIP or of "
            "OpenAI's bpe_simple_vocab_16e6.txt.gz: the ids are the same"
        ) from error
    return instant_clip_tokenizer.Tokenizer()


def _byte_letters() -> list[str]:
    """Return the letter that stands for each byte, in the order of the ids.

    As `bytes_to_unicode` of openai/CLIP simple_tokenizer.py: printable Latin-1 stands for
    itself and comes first; the other bytes get letters from U+0100 on.
    """
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)]
    return [chr(byte) for byte in own] + [chr(0x100 + n) for n in range(256 - len(own))]


def _word_splitter() -> tokenizers.pre_tokenizers.PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _parse_merges(text: str) -> list[tuple[str, str]]:
    """Return the merges of a file in the form of bpe_simple_vocab_16e6.txt."""
    header, *lines = text.split("\n")
    if "#version" not in header:
        raise ValueError(
            f"starts with {header[:40]!r}; expected a tokenizer.json, or merges under a line "
            "with #version"
        )
    merges = []
    for number, line in enumerate(lines[:CLIP_MERGES], start=2):
        pair = line.split()
        if not pair:
            continue
        if len(pair) != 2:
            raise ValueError(f"line {number} is {line[:40]!r}; expected two tokens")
        merges.append((pair[0], pair[1]))
    return merges


def _from_merges(merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Build the engine of a vocabulary in OpenAI's layout.

    Raises:
        ValueError: a merge joins tokens that no earlier line made.
    """
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Engine

    letters = _byte_letters()
    vocab = {token: n for n, token in enumerate(letters + [x + WORD_END for x in letters])}
    for left, right in merges:
        if left not in vocab or right not in vocab:
            raise ValueError(f"the merge {left!r} {right!r} joins tokens that no earlier one made")
        # Two merges can make one token ("a"+"bc", "ab"+"c"): one id.
        vocab.setdefault(left + right, len(vocab))
    engine = Engine(models.BPE(vocab, merges, end_of_word_suffix=WORD_END))
    engine.pre_tokenizer = _word_splitter()
    engine.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS[0]]
    )
    return engine


def _from_tokenizer_json(text: str) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Engine

    try:
        engine = Engine.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"not a tokenizer.json: {error}") from error
    # Truncation and padding are ours; a file may bring its own.
    engine.no_truncation()
    engine.no_padding()
    return engine


def _start_id(backend: tokenizers.Tokenizer) -> int:
    """Return the start token's id, after a check that the end token's is the highest.

    Raises:
        ConfigError: there is no such pair of tokens, or the order is another.
    """
    for start, end in SPECIAL_TOKENS:
        start_id, end_id = backend.token_to_id(start), backend.token_to_id(end)
        if start_id is not None and end_id is not None:
            highest = backend.get_vocab_size() - 1
            if end_id != highest:
                raise ConfigError(
                    f"{end} has id {end_id} of {highest + 1}; expected the highest, because the "
                    "text tower finds the end of a caption by it"
                )
            return start_id
    raise ConfigError(
        "the vocabulary has no start and end token; expected "
        + " or ".join(" and ".join(pair) for pair in SPECIAL_TOKENS)
    )


def _learn_merges(captions: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Return up to `count` merges (of new tokens) that byte-pair encoding learns.

    The trainer's own end_of_word_suffix is not used: it numbers the suffixed letters in the
    order of a randomly seeded hash map, and breaks ties by these numbers. Here a word's last
    letter is shifted to a private one of its own, so all 512 letters are numbered beforehand.
    """
    from tokenizers import Tokenizer as Engine
    from tokenizers import models, pre_tokenizers, trainers

    letters = _byte_letters()
    splitter = _word_splitter()
    last = {letter: chr(0xE000 + n) for n, letter in enumerate(letters)}
    suffixed = {private: letter + WORD_END for letter, private in last.items()}

    def texts() -> Iterable[str]:
        for caption in captions:
            pieces = (piece for piece, _ in splitter.pre_tokenize_str(clean(caption)))
            # The trainer takes minutes over a word of a megabyte, which is none.
            words = (piece for piece in pieces if len(piece) <= _TOKEN_CHARS)
            yield " ".join(word[:-1] + last[word[-1]] for word in words)

    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=512 + count,
        min_frequency=2,
        initial_alphabet=[*letters, *suffixed],
        show_progress=False,
    )
    engine.train_from_iterator(texts(), trainer)
    learnt = json.loads(engine.to_str())["model"]["merges"]
    merges = [(left, right) for left, right in learnt]
    return [
        ("".join(suffixed.get(x, x) for x in left), "".join(suffixed.get(x, x) for x in right))
        for left, right in merges
    ]
