"""What token policies are checked on, with a processor and without."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from tcw.verify.token_inputs import Pictures, Questions, Texts, drawn, noise_ids
from tests.tokens.models import IMAGE, SIDE, VLMS

TEMPLATE = (
    "{% for turn in messages %}{% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}:"
)


def letters():
    words = {chr(32 + i): i + 3 for i in range(95)} | {"<unk>": 1, "<pad>": 0, "<image>": IMAGE}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<image>"]
    )


@pytest.fixture(scope="module")
def llava():
    return VLMS["llava"]()


@pytest.fixture(scope="module")
def pictures():
    return Pictures([drawn(n)[::4, ::4].copy() for n in range(2)], "a test")


def test_the_models_own_processor(llava, pictures, tmp_path):
    side = {"height": SIDE, "width": SIDE}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side), tokenizer=letters(),
        patch_size=8, vision_feature_select_strategy="default", chat_template=TEMPLATE, num_additional_image_tokens=1,
    ).save_pretrained(tmp_path)  # fmt: skip
    llava.save_pretrained(tmp_path)
    made = Questions(SimpleNamespace(path=tmp_path), llava, pictures, None)
    assert made.how == "the model's processor"
    both, alone = made.batch([0, 1]), made.batch([0])
    assert both["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert (both["input_ids"] == IMAGE).sum(1).tolist() == [36, 36]
    padding = both["input_ids"].shape[1] - alone["input_ids"].shape[1]
    assert both["attention_mask"][0].tolist() == [0] * padding + [1] * alone["input_ids"].shape[1]
    assert torch.equal(both["input_ids"][:1, padding:], alone["input_ids"])


def test_without_a_processor(llava, pictures, tmp_path):
    source = SimpleNamespace(path=tmp_path)
    assert Questions(source, llava, pictures, None).how == "the configuration, questions are noise"
    asked = Questions(source, llava, pictures, letters())
    assert asked.how == "the configuration"
    ids = asked.batch([1])["input_ids"][0]
    assert (ids == IMAGE).sum() == 36
    assert letters().decode(ids[37:]).replace(" ", "").startswith("Describethepicture")


def test_a_tokenizer_that_is_not_the_models_own(llava, pictures, tmp_path):
    """transformers makes one without words for models of some types."""
    made = Questions(SimpleNamespace(path=tmp_path), llava, pictures, lambda text, **_: {"input_ids": [1, 1]})
    assert made.how.endswith("noise")


def test_noise_is_ordinary_tokens(llava):
    ids = noise_ids(llava.config, 500, seed=0)
    assert ids == noise_ids(llava.config, 500, seed=0)
    assert not {0, 1, 2, IMAGE} & set(ids)
    assert max(ids) < 128


def test_windows_of_a_text(llava):
    prose = Texts(llava, letters(), "a b c d e f g h " * 400)
    assert prose.how == "prose"
    lengths = [prose.batch([n])["input_ids"].shape[1] for n in range(prose.count)]
    assert len(set(lengths)) == prose.count, "so that a batch is padded"
    assert prose.batch([0, 3])["attention_mask"][1].tolist()[0] == 0
    assert Texts(llava, None, None).how == "random tokens"
