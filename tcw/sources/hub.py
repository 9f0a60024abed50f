"""Models on the Hugging Face hub: fetched by huggingface_hub into its own cache, then read as a folder.

Only what tcw reads is fetched: safetensors, config and tokenizer files. `HF_HUB_OFFLINE`, `HF_HOME` and the login of
huggingface_hub hold here as everywhere.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tcw.disk import writing
from tcw.errors import SourceError, UsageError
from tcw.source import Source, open_folder

WANTED = ["*.safetensors", "*.json", "*.jsonl", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "*.md",
          "LICENSE*", "NOTICE*"]  # fmt: skip
UNWANTED = ["onnx/*", "openvino/*", "original/*", "coreml/*", "consolidated*", "*.bin.index.json"]
_COMMIT = re.compile(r"[0-9a-f]{40}")


def open_hub(text: str, revision: str | None = None) -> Source:
    """Open `org/name` or `org/name@revision`, from the cache or the network.

    The source's `revision` is the commit that was fetched. Raises SourceError that says what to do: not found, gated,
    offline, no network, no safetensors in it.
    """
    name, _, tail = text.partition("@")
    if tail and revision and tail != revision:
        raise UsageError(f"`{text}` and revision `{revision}` do not agree", "give one of them")
    folder = fetch(name, tail or revision)
    if not any(folder.glob("*.safetensors")):
        raise SourceError(
            f"`{name}` has no safetensors on the hub",
            "look for a conversion of it, or download its .gguf file and give that",
        )
    commit = folder.name if _COMMIT.fullmatch(folder.name) else tail or revision
    return open_folder(folder, kind="hub", id=name, revision=commit)


def fetch(name: str, revision: str | None) -> Path:
    """Download the files of a model that tcw reads and return their folder. Raises SourceError, ResourceError."""
    import huggingface_hub
    from huggingface_hub import constants

    offline = bool(constants.HF_HUB_OFFLINE)
    with _clear_errors(name, revision, offline), _quiet(), writing(Path(constants.HF_HUB_CACHE)):
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=offline
        )
    return Path(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of huggingface_hub where ours are switched off."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not os.environ.get("TCW_NO_PROGRESS") or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _clear_errors(name: str, revision: str | None, offline: bool) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        hint = f"accept its terms at https://huggingface.co/{name}, then `hf auth login`"
        raise SourceError(f"`{name}` is gated: the hub asks you to accept its terms", hint) from None
    except errors.RepositoryNotFoundError:
        hint = "check the spelling; for a private model `hf auth login`"
        raise SourceError(f"there is no folder and no model on the hub called `{name}`", hint) from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"`{name}` has no revision `{revision}`", "give a branch, a tag or a commit") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise _unreachable(name, offline) from None
    except errors.HFValidationError as error:
        raise SourceError(f"`{name}` is no hub id: {error}", "a hub id is `org/name`") from None
    except errors.HfHubHTTPError as error:
        raise SourceError(f"the hub refused `{name}`: {_status(error)}", "try again later") from None
    except Exception as error:  # whatever the network library of this version of huggingface_hub raises
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise
        raise _unreachable(name, offline) from None


def _unreachable(name: str, offline: bool) -> SourceError:
    if offline:
        hint = "unset HF_HUB_OFFLINE to download it, or give a folder"
        return SourceError(f"`{name}` is not in the local cache, and HF_HUB_OFFLINE is set", hint)
    hint = "check the network, or give a folder, a .gguf file or `demo:smollm2`"
    return SourceError(f"cannot reach the hub, and `{name}` is neither a folder here nor in the local cache", hint)


def _status(error: Any) -> str:
    response = getattr(error, "response", None)
    return f"status {response.status_code}" if response is not None else str(error).partition("\n")[0]
