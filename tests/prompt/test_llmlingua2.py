"""LLMLingua-2 against a reference of its steps, with tiny random classifiers for WordPiece and for Unigram."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from tcw.errors import UsageError
from tcw.prompt import Prompt, Unit
from tcw.prompt.llmlingua2 import Llmlingua2, chunks
from tcw.prompt.scorer import Tokens
from tcw.prompt.units import cut

LONGEST = 24  # tokens of a piece with its special ones
SYLLABLES = ["ba", "do", "ki", "lu", "me", "no", "ra", "si", "tu", "ve"]


def words(count: int, seed: int = 0) -> str:
    draw = np.random.default_rng(seed)
    found = []
    for i in range(count):
        found.append("".join(draw.choice(SYLLABLES, draw.integers(1, 4))) + ("." if draw.random() < 0.15 else ""))
        found.append("\n" if i % 17 == 16 else " ")
    return "".join(found)


TEXT = words(80)


def wordpiece() -> Any:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", *SYLLABLES, *[f"##{s}" for s in SYLLABLES]]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def unigram() -> Any:
    """As XLM-R's: the white space before a word is part of its first token."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), (".", -2.0)]
    pieces += [(s, -3.0) for s in SYLLABLES] + [(f"▁{s}", -2.5) for s in SYLLABLES]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def folder_of(place: Path, kind: str, labels: int = 2) -> str:
    torch.manual_seed(0)
    tokenizer = wordpiece() if kind == "Bert" else unigram()
    config = getattr(transformers, f"{kind}Config")(
        **SHAPE, vocab_size=len(tokenizer), max_position_embeddings=LONGEST + (2 if kind != "Bert" else 0),
        pad_token_id=tokenizer.pad_token_id, num_labels=labels,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForTokenClassification")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module", params=["Bert", "XLMRoberta"])
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder_of(tmp_path_factory.mktemp(request.param), request.param)


def reference(folder: str, text: str, longest: int) -> tuple[list[list[float]], list[int]]:
    """The steps one after another: the probabilities of each word's tokens, and the piece in which each word begins.

    Words are what white space parts; tokens are brought to them by counting characters, without offsets.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    spelt, ids = [], []
    for match in re.finditer(r"\s*\S+", text):
        new_line = "\n" in match.group()
        own = tokenizer(match.group(), add_special_tokens=False)["input_ids"]
        spelt += [(new_line and i == 0, tokenizer.convert_ids_to_tokens(t)) for i, t in enumerate(own)]
        ids += [(len(ids), own)]
    flat, owner = [t for _, own in ids for t in own], [n for n, (_, own) in enumerate(ids) for _ in own]
    ends, low = [], 0
    while len(flat) - low > longest:
        cut_at = low + longest
        while cut_at > low and not (spelt[cut_at - 1][1] in (".", "▁.") or spelt[cut_at][0]):
            cut_at -= 1
        low = cut_at if cut_at > low else low + longest
        ends.append(low)
    found: list[list[float]] = [[] for _ in ids]
    pieces: dict[int, int] = {}
    first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    for piece, (a, b) in enumerate(zip([0, *ends], [*ends, len(flat)], strict=True)):
        with torch.inference_mode():
            p = model(input_ids=torch.tensor([[first, *flat[a:b], last]])).logits[0].double().softmax(-1)[1:-1, 1]
        for i in range(a, b):
            found[owner[i]].append(float(p[i - a]))
            pieces.setdefault(owner[i], piece)
    return found, [pieces[n] for n in range(len(ids))]


def prompt_of(text: str) -> Prompt:
    return Prompt(text, [Unit(*span) for span in cut(text)], device="cpu")


@pytest.mark.parametrize("word", ["mean", "first"])
@pytest.mark.parametrize("batch", [1, 50])
def test_parity(classifier: str, word: str, batch: int) -> None:
    found = Llmlingua2(model=classifier, word=word, batch=batch).scores(prompt_of(TEXT))
    expected, _ = reference(classifier, TEXT, LONGEST - 2)
    expected = [np.mean(p) if word == "mean" else p[0] for p in expected]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.std() > 0.1, "the classifier says something"


def test_chunk_scope_gives_each_piece_the_same_share(classifier: str) -> None:
    found = Llmlingua2(model=classifier, scope="chunk").scores(prompt_of(TEXT))
    plain = Llmlingua2(model=classifier).scores(prompt_of(TEXT))
    _, pieces = reference(classifier, TEXT, LONGEST - 2)
    for piece in set(pieces):
        own = [i for i, p in enumerate(pieces) if p == piece]
        assert sorted(found[own].tolist()) == [i / len(own) for i in range(len(own))]
        assert np.argsort(found[own]).tolist() == np.argsort(plain[own]).tolist()


def test_no_model_is_named() -> None:
    with pytest.raises(UsageError, match="checkpoint") as caught:
        Llmlingua2().scores(prompt_of(TEXT))
    assert "model=" in caught.value.hint


def test_a_classifier_of_three_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 labels"):
        Llmlingua2(model=folder_of(tmp_path, "Bert", labels=3)).scores(prompt_of(TEXT))


@pytest.mark.parametrize("text", ["", " \n ", "ba"])
def test_next_to_nothing(classifier: str, text: str) -> None:
    for scope in ("global", "chunk"):
        prompt = prompt_of(text)
        found = Llmlingua2(model=classifier, scope=scope).scores(prompt)
        assert found.shape == (len(prompt.units),)
        assert np.isfinite(found).all()


def test_pieces_end_where_sentences_or_lines_do() -> None:
    text = "a b. c d e\nf g h i j k"
    spans = np.array([m.span() for m in re.finditer(r"\s*[a-z]|\.", text)])
    tokens = Tokens(np.arange(len(spans)), spans)  # a b . c d e f g h i j k
    assert list(chunks(tokens, text, 4)) == [(0, 3), (3, 6), (6, 10), (10, 12)]
    assert list(chunks(tokens, text, 12)) == [(0, 12)]


def test_options() -> None:
    with pytest.raises(ValueError, match="batch"):
        Llmlingua2(batch=0)
