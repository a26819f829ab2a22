"""Weights on encoder output, against the formulas written out with a tiny text encoder; blends, chunks, the ports."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reverie.errors import RequestError
from reverie.nets.clip_text import ClipText, ClipTextConfig
from reverie.text.chunks import chunked
from reverie.text.embed import MOST_ROWS, WEIGHTINGS, Embedder, Encoding, Tokens, same_length
from reverie.text.pieces import Section, Stage
from reverie.text.prompt import DIALECTS, parse
from reverie.text.tokenizer import ClipTokenizer

LENGTH, WIDTH = 10, 16
TOKENIZER = ClipTokenizer.published(max_length=LENGTH)
TEXT = "a (red:1.5) cat [dog]"


def text_encoder() -> ClipText:
    torch.manual_seed(0)
    shape = ClipTextConfig(width=WIDTH, inner_width=32, layers=2, heads=2, positions=LENGTH)
    return ClipText(shape).requires_grad_(False)


CLIP = text_encoder()


def encode(tokens: Tokens) -> Encoding:
    """The port, with the vector at the end of the text as the pooled one."""
    hidden = CLIP(tokens.ids, vectors=tokens.vectors, mask=tokens.mask)
    ends = (tokens.ids == TOKENIZER.eos).int().argmax(1)
    return Encoding(hidden, hidden[torch.arange(len(hidden)), ends])


def stage(text: str, dialect: str = "a1111") -> Stage:
    return parse(text, dialect=dialect, steps=1).parts[0].stages[0][1]


def embedder(dialect: str = "a1111", **options: object) -> Embedder:
    chosen = DIALECTS[dialect]
    return Embedder(TOKENIZER, encode, **{"weighting": chosen.weighting, "split": chosen.split} | options)  # type: ignore[arg-type]


def context(text: str, dialect: str = "a1111", **options: object) -> Tensor:
    return embedder(dialect, **options)(stage(text, dialect)).hidden


def rows(text: str) -> Tensor:
    """The hidden states of a text that fits, without this project's prompts: `(1, L, D)`."""
    hidden: Tensor = CLIP(torch.tensor([TOKENIZER(text).ids]))
    return hidden


# The positions of TEXT's words: BOS a red cat dog EOS.
WEIGHTS = torch.tensor([1, 1, 1.5, 1, 1 / 1.1, *[1.0] * 5])[None, :, None]


