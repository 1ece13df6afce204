"""FLUID's encoder: one tower over frames and texts, whatever fills its tensors up."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="FLUID's encoder is made of its models")

from fluid_pairs import DIM, LANGUAGE, PATCH, VISION, drawn, small  # noqa: E402

from livrec_fast.systems.fluid import encoder_inputs  # noqa: E402
from livrec_fast.systems.fluid.encoder import Encoder  # noqa: E402
from livrec_fast.systems.fluid.encoder_inputs import (  # noqa: E402
    Content,
    ContentReader,
    RawContent,
    shares,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
WORDS = ["title", "screen", "speech", "author", "comments", "tags", *"abcdefgh", ":", "|", "?"]


@pytest.fixture(scope="module")
def encoder():
    return small().eval()


@pytest.fixture(scope="module")
def mixed():
    """Rows with frames and text, frames only, text only, and neither."""
    return drawn([2, 3, 0, 0, 1], [3, 0, 5, 0, 4])


def row(content, at):
    """Return one row, with no padding."""
    frames = slice(int(content.offsets[at]), int(content.offsets[at + 1]))
    words = content.tokens[at][content.token_mask[at]][None]
    pixels, mask, grids = content.pixels[frames], content.pixel_mask[frames], content.grids[frames]
    offsets = torch.tensor([0, len(pixels)])
    return Content(words, torch.ones_like(words, dtype=torch.bool), pixels, mask, grids, offsets)


def by_hand(encoder, content):
    """Return the vector of one row, frame by frame, from its parts."""
    parts = []
    for pixels, mask, grid in zip(content.pixels, content.pixel_mask, content.grids, strict=True):
        seen = encoder.vision(
            pixel_values=pixels[mask][None], pixel_attention_mask=mask[mask][None],
            spatial_shapes=grid[None],
        ).last_hidden_state  # fmt: skip
        parts.append(encoder.projector(seen[0]))
    ids = torch.cat([content.tokens[0], torch.tensor([39])])
    parts.append(encoder.language.embed_tokens(ids))
    read = encoder.language(inputs_embeds=torch.cat(parts)[None]).last_hidden_state[0, -1]
    return F.normalize(encoder.output(read), dim=0)


def test_vectors_are_of_the_asked_width_and_length_1(encoder, mixed):
    with torch.no_grad():
        z = encoder(mixed)
    assert z.shape == (5, DIM) and z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))
    assert torch.pdist(z).min() > 1e-2  # all different
    assert encoder(drawn([], [])).shape == (0, DIM)


def test_each_row_is_what_its_parts_give_one_after_the_other(encoder, mixed):
    with torch.no_grad():
        z = encoder(mixed)
        for at in range(len(mixed)):
            torch.testing.assert_close(z[at], by_hand(encoder, row(mixed, at)), **CLOSE)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_texts_and_of_patches_changes_nothing(encoder, mixed, side):
    by = torch.argsort((~mixed.token_mask).int(), dim=1, stable=True, descending=side == "left")
    tokens, mask = mixed.tokens.gather(1, by), mixed.token_mask.gather(1, by)
    wide = (0, 3) if side == "right" else (3, 0)
    padded = replace(
        mixed, tokens=F.pad(tokens, wide), token_mask=F.pad(mask, wide),
        pixels=F.pad(mixed.pixels, (0, 0, 0, 4)), pixel_mask=F.pad(mixed.pixel_mask, (0, 4)),
    )  # fmt: skip
    filled = replace(
        padded, tokens=torch.where(padded.token_mask, padded.tokens, 17),
        pixels=torch.where(padded.pixel_mask[..., None], padded.pixels, 9.0),
    )  # fmt: skip
    with torch.no_grad():
        wanted = encoder(mixed)
        torch.testing.assert_close(encoder(padded), wanted, **CLOSE)
        torch.testing.assert_close(encoder(filled), wanted, **CLOSE)


def test_the_number_of_frames_of_other_rows_changes_nothing(encoder):
    one, more = drawn([2, 1, 1], [3, 2, 4], seed=1), drawn([2, 7, 0], [3, 6, 1], seed=2)
    mixture = replace(more, tokens=more.tokens.clone(), pixels=more.pixels.clone())
    mixture.tokens[0, :3] = one.tokens[0, :3]
    for name in ("pixels", "pixel_mask", "grids"):
        getattr(mixture, name)[:2] = getattr(one, name)[:2]
    with torch.no_grad():
        wanted = encoder(row(one, 0))[0]
        torch.testing.assert_close(encoder(one)[0], wanted, **CLOSE)
        torch.testing.assert_close(encoder(mixture)[0], wanted, **CLOSE)
        assert not torch.allclose(encoder(more)[0], wanted, **CLOSE)


@pytest.mark.parametrize("change", ["word", "pixel", "order of frames", "order of words", "drop"])
def test_what_is_shown_and_said_and_in_which_order_counts(encoder, change):
    content = drawn([3], [4], seed=3)
    tokens, pixels, frames = content.tokens.clone(), content.pixels.clone(), [0, 1, 2]
    if change == "word":
        tokens[0, 0] += 1
    elif change == "order of words":
        tokens = tokens.flip(1)
    elif change == "pixel":
        pixels[0, 0] += 1
    else:
        frames = [2, 1, 0] if change == "order of frames" else [0, 1]
    other = Content(
        tokens, content.token_mask, pixels[frames], content.pixel_mask[frames],
        content.grids[frames], torch.tensor([0, len(frames)]),
    )  # fmt: skip
    with torch.no_grad():
        assert (encoder(content) - encoder(other)).abs().max() > 1e-3


def test_encoding_keeps_modes_and_takes_rows_at_a_time(mixed):
    encoder = small(attention_dropout=0.5)
    encoder.vision.train()
    encoder.language.eval()
    wanted = encoder.encode(mixed)
    assert encoder.vision.training and not encoder.language.training and not wanted.requires_grad
    for rows in (1, 2, 9):
        torch.testing.assert_close(encoder.encode(mixed, rows), wanted, **CLOSE)
    assert encoder.encode(drawn([], []), 2).shape == (0, DIM)


def test_a_saved_encoder_is_read_back_as_it_was(tmp_path, mixed):
    encoder = small(seed=3)
    encoder.vision.bfloat16()
    encoder.save(tmp_path / "encoder")
    again = Encoder.load(tmp_path / "encoder")
    assert torch.equal(again.encode(mixed), encoder.encode(mixed))
    state = encoder.state_dict()
    assert all(torch.equal(t, state[n]) and t.dtype == state[n].dtype
               for n, t in again.state_dict().items())  # fmt: skip
    assert all(p.requires_grad for p in again.parameters()) and again.eos == 39
    assert not torch.equal(small(seed=4).encode(mixed), encoder.encode(mixed))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(small(seed=3).output.weight, encoder.output.weight)
    assert torch.equal(torch.get_rng_state(), before)
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        Encoder.load(tmp_path / "other")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Return folders of a whole SigLIP2 and of a Qwen3 with its head, and both models."""
    folder, text = tmp_path_factory.mktemp("pretrained"), {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 30,
        "num_attention_heads": 2, "projection_size": 16, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(1)
    both = transformers.Siglip2Config(vision_config=VISION, text_config=text)
    vision = transformers.Siglip2Model(both)
    language = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LANGUAGE))
    vision.save_pretrained(folder / "vision")
    language.save_pretrained(folder / "language")
    return folder, vision.vision_model.state_dict(), language.model.state_dict()


