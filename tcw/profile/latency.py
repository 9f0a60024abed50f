"""How long a model takes here: a prompt read at once (prefill), and one token after another (decode).

Times are medians after a warm-up. A model that writes no tokens has one time, that of a forward pass.
"""

import inspect
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from tcw.device import Device, synchronize
from tcw.errors import TcwError
from tcw.events import Progress, Report, silent

PROMPT_TOKENS = 128
NEW_TOKENS = 32
_PREFILLS = 5
_SECONDS = 10.0  # a slow model is measured on fewer repeats, but on one at least


@dataclass(frozen=True)
class Latency:
    """What was measured, in milliseconds; `skipped` says why nothing was."""

    prefill_ms: float | None = None
    decode_ms_per_token: float | None = None
    forward_ms: float | None = None
    prompt_tokens: int | None = None
    batch: int = 1
    dtype: str | None = None
    device: str | None = None
    decode_bound_ms: float | None = None
    skipped: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Every field under its name."""
        return asdict(self)


def measure(source: Any, device: Device, *, batch: int = 1, progress: Report = silent) -> Latency:
    """Load `source` on `device` and time it. A model that cannot be loaded or run is skipped, with the reason."""
    from tcw.runtime.load import load

    try:
        model = load(source, device=device.torch_name)
        return time_model(model, device, batch=batch, progress=progress)
    except TcwError as error:
        return Latency(skipped=error.message)
    except Exception as error:  # modelling code of any architecture runs here; a profile is worth having without it
        return Latency(skipped=f"{type(error).__name__}: {error}".splitlines()[0])


def time_model(model: Any, device: Device, *, batch: int = 1, progress: Report = silent) -> Latency:
    """Time a loaded transformers model, in evaluation mode and without gradients."""
    import torch

    model.eval()
    wait = synchronize(device.torch_name)
    text = model.config.get_text_config(decoder=True)
    tokens = min(PROMPT_TOKENS, getattr(text, "max_position_embeddings", None) or PROMPT_TOKENS)
    inputs = _inputs(model, batch, tokens, device.torch_name)
    facts = Latency(batch=batch, dtype=str(model.dtype).removeprefix("torch."), device=device.torch_name)
    if inputs is None:
        return replace(facts, skipped=f"no inputs are known for `{model.main_input_name}`")
    if "input_ids" in inputs:
        facts = replace(facts, prompt_tokens=tokens)
    with torch.inference_mode():
        if not model.can_generate() or "input_ids" not in inputs:
            seconds = _repeat(lambda: model(**inputs), wait, "forward", _PREFILLS, progress)
            return replace(facts, forward_ms=1e3 * median(seconds))
        inputs["use_cache"] = True
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = 1
        seconds = _repeat(lambda: model(**inputs), wait, "prefill", _PREFILLS, progress)
        steps = _repeat(_decoder(model, inputs), wait, "decode", NEW_TOKENS, progress)
    return replace(facts, prefill_ms=1e3 * median(seconds), decode_ms_per_token=1e3 * median(steps))


def _decoder(model: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    """Return a function that decodes one more token greedily behind the prompt."""
    out = model(**inputs)
    token = out.logits[:, -1:].argmax(-1)
    cache = "past_key_values" if getattr(out, "past_key_values", None) is not None else "cache_params"
    fixed, key = {cache: out[cache], "use_cache": True}, "input_ids"
    if model.config.is_encoder_decoder:
        fixed["encoder_outputs"], key = (out.encoder_last_hidden_state,), "decoder_input_ids"

    def step() -> None:
        nonlocal token
        token = model(**{key: token}, **fixed).logits[:, -1:].argmax(-1)

    return step


def _repeat(run: Callable[[], Any], wait: Callable[[], Any], stage: str, times: int, progress: Report) -> list[float]:
    run()
    wait()
    seconds: list[float] = []
    while len(seconds) < times and sum(seconds) < _SECONDS:
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
        progress(Progress("latency", len(seconds), times, "runs", stage))
    return seconds


def _inputs(model: Any, batch: int, tokens: int, device: str) -> dict[str, Any] | None:
    """Inputs of the kind that the model takes: random tokens, an image, or sound features."""
    import torch

    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "input_ids":
        vocabulary = config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(0, vocabulary, (batch, tokens), generator=generator).to(device)
        inputs = {"input_ids": ids}
        return {**inputs, "decoder_input_ids": ids[:, :1]} if config.is_encoder_decoder else inputs
    vision = getattr(config, "vision_config", config)
    if model.main_input_name == "pixel_values" and isinstance(getattr(vision, "image_size", None), int):
        shape = (batch, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator).to(device, model.dtype)}
    return None