def a1111_original() -> Tensor:
    weighted = rows("a red cat dog") * WEIGHTS
    return weighted * (rows("a red cat dog").mean() / weighted.mean())


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("original", a1111_original),
        ("no_norm", lambda: rows("a red cat dog") * WEIGHTS),
        ("ignore", lambda: rows("a red cat dog")),
        ("interpolate", lambda: rows("") + (rows("a red cat dog") - rows("")) * WEIGHTS),
        ("comfy", lambda: rows("") + (rows("a red cat dog") - rows("")) * WEIGHTS),
    ],
)
def test_weights_act_as_their_formula_says(weighting: str, expected: Callable[[], Tensor]) -> None:
    # One multiplication and one division more or less: a few units in the last place of float32.
    torch.testing.assert_close(context(TEXT, weighting=weighting), expected(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", list(WEIGHTINGS))
@pytest.mark.parametrize("text", ["", "a red cat", "a very long prompt, with far more words than one chunk has"])
def test_without_weights_nothing_is_touched(weighting: str, text: str) -> None:
    ids = torch.tensor([chunk.ids for chunk in chunked(Section(stage(text, "plain").sections[0].pieces), TOKENIZER)])  # type: ignore[union-attr]
    assert torch.equal(context(text, "plain", weighting=weighting), CLIP(ids).flatten(0, 1)[None])


def test_each_chunk_keeps_its_own_mean() -> None:
    hidden = context("(red:3) cat BREAK blue (dog:0.2)").view(1, 2, LENGTH, WIDTH)
    for found, text in zip(hidden[0], ("red cat", "blue dog"), strict=True):
        torch.testing.assert_close(found.mean(), rows(text).mean(), rtol=1e-4, atol=1e-7)
    alone = context("(red:3) cat")
    torch.testing.assert_close(hidden[0, 0], alone[0])


def test_weights_of_nothing_give_nothing() -> None:
    # All words at 0: the mean cannot be restored by a factor where it is 0, and is finite elsewhere.
    assert torch.isfinite(context("(a:0)")).all()
    zero = Embedder(TOKENIZER, lambda tokens: Encoding(torch.zeros(*tokens.ids.shape, WIDTH)))
    assert torch.equal(zero(stage("(a:2)")).hidden, torch.zeros(1, LENGTH, WIDTH))


def test_dialects_choose_their_weighting() -> None:
    torch.testing.assert_close(context("a (red:1.5) cat"), context("a (red:1.5) cat", weighting="original"))
    comfy = context("a (red:1.5) cat", "comfy")
    torch.testing.assert_close(comfy[:, 3:], rows("a red cat")[:, 3:])
    assert not torch.allclose(comfy[:, 2], rows("a red cat")[:, 2])


def masked(text: str, hidden_at: slice) -> Tensor:
    mask = torch.ones(1, LENGTH, dtype=torch.bool)
    mask[:, hidden_at] = False
    result: Tensor = CLIP(torch.tensor([TOKENIZER(text).ids]), mask=mask)
    return result


def test_compel_blends_with_the_prompt_without_what_is_weighted_down() -> None:
    words = "a man eating fish in rain"
    weights = torch.tensor([1, 1, 1.1, 1, 0.5, 1, 0.9, 1, 1, 1])[None, :, None]

    def weighted(hidden: Tensor) -> Tensor:
        return rows("") + (hidden - rows("")) * weights

    with_all = weighted(rows(words))
    without = [weighted(masked(words, slice(4, 5))), weighted(masked(words, slice(6, 7)))]
    shares = [math.tan(0.5 * math.pi / 2), math.tan(0.1 * math.pi / 2)]
    expected = (with_all + shares[0] * without[0] + shares[1] * without[1]) / (1 + sum(shares))
    found = context("a man+ eating (fish)0.5 in rain-", "compel")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_compel_at_weight_0_is_the_prompt_without_it() -> None:
    words = "a man eating fish"
    expected = masked(words, slice(4, 5)).clone()
    expected[:, 4] = rows("")[:, 4]
    # The weight in the blend is tan of almost a right angle, 6e4, instead of infinite.
    torch.testing.assert_close(context("a man eating (fish)0", "compel"), expected, rtol=1e-3, atol=1e-3)


def test_compel_masks_only_the_chunk_of_the_piece() -> None:
    text = "one two three four five six seven. eight (nine)0.5"
    asked: list[Tokens] = []

    def watched(tokens: Tokens) -> Encoding:
        asked.append(tokens)
        return encode(tokens)

    found = embedder("compel")(stage(text, "compel")).hidden
    again = Embedder(TOKENIZER, watched, "compel", "sentences")(stage(text, "compel")).hidden
    assert torch.equal(found, again)
    (mask,) = (tokens.mask for tokens in asked if tokens.mask is not None)
    assert mask.tolist() == [[True, True, False, *[True] * 7]]


def test_blend_is_the_weighted_mean_of_contexts_of_one_length() -> None:
    found = embedder("compel")(stage('("a cat", "b c d e f g h i j k").blend(3, 1)', "compel"))
    long = context("b c d e f g h i j k", "compel")
    short = torch.cat([rows("a cat"), rows("")], dim=1)
    torch.testing.assert_close(found.hidden, (3 * short + long) / 4)
    pooled = [encode(Tokens(torch.tensor([TOKENIZER(text).ids]))).pooled for text in ("a cat", "b c d e f g h i")]
    assert pooled[0] is not None and pooled[1] is not None and found.pooled is not None
    torch.testing.assert_close(found.pooled, (3 * pooled[0] + pooled[1]) / 4)
    raw = context('("a cat", "a dog").blend(1, 0.5, no_normalize)', "compel")
    torch.testing.assert_close(raw, rows("a cat") + 0.5 * rows("a dog"))


def test_conjunction_joins_and_weighs_whole_texts() -> None:
    found = context('("a cat", "a dog").and(1, 0.5)', "compel")
    assert found.shape == (1, 2 * LENGTH, WIDTH)
    assert torch.equal(found[:, :LENGTH], rows("a cat"))
    torch.testing.assert_close(found[:, LENGTH:], (rows("") + rows("a dog")) / 2)


def test_the_pooled_vector_is_the_first_chunks_without_weights() -> None:
    expected = encode(Tokens(torch.tensor([TOKENIZER("red cat").ids]))).pooled
    found = embedder()(stage("(red:1.9) cat BREAK dog")).pooled
    assert expected is not None and found is not None
    torch.testing.assert_close(found, expected)


def test_an_encoder_without_pooled_vectors_gives_none() -> None:
    assert Embedder(TOKENIZER, lambda tokens: Encoding(CLIP(tokens.ids)))(stage("a BREAK b")).pooled is None


def test_vectors_stand_in_for_their_word() -> None:
    vectors = {"cat": torch.randn(3, WIDTH), "dog": torch.randn(1, WIDTH)}
    found = context("a (cat:2) is a dog BREAK dog", vectors=vectors, weighting="ignore")
    a, is_ = TOKENIZER.encode("a is")
    table = CLIP.text_model.embeddings.token_embedding.weight
    words = torch.stack([table[a], *vectors["cat"], table[is_], table[a], *vectors["dog"]])
    ids = torch.tensor([TOKENIZER.frame([0] * len(words)).ids])
    torch.testing.assert_close(found[:, :LENGTH], CLIP(ids, vectors=[(0, 1, words)]))
    torch.testing.assert_close(
        found[:, LENGTH:], CLIP(torch.tensor([TOKENIZER("!").ids]), vectors=[(0, 1, vectors["dog"])])
    )


def test_a_vector_has_the_weight_of_its_piece() -> None:
    vectors = {"cat": torch.randn(2, WIDTH)}
    plain = context("a cat", vectors=vectors)
    found = context("a (cat:2)", vectors=vectors, weighting="no_norm")
    torch.testing.assert_close(found[:, 2:4], plain[:, 2:4] * 2)
    torch.testing.assert_close(found[:, 4:], plain[:, 4:])


def test_half_precision_stays_and_is_weighted_in_float32() -> None:
    half = Embedder(TOKENIZER, lambda tokens: Encoding(encode(tokens).hidden.bfloat16()))
    found = half(stage(TEXT)).hidden
    assert found.dtype == torch.bfloat16
    expected = half(stage("a red cat dog")).hidden.float() * WEIGHTS
    expected *= half(stage("a red cat dog")).hidden.float().mean() / expected.mean()
    assert torch.equal(found, expected.bfloat16())


def test_very_long_prompts_are_encoded_a_few_chunks_at_a_time() -> None:
    sizes: list[int] = []

    def watched(tokens: Tokens) -> Encoding:
        sizes.append(len(tokens.ids))
        return encode(tokens)

    found = Embedder(TOKENIZER, watched)(stage("cat " * (LENGTH - 2) * 40)).hidden
    assert found.shape == (1, 40 * LENGTH, WIDTH)
    assert max(sizes) == MOST_ROWS
    torch.testing.assert_close(found[0, -LENGTH:], rows("cat " * (LENGTH - 2))[0])


def test_contexts_are_padded_with_the_empty_prompt() -> None:
    short, long = context("a"), context("a BREAK b BREAK c")
    padded, same = same_length([short, long], embedder().empty.hidden)
    assert torch.equal(padded, torch.cat([short, rows(""), rows("")], dim=1))
    assert torch.equal(same, long)


def test_an_unknown_weighting_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown emphasis 'origin'; did you mean 'original'"):
        context("(a:2)", weighting="origin")