def test_pretrained_models_are_read_from_folders(pretrained, mixed):
    folder, vision, language = pretrained
    encoder = Encoder.from_pretrained(folder / "vision", folder / "language", dim=DIM)
    own = encoder.vision.state_dict()
    assert own.keys() == {name for name in vision if not name.startswith("head.")}
    assert all(torch.equal(vision[name], own[name]) for name in own)
    own = encoder.language.state_dict()
    assert own.keys() == language.keys()
    assert all(torch.equal(language[name], own[name]) for name in own)
    low = Encoder.from_pretrained(
        folder / "vision", folder / "language", dim=DIM, dtype=torch.bfloat16
    )
    assert {p.dtype for p in low.vision.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in low.projector.parameters()} == {torch.float32}
    assert torch.cosine_similarity(low.encode(mixed), encoder.encode(mixed)).min() > 0.98


def test_other_models_and_half_ones_are_refused(pretrained, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = pretrained[0]
    with pytest.raises(ValueError, match="holds a model of type 'siglip2', not 'qwen3'"):
        Encoder.from_pretrained(folder / "vision", folder / "vision")
    with pytest.raises(ValueError, match="holds a model of type 'qwen3', not 'siglip2_vision"):
        Encoder.from_pretrained(folder / "language", folder / "language")
    tensors = load_file(folder / "language" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / "config.json").write_bytes((folder / "language" / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 are missing, such as layers.1.mlp.up_proj.weight"):
        Encoder.from_pretrained(folder / "vision", tmp_path)
    with pytest.raises(OSError):
        Encoder.from_pretrained(folder / "vision", tmp_path / "nothing")


def test_without_transformers_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="needs transformers 5 or later: pip install 'transf"):
        small()


@pytest.fixture(scope="module")
def reader():
    """Return a reader that knows a few words, with SigLIP2's image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.models.siglip2 import image_processing_pil_siglip2 as images

    vocabulary = {word: at for at, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    processor = images.Siglip2ImageProcessorPil(patch_size=2, max_num_patches=9)
    return ContentReader(fast, processor, most=12)


def words(content, at):
    return [["<unk>", *WORDS][i] for i in content.tokens[at][content.token_mask[at]].tolist()]


def test_raw_content_becomes_lines_of_text_and_frames(reader, encoder):
    frames = [np.full((8, 12, 3), 40 * at, np.uint8) for at in range(3)]
    raw = [
        RawContent(frames[:2], title="a b", comments=["c", "d"]),
        RawContent(title="e"),
        RawContent(frames[2:], speech=" ".join("abcdefgh" * 3), comments=["g", "h"]),
    ]
    content = reader.slices(raw)
    content.check()
    assert words(content, 0) == ["title", ":", "a", "b", "comments", ":", "c", "|", "d"]
    assert words(content, 1) == ["title", ":", "e"]
    assert words(content, 2)[:7] == ["speech", ":", "a", "b", "c", "d", "e"]
    assert words(content, 2)[7:] == ["comments", ":", "g", "|", "h"]  # 12 in all
    assert content.offsets.tolist() == [0, 2, 2, 3] and content.pixels.shape == (3, 9, PATCH)
    with torch.no_grad():
        z = encoder(content)
        torch.testing.assert_close(encoder(reader.slices(raw[1:]))[0], z[1], **CLOSE)
    assert torch.pdist(z).min() > 1e-2
    asked = reader.queries(["a b", "?"])
    assert words(asked, 0) == ["a", "b"] and len(asked.pixels) == 0 and len(reader.slices([])) == 0
    tasked = ContentReader(reader.tokenizer, task="a").queries(["b"])
    assert words(tasked, 0) == ["<unk>", ":", "a", "<unk>", ":", "b"]
    with pytest.raises(ValueError, match="no image processor"):
        ContentReader(reader.tokenizer).slices(raw)


def test_long_texts_are_cut_to_one_bound():
    assert shares([5, 1, 30, 2], 18) == [5, 1, 10, 2] and shares([3, 4], 7) == [3, 4]
    assert shares([9, 9, 9], 10) == [3, 3, 4] and shares([], 3) == [] and shares([4], 0) == [0]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"tokens": torch.zeros(5, 5)}, TypeError, "tokens: dtype must be one of int64"),
        ({"tokens": torch.full((5, 5), 40)}, IndexError, r"tokens: 40 is outside \[0, 40\)"),
        ({"tokens": torch.full((5, 5), -1)}, IndexError, "tokens: -1 is outside"),
        ({"token_mask": torch.ones(5, 4).bool()}, ValueError, r"token_mask: shape .* \[5, 5\]"),
        ({"pixels": torch.zeros(6, 9, 5)}, ValueError, "a patch must have 12 values, got 5"),
        ({"grids": torch.full((6, 2), 2)}, ValueError, r"does not fit a pixel_mask of"),
        ({"offsets": torch.tensor([0, 1, 2, 3, 4, 5])}, ValueError, "offsets: the last must be"),
    ],
)
def test_content_that_cannot_be_is_refused(encoder, mixed, change, error, message):
    with pytest.raises(error, match=message):
        encoder(replace(mixed, **change))


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"eos: must be a token in \[0, 40\), got 40"):
        Encoder.from_settings(VISION, {**LANGUAGE, "eos_token_id": None}, eos=40)
    with pytest.raises(ValueError, match="dim: must be at least 1, got 0"):
        Encoder.from_settings(VISION, LANGUAGE, dim=0)
    with pytest.raises(ValueError, match="most: must be at least 1, got 0"):
        ContentReader(None, most=0)
    assert encoder_inputs.INSTALL.startswith("pip install")
