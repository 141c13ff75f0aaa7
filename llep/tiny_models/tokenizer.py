"""A byte-level BPE tokenizer, trained here and now on sources of the Python standard library, and its chat template."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llep.errors import LlepError
from llep.tiny_models.options import Kind, Options

MAX_TRAINED = 2048
CORPUS = (
    "argparse configparser difflib doctest http.server inspect logging optparse pdb pickle smtplib subprocess tarfile "
    "textwrap threading typing"
).split()

# Harmony's special tokens at the ids that vLLM's chat uses for gpt-oss, and the two plain tokens of a reply's opening:
# vLLM ends the prompt with <|start|>assistant, and the reply is <|channel|>final<|message|>text<|return|>.
HARMONY = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
}
HARMONY_ASSISTANT = 173781
HARMONY_FINAL = 17196
# vLLM decodes a chat reply of gpt-oss with harmony's own vocabulary, in which the same ids mean other text. Bit i says
# whether token i is printable ASCII there: the model says only those, so that chat reads as text too.
HARMONY_PRINTABLE = int(
    "9979fbffbfef57bffffe5dffecffdfeffd7d5ca5a7ff7514eefa79dfeddfded65f759fbfefd5bf623b93ff3fb2ff88ae7fbbfadf"
    "f6f66f7f7c7d6f91776adfebd257bff9fcfe7b7b13fc59f7b5fdfbb4ebc5fefefee79ef9bfed99bffaee7b7ff3f36dfbeff37a9e"
    "aafbb6f6f9e6ffb59aab757bf6abeb63bed7fd6ffdb9f71ce267efb7f997fd3ed2cb7bf64fdc7faff2e77bb7dcfedcf8ec9ee7e2"
    "d12d9ebcee96dd67af6d71c6dddef3fb1aed4e7fe6eaf76b1fbe97ff87ff2ff4d7f7f657dfaefdffedfd3ff9b335dbfdafdfdfdb"
    "5db96abffddb577e9ff66ffffd7fffff00000000100000000000000000000000000000003fffffffffffffffffffffff",
    16,
)
HARMONY_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TinyTokenizer:
    """The tokenizer's JSON and what the model's weights need to know of it."""

    json: str
    special: dict[str, int]
    spoken: list[int]  # tokens of printable ASCII: what the model says at random, from frequent to rare in text

    @property
    def end(self) -> int:
        """The token that ends a reply."""
        return self.special.get("<|return|>", self.special.get("<|im_end|>", -1))

    @property
    def ends(self) -> list[int]:
        """All tokens at which vLLM stops."""
        return [
            self.special[text]
            for text in ("<|return|>", "<|im_end|>", "<|call|>", "<|endoftext|>")
            if text in self.special
        ]


def train(options: Options, texts: Iterable[str] | None = None) -> TinyTokenizer:
    """Merges from `texts`, as many as the vocabulary has room for; else MAX_TRAINED, from the standard library."""
    special = _special_tokens(options)
    room = min(special.values())
    trained = json.loads(_train_tiny_bpe(min(room, MAX_TRAINED)) if texts is None else _train_bpe(texts, room))
    vocab: dict[str, int] = trained["model"]["vocab"]
    spoken = sorted(id for text, id in vocab.items() if _is_printable(text))
    if options.has_harmony:
        spoken = [id for id in spoken if HARMONY_PRINTABLE >> id & 1]
    vocab.update(special)
    trained["added_tokens"] = [_added_token(text, id) for text, id in special.items()]
    return TinyTokenizer(json.dumps(trained, ensure_ascii=False), special, spoken)


def config(options: Options, tokenizer: TinyTokenizer) -> dict[str, Any]:
    """tokenizer_config.json."""
    texts = {id: text for text, id in tokenizer.special.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": options.max_positions,
        "clean_up_tokenization_spaces": False,
        "eos_token": texts[tokenizer.end],
        "pad_token": "<|endoftext|>",
        "chat_template": HARMONY_TEMPLATE if options.kind is Kind.GPT_OSS else CHATML_TEMPLATE,
    }


def _special_tokens(options: Options) -> dict[str, int]:
    if options.has_harmony:
        return HARMONY
    texts = tuple(HARMONY) if options.kind is Kind.GPT_OSS else CHATML
    first = options.vocab_size - len(texts)
    return {text: first + index for index, text in enumerate(texts)}


@functools.cache
def _train_tiny_bpe(size: int) -> str:
    return _train_bpe(_corpus(), size)


def _train_bpe(texts: Iterable[str], size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


def _corpus() -> Iterator[str]:
    found = False
    for name in CORPUS:
        spec = importlib.util.find_spec(name)
        source = spec.loader.get_source(name) if spec and isinstance(spec.loader, SourceFileLoader) else None
        if source:
            found = True
            yield source
    if not found:
        raise LlepError(
            "the tokenizer is trained on the sources of Python's standard library, and this Python has none: "
            "install the package that brings them (on Debian libpython3-stdlib)"
        )


def _is_printable(text: str) -> bool:
    """Whether a byte-level token is printable ASCII with spaces (Ġ stands for a space)."""
    return all("!" <= character <= "~" or character == "Ġ" for character in text)


def _added_token(text: str, id: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": text, **flags, "special": True}
