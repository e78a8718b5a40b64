"""What a model's directory holds and what is wrong with it; every library call that reads its files goes through `reading`.

Libraries raise errors of any kind for a file that is damaged, and a user can only act on a sentence that names the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from abliterate.errors import AbliterateError, InputError, first_line
from abliterate.model.memory import is_out_of_memory

CONFIG, ADAPTER = "config.json", "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of these, a tokenizer has one at least; slow tokenizers have others beside it.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_WEIGHTS = re.compile(r"(model|pytorch_model|consolidated).*\.(safetensors|bin|pth|pt|gguf)(\.index\.json)?")
_OF_MODELS = (".json", ".safetensors", ".model", ".jinja")
_POINTER = b"version https://git-lfs.github.com/spec/"
# A longer reason, such as a list of all that would be allowed, hides the remedy behind it.
_LONGEST = 240
# Letters, digits and a sign: a usable tokenizer of any language has them.
SENTENCE = "What is 1+1? Answer in one short sentence."


@contextlib.contextmanager
def library_errors(
    sentence: Callable[[BaseException], AbliterateError], *, but: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Raise `sentence(error)` for every error that a library raises in the `with` block.

    Our own errors, those that mean a lack of memory, and those of the classes `but` pass.
    """
    try:
        yield
    except BaseException as error:
        if not _is_of_library(error) or isinstance(error, but):
            raise
        raise sentence(error) from error


def reading(
    source: str, part: str, *, but: tuple[type[Exception], ...] = (), suspects: Callable[[], object] = lambda: None
) -> contextlib.AbstractContextManager[None]:
    """`library_errors` for reading `part` of the model in `source`.

    After an error, `suspects` is called first; it reads what may be the cause, and raises a sentence that names it.
    """

    def sentence(error: BaseException) -> InputError:
        suspects()
        return load_error(source, error, part)

    return library_errors(sentence, but=but)


def _is_of_library(error: BaseException) -> bool:
    if isinstance(error, AbliterateError) or is_out_of_memory(error):
        return False
    # A panic of the tokenizers' and safetensors' Rust code is no Exception.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def reason_of(error: BaseException) -> str:
    """A library's error in one line: of nested errors the inner one, and a sentence where the message has no words."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    first = first_line(error).partition(". Errors: ")[0]
    if not re.search(r"\w\s+\w", first):
        first = f"{first} isn't known" if isinstance(error, KeyError) else f"{type(error).__name__} {first}".strip()
    return first if len(first) <= _LONGEST else first[: _LONGEST - 1] + "…"


def load_error(source: str, error: BaseException, part: str = "") -> InputError:
    """The error for a model that can't be loaded: by a file that is no file, else by what the library says of `part`."""
    named = f"{part}: " if part else ""
    if source and Path(source).is_dir():
        damaged = damaged_file(Path(source))
        reason = f"{named}{reason_of(error)}"
        return _unusable(source, f"{damaged} ({reason})" if damaged else reason)
    if isinstance(error, OSError):
        if SINGLE in str(error):  # of a shard, the name is another: then it is the network
            reason = (
                "pickles (pytorch_model.bin) aren't opened, because opening one can run code; name a copy in safetensors, or "
                "have it converted (huggingface.co/spaces/safetensors/convert)"
            )
            return _no_safetensors(source, reason)
        return InputError(
            f"The model {source} can't be fetched from the Hub: {reason_of(error)}; check the id and the network, or "
            "download it elsewhere and give its local directory."
        )
    return _unusable(source, f"{named}{reason_of(error)}")


def _unusable(source: str, reason: str) -> InputError:
    return InputError(f"The model in {source} can't be loaded: {reason}; correct that, or download the model again.")


