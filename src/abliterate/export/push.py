"""Upload a finished export to the Hub. The token stays in the Hub's library: it is neither asked for here nor passed on."""

from __future__ import annotations

import shlex
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, get_token

from abliterate.errors import AbliterateError, first_line
from abliterate.export.folder import LOCK
from abliterate.settings.schema import ExportSettings

# What an earlier export in the same repository consists of: an adapter beside merged weights would be put onto them.
_REPLACED = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")


def push(folder: Path, settings: ExportSettings) -> str:
    """Upload a finished export to `settings.push`, a new repository where there is none; returns its address.

    Raises:
        AbliterateError: the upload failed; the export is left as it was.
    """
    api = HfApi()
    try:
        address = api.create_repo(settings.push, private=settings.push_private, exist_ok=True)
        there = [name for name in api.list_repo_files(settings.push) if "/" not in name]  # folders are somebody's own
        api.upload_folder(
            repo_id=settings.push,
            folder_path=folder,
            commit_message="Upload by abliterate",
            ignore_patterns=[LOCK],
            delete_patterns=[name for name in there if any(fnmatch(name, pattern) for pattern in _REPLACED)],
        )
    # The Hub's library raises its own errors, those of its HTTP library and of its uploader; all mean that the upload failed.
    except Exception as error:
        reason = _without_token(first_line(error))
        raise AbliterateError(
            f"The export could not be pushed to {settings.push} ({reason}); it is kept in {folder}: upload it "
            f"later with hf upload {settings.push} {shlex.quote(str(folder))}."
        ) from error
    return str(address)


def _without_token(message: str) -> str:
    """The message without the token, which a library may have put there."""
    token = get_token()
    return message.replace(token, "…") if token else message
