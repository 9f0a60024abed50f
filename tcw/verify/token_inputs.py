"""What a token policy is checked on: pictures with questions, pictures alone, or texts; one sample or a batch of some.

With the model's own processor where it can be loaded. Else pictures are resized as the configuration says, and the
questions are the tokenizer's ids, or noise where there is no tokenizer: enough to compare the model with itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tcw.calibration import images as pictures_of
from tcw.data import evaluation_text
from tcw.source import Source
from tcw.tokens.inputs import Sample, tower_inputs, vlm_inputs

SAMPLES = 4
QUESTIONS = (
    "What is shown in this picture?",
    "Describe the picture in one sentence, and then say what its colours are.",
    "Is there a person in it?",
    "What is the largest object that can be seen here, and where is it?",
)
CONTEXT = 256  # tokens of a text
_NOISE = 12  # tokens of a question where there is no tokenizer; each sample has a few more
_SIZES = ((336, 448), (448, 336), (384, 384), (288, 512))
FOLDER, SHIPPED, DRAWN = "as given", "scikit-image", "drawn by rule"


class Inputs(Protocol):
    """Samples that can be put into batches. `how` says what made them."""

    how: str
    count: int

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Arguments of the model for some samples, padded on the left."""
        ...


@dataclass(frozen=True)
class Pictures:
    """Pictures, uint8 [height, width, 3] each, and where they are from."""

    images: list[np.ndarray]
    origin: str

    @classmethod
    def read(cls, path: Path | None, count: int = SAMPLES) -> "Pictures":
        """Pictures of a folder or .npy file; else scikit-image's, if it is installed; else drawn ones.

        Raises SourceError: nothing in `path` can be read.
        """
        if path is not None:
            found, origin = pictures_of.read_images(path), FOLDER
        elif len(pictures_of.shipped()) > 1 and pictures_of.reads_files():
            found, origin = pictures_of.read_images(None), SHIPPED
        else:
            found, origin = [drawn(n) for n in range(count)], DRAWN
        chosen = np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)
        return cls([found[i] for i in chosen], origin)


def drawn(number: int) -> np.ndarray:
    """A picture of bright rectangles on a slope of colour, with some noise: uint8 [height, width, 3]."""
    rng = np.random.default_rng(number)
    height, width = _SIZES[number % len(_SIZES)]
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    picture = np.stack([rows, columns, (rows + columns) / 2], -1) * rng.uniform(60, 160, 3)
    for _ in range(3 + number % 3):
        top, left = rng.integers(0, height * 3 // 4), rng.integers(0, width * 3 // 4)
        high, wide = rng.integers(height // 8, height // 3), rng.integers(width // 8, width // 3)
        picture[top : top + high, left : left + wide] = rng.uniform(0, 255, 3)
    return np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)


class Questions:
    """Pictures with a question each, for a vision-language model."""

    def __init__(self, source: Source, model: Any, pictures: Pictures, tokenizer: Any | None) -> None:
        """Try the processor first, on all of the samples."""
        self._model, self._images, self.count = model, pictures.images, len(pictures.images)
        self._processor: Any = _processor(source)
        self._ready = pictures_of.normalised(pictures.images, source.path)
        self._tokenizer = tokenizer if _fits(tokenizer, model) else None
        self.how = "the model's processor"
        if self._processor is None or not self._works():
            self._processor, self.how = None, "the configuration" + ("" if self._tokenizer else ", questions are noise")

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Arguments of the model for some samples, padded on the left."""
        if self._processor is not None:
            return self._processed(numbers)
        return vlm_inputs(self._model, [Sample([[*self._opening()], self._ready[n], self._ids(n)]) for n in numbers])

    def _works(self) -> bool:
        try:
            with torch.inference_mode():
                self._processed(range(self.count))
        except Exception:  # what processors raise over a missing package or template is anything
            return False
        return True

    def _processed(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        said = [self._said(QUESTIONS[n % len(QUESTIONS)]) for n in numbers]
        images = [[self._images[n]] for n in numbers]
        made = self._processor(images=images, text=said, return_tensors="pt", padding=True, padding_side="left")
        return {
            name: value.to(self._model.device, self._model.dtype if value.is_floating_point() else None)
            for name, value in made.items()
            if isinstance(value, Tensor)
        }

    def _said(self, question: str) -> str:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        return str(self._processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))

    def _opening(self) -> list[int]:
        """What stands before the picture: a text that opens with a picture is unusual."""
        return [noise_ids(self._model.config, 1, seed=0)[0]]

    def _ids(self, number: int) -> list[int]:
        if self._tokenizer is not None:
            return list(self._tokenizer(QUESTIONS[number % len(QUESTIONS)], add_special_tokens=False)["input_ids"])
        return noise_ids(self._model.config, _NOISE + 3 * number, seed=number)


class Alone:
    """Pictures for a plain vision tower."""

    def __init__(self, source: Source, model: Any, pictures: Pictures) -> None:
        self._model, self.count, self.how = model, len(pictures.images), "the configuration"
        vision = getattr(model.config, "vision_config", model.config)
        self._ready = pictures_of.prepared(pictures.images, source.path, vision)

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Arguments of the model for some pictures."""
        return {"pixel_values": tower_inputs(self._model, [self._ready[n] for n in numbers])}


class Texts:
    """Windows of a text, for a policy that cuts text."""

    def __init__(self, model: Any, tokenizer: Any | None, text: str | None, count: int = SAMPLES) -> None:
        self._model, self.count = model, count
        ids, self.how = [], "prose"
        if tokenizer is not None and _fits(tokenizer, model):
            ids = tokenizer(text or evaluation_text(), add_special_tokens=False)["input_ids"]
        if len(ids) < count * CONTEXT:
            ids, self.how = noise_ids(model.config, count * CONTEXT, seed=0), "random tokens"
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 4 * CONTEXT
        longest = min(CONTEXT, limit // 2)
        step = (len(ids) - longest) // max(1, count - 1)
        self._rows = [list(ids[n * step : n * step + longest - 8 * n]) for n in range(count)]

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Arguments of the model for some windows, padded on the left."""
        return padded([self._rows[n] for n in numbers], self._model)


def _fits(tokenizer: Any | None, model: Any) -> bool:
    """Whether a tokenizer is the model's own: transformers makes empty ones for some models, without any file."""
    if tokenizer is None:
        return False
    ids = tokenizer(QUESTIONS[1], add_special_tokens=False)["input_ids"]
    return len(set(ids)) > len(QUESTIONS[1].split()) // 2 and max(ids) < model.config.get_text_config().vocab_size


def padded(rows: Sequence[Sequence[int]], model: Any) -> dict[str, Tensor]:
    """Rows of ids as a batch, padded on the left."""
    longest = max(map(len, rows))
    pad = model.config.get_text_config().pad_token_id or 0
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def noise_ids(config: Any, count: int, seed: int) -> list[int]:
    """Ids of ordinary tokens: none that the configuration gives a meaning."""
    text = config.get_text_config()
    special = {v for c in (config, text) for k, v in vars(c).items() if "token" in k and isinstance(v, int)}
    usable = np.array([i for i in range(min(text.vocab_size, 1 << 15)) if i not in special])
    return [int(i) for i in np.random.default_rng(seed).choice(usable, count)]


def _processor(source: Source) -> Any | None:
    from transformers import AutoProcessor

    try:
        found = AutoProcessor.from_pretrained(str(source.path))
    except Exception:  # a missing file, package or class: then we do without
        return None
    return found if hasattr(found, "apply_chat_template") and hasattr(found, "image_processor") else None