def damaged_file(folder: Path) -> str:
    """What is wrong with the first file of a directory that isn't the file it stands for; "" if all are files."""
    for path in sorted(path for path in folder.iterdir() if path.name.endswith(_OF_MODELS)):
        if path.is_symlink() and not path.exists():
            return f"{path.name} is a link to a file that isn't there"
        if not path.is_file():
            continue
        with contextlib.suppress(OSError), path.open("rb") as file:
            begin = file.read(len(_POINTER))
            if begin == _POINTER:
                return f"{path.name} is only a pointer of Git LFS (git lfs pull fetches the file)"
            if not begin:
                return f"{path.name} is empty"
    return ""


def read_json(source: str, name: str, revision: str = "") -> dict[str, Any]:
    """The JSON object in a file of the model; InputError if the file is missing or holds something else."""
    with reading(source, name):
        path = cached_file(source, name, **({"revision": revision} if revision else {}))
        content = json.loads(Path(path or "").read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise _unusable(source, f"{name} holds no JSON object")
    return content


def commit_of(source: str, config: PretrainedConfig, revision: str = "") -> str:
    """The commit of a Hub model whose config was just read, or ""; a local directory has none.

    transformers before 5.23 keeps it in the config. Later it is known from the cache only: files lie in `snapshots/COMMIT/`.
    """
    if commit := getattr(config, "_commit_hash", None):
        return str(commit)
    if Path(source).is_dir():
        return ""
    with reading(source, CONFIG):
        path = cached_file(source, CONFIG, **({"revision": revision} if revision else {}))
    found = re.search(r"/snapshots/([0-9a-f]{40})/", Path(path or "").as_posix())
    return found[1] if found else ""


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds a PEFT adapter and no weights of a model."""
    return os.path.isfile(folder / ADAPTER) and not _holds_weights(folder)  # unlike Path's, False for a name that is too long


def _holds_weights(folder: Path) -> bool:
    return any(_WEIGHTS.fullmatch(path.name) for path in folder.iterdir())


def is_lone_config(source: str) -> bool:
    """Whether a directory holds neither weights nor a vocabulary, as for a model that shall be inspected before a download."""
    folder = Path(source)
    return folder.is_dir() and not _holds_weights(folder) and not any(os.path.lexists(folder / name) for name in _VOCABULARIES)


def check_folder(folder: Path, name: str) -> None:
    """InputError unless a directory holds a model and nothing that would be loaded into it unasked."""
    if (folder / ADAPTER).is_file():
        if is_adapter(folder):
            raise InputError(
                f"The directory {name} holds an adapter{_base_of(folder)}, not a model; merge it into its base first (with "
                "PEFT's merge_and_unload), or give the base: chat and evaluate take the adapter as it is."
            )
        raise InputError(
            f"The directory {name} holds a model and an adapter ({ADAPTER}), which would be loaded into the model unasked and "
            f"wouldn't be exported; merge it first (with PEFT's merge_and_unload), or move {ADAPTER} and the adapter's weights "
            "away."
        )
    if (folder / CONFIG).is_symlink() and not (folder / CONFIG).exists():
        raise _unusable(name, f"{CONFIG} is a link to a file that isn't there")
    if not (folder / CONFIG).is_file():
        raise InputError(f"The directory {name} holds no model: it has no {CONFIG}; name another directory.")


def _base_of(folder: Path) -> str:
    with contextlib.suppress(InputError):
        base = read_json(str(folder), ADAPTER).get("base_model_name_or_path")
        return f" of {base}" if isinstance(base, str) and base else ""
    return ""


def check_hub_adapter(source: str, revision: str = "") -> None:
    """InputError if a model on the Hub has an adapter beside its weights; a repository that can't be asked passes."""
    options: dict[str, Any] = {"revision": revision} if revision else {}
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        found = cached_file(source, ADAPTER, **options, **lenient)
    except (OSError, ValueError):
        return
    if found is not None:
        raise InputError(
            f"The repository {source} holds an adapter ({ADAPTER}), which would be loaded into a model unasked; download it, "
            "merge it into its base (with PEFT's merge_and_unload), and give that directory."
        )


def check_weight_files(source: str, config: PretrainedConfig) -> None:
    """InputError if a directory has no weights in safetensors, with the way to make them; a Hub id passes."""
    folder = Path(source)
    if not folder.is_dir() or getattr(config, "transformers_weights", None):  # the config names weight files of its own
        return
    if (folder / SINGLE).is_file():
        return
    names = {path.name for path in folder.iterdir()}
    if (folder / INDEX).is_file():
        listed = read_json(source, INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise _unusable(source, f"{INDEX} names no weight files")
        missing = sorted(name for name in set(listed.values()) if not (folder / name).is_file())
        if missing:
            raise _unusable(source, f"{named(missing)}, which {INDEX} names, {'is' if len(missing) == 1 else 'are'} missing")
        return
    if damaged := damaged_file(folder):
        raise _unusable(source, damaged)
    raise _other_weights(source, names)


def _other_weights(source: str, names: set[str]) -> InputError:
    """The error that says what a directory holds instead of the safetensors that transformers loads, and what to do."""
    path = source.replace("'", "\\'")
    convert = (
        "which aren't opened, because opening one can run code; if you trust their author, convert them with python -c "
        f"\"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{path}', dtype='auto', "
        f"use_safetensors=False).save_pretrained('{path}')\""
    )
    made_from = "which can't be edited; give the model in safetensors from which it was made"
    kinds = (
        (r"(?!training_args|optimizer|scheduler|rng_state|adapter_model).*\.(bin|pt|pth|ckpt)", "pickles", convert),
        (r".*\.gguf", "a GGUF file", made_from),
        (
            r"(?!adapter_model).*\.safetensors",
            f"safetensors of another name than {SINGLE}",
            f"which transformers doesn't read; rename or convert them to {SINGLE}",
        ),
        (r".*\.(h5|msgpack|onnx|npz|tflite)", "another framework's weights", made_from),
    )
    for pattern, kind, remedy in kinds:
        if found := sorted(name for name in names if re.fullmatch(pattern, name)):
            return _no_safetensors(source, f"it holds {kind} ({named(found)}), {remedy}")
    return _no_safetensors(source, "it holds no weights at all; download them, too")


def _no_safetensors(source: str, reason: str) -> InputError:
    return InputError(f"The model in {source} can't be loaded, because it has no weights in safetensors: {reason}.")


def named(names: list[str], at_most: int = 3) -> str:
    """The first names, and the number of the others."""
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")


def check_tokenizer(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """InputError unless a sentence survives encoding and decoding: without its vocabulary, a tokenizer loads and is empty."""
    with reading(source, "the tokenizer's files"):
        ids = tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
    # Some tokenizers change case, spaces and accents; half of the letters is more than those of a wrong vocabulary.
    letters = [letter for letter in SENTENCE.casefold() if letter.isalnum()]
    decoded = text.casefold()
    if ids and 2 * sum(letter in decoded for letter in letters) >= len(letters):
        return
    folder = Path(source)
    missing = ""
    if folder.is_dir():
        missing = damaged_file(folder)
        if not missing and not any((folder / name).is_file() for name in _VOCABULARIES):
            missing = f"it has none of {', '.join(_VOCABULARIES)}"
    became = f"becomes {text[:40]!r}" if text else "becomes nothing"
    raise InputError(
        f"The tokenizer of the model in {source} is unusable, because a sentence that is encoded and decoded {became}"
        + (f": {missing}" if missing else "")
        + "; put the tokenizer's files of the model there, or download it again."
    )


def check_vocabulary(source: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """InputError if the tokenizer's ids for a sentence don't exist in the model: it is another model's."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    highest = max(tokenizer(SENTENCE)["input_ids"], default=0)
    if isinstance(size, int) and highest >= size:
        raise InputError(
            f"The tokenizer of the model in {source} is another model's: it uses the token id {highest}, and by {CONFIG} "
            f"(vocab_size) there are {size} ids; put the model's own tokenizer there, or correct {CONFIG}."
        )
