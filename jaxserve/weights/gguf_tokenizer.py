"""The tokenizer inside a GGUF file, rebuilt with ``tokenizers``: byte-level BPE (``gpt2``) or SPM (``llama``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from jaxserve.errors import TokenizerError
from jaxserve.weights.generation import union
from jaxserve.weights.gguf_file import GGUFFile
from jaxserve.weights.pretokenizers import pre_tokenizer
from jaxserve.weights.transformers_import import import_transformers

# Token types of the file.
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6

# A chat model's end-of-turn token ends its answer even where the file names only the base model's EOS, as many do.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")
SPACE = "\u2581"


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's metadata, checked."""

    where: str
    kind: str  # "gpt2" or "llama"
    tokens: Sequence[str]
    types: Sequence[int]
    values: dict[str, Any]  # all of tokenizer.ggml.*, without the prefix

    def token(self, role: str) -> str | None:
        """The token of ``role`` (bos, eos, unknown, padding), if the file names one."""
        token_id = self.values.get(f"{role}_token_id")
        return None if token_id is None else self.tokens[token_id]


def read_vocabulary(file: GGUFFile) -> Vocabulary:
    """The vocabulary of a GGUF file.

    Raises:
        TokenizerError: none in the file, a kind that isn't known, or lists that don't fit together.
    """
    prefix, where = "tokenizer.ggml.", str(file.path)
    values = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    kind = values.get("model")
    if kind is None or "tokens" not in values:
        raise TokenizerError(f"{where!r} holds no tokenizer; pass tokenizer= a directory with tokenizer.json")
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(f"tokenizer.ggml.model of {where!r} is {kind!r}; known: gpt2, llama")
    tokens = values["tokens"]
    types = values["token_type"].tolist() if "token_type" in values else [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise TokenizerError(f"{where!r} has {len(tokens)} tokens and {len(types)} token types")
    if len(set(tokens)) != len(tokens):
        raise TokenizerError(f"{where!r} has {len(tokens) - len(set(tokens))} tokens twice in its vocabulary")
    for key, value in values.items():
        if key.endswith("_token_id") and not (isinstance(value, int) and 0 <= value < len(tokens)):
            raise TokenizerError(f"tokenizer.ggml.{key} of {where!r} is {value!r}; expected 0 to {len(tokens) - 1}")
    return Vocabulary(where, kind, tokens, types, values)


def gguf_eos_ids(file: GGUFFile) -> tuple[int, ...]:
    """The tokens that end an answer: EOS, end of turn, end of message. Empty where the file has no known tokenizer."""
    try:
        vocabulary = read_vocabulary(file)
    except TokenizerError:
        return ()  # the weights may still be used with another tokenizer; loading this one raises the error
    named = [vocabulary.values.get(f"{role}_token_id") for role in ("eos", "eot", "eom")]
    ends = [
        i
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind == CONTROL and token in END_OF_TURN
    ]
    return union(tuple(i for i in named if i is not None), tuple(ends))


def gguf_tokenizer(file: GGUFFile) -> Any:
    """The file's tokenizer as a ``transformers.PreTrainedTokenizerFast``, chat template included.

    Raises:
        TokenizerError: the file has none, or one of a kind or with a ``pre`` that isn't known.
    """
    vocabulary = read_vocabulary(file)
    tokenizer, add_bos = _byte_level(vocabulary) if vocabulary.kind == "gpt2" else _sentence_piece(vocabulary)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: token for name, role in roles.items() if (token := vocabulary.token(role)) is not None}
    _add_template(vocabulary, tokenizer, special, bool(vocabulary.values.get("add_bos_token", add_bos)))
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_chat_template(file),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    rule = pre_tokenizer(vocabulary.values.get("pre"), vocabulary.where)
    merges = [tuple(merge.split(" ", 1)) for merge in vocabulary.values.get("merges", ())]
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    for merge in merges:
        if len(merge) != 2 or merge[0] not in ids or merge[1] not in ids or "".join(merge) not in ids:
            raise TokenizerError(f"merge {' '.join(merge)!r} of {vocabulary.where!r} isn't made of known tokens")
    tokenizer = Tokenizer(BPE(ids, merges, ignore_merges=rule.ignore_merges))
    if (normalizer := rule.normalizer()) is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = rule.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.add_bos


def _sentence_piece(vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE merges the neighbours whose union scores best; ranked by score, that is ordinary BPE."""
    scores = vocabulary.values.get("scores")
    if scores is None or len(scores) != len(vocabulary.tokens):
        raise TokenizerError(f"{vocabulary.where!r} has no score for each of its {len(vocabulary.tokens)} tokens")
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(
        BPE(
            ids,
            _ranked_merges(vocabulary, scores.tolist()),
            unk_token=vocabulary.token("unknown"),
            fuse_unk=True,
            byte_fallback=BYTE in vocabulary.types,
        )
    )
    prefix = vocabulary.values.get("add_space_prefix", True)
    escape = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape]) if prefix else escape
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer, True


def _ranked_merges(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first; equal scores by the ids of the halves."""
    pieces = {
        token: i
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (NORMAL, USER_DEFINED)
    }

    def joins() -> Iterator[tuple[float, int, int, tuple[str, str]]]:
        for token, i in pieces.items():
            for at in range(1, len(token)):
                left, right = token[:at], token[at:]
                if left in pieces and right in pieces:
                    yield -scores[i], pieces[left], pieces[right], (left, right)

    return [merge for *_, merge in sorted(joins())]


def _add_template(vocabulary: Vocabulary, tokenizer: Tokenizer, special: dict[str, str], add_bos: bool) -> None:
    """BOS before and EOS after every text, as the file asks."""
    parts = ["$A"]
    if add_bos and "bos_token" in special:
        parts.insert(0, special["bos_token"])
    if vocabulary.values.get("add_eos_token", False) and "eos_token" in special:
        parts.append(special["eos_token"])
    around = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(parts) if token != "$A"]
    if vocabulary.kind == "gpt2" and not around:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    elif around:
        tokenizer.post_processor = processors.TemplateProcessing(single=parts, special_tokens=around)


def _chat_template(file: GGUFFile) -> str | dict[str, str] | None:
    """The template, or all of them by name where the file has several."""
    prefix = "tokenizer.chat_template"
    named = {
        key.removeprefix(f"{prefix}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{prefix}.") and isinstance(value, str)
    }
    default = file.metadata.get(prefix)
    if not named:
        return default
    return named if default is None else {"default": default} | named
