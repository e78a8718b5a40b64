"""What a model's directory holds and what is wrong with it: each kind of damage is one sentence that names the file."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from abliterate.errors import InputError
from abliterate.model import chat_template, checkpoint, loader, model_files
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.model_files import is_adapter, library_errors
from abliterate.model.peft import check_adapter, with_adapter
from abliterate.pipeline.evaluate import parse_candidate
from abliterate.settings.schema import LoadSettings
from support.models import CPU, PROMPTS, make_chat, make_model, make_tokenizer, save_model

Change = Callable[[Path], object]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model of three layers. Read only."""
    return save_model(make_model("llama"), tmp_path_factory.mktemp("base") / "m")


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy of the model to damage."""
    return Path(shutil.copytree(base, tmp_path / "m"))


def load(folder: Path, warn: Callable[[str], None] = pytest.fail, **settings: Any) -> loader.LoadedModel:
    """The model, as a run loads it."""
    return loader.load_model(
        str(folder), LoadSettings(**settings), CPU, lambda tokenizer, at: PromptEncoder(tokenizer, at).encode(PROMPTS[:1]), warn
    )


def write(name: str, content: Any) -> Change:
    """A change that writes a file of the model."""
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def remove(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def dangling(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / "gone")

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    """A change of the weight file's tensors."""

    def rewrite(folder: Path) -> None:
        changed = change(load_file(folder / "model.safetensors"))
        save_file({name: tensor.clone() for name, tensor in changed.items()}, folder / "model.safetensors", {"format": "pt"})

    return rewrite


def updated(name: str, **fields: Any) -> Change:
    """A change of fields in a JSON file."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**content, **fields}), encoding="utf-8")

    return change


ADAPTER = {"base_model_name_or_path": "owner/base", "peft_type": "LORA"}


@pytest.mark.parametrize("weights", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_a_model_with_a_left_over_adapter_is_refused(weights: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / weights)
    write("adapter_config.json", ADAPTER)(folder)
    assert not is_adapter(folder)
    for look in (loader.resolve_source, parse_candidate):
        with pytest.raises(InputError, match=r"holds a model and an adapter .* merge it first"):
            look(str(folder))


@pytest.mark.parametrize("kept", [(), ("config.json",), ("config.json", "tokenizer.json", "training_args.bin", "optimizer.pt")])
def test_an_adapter_alone_is_told_what_it_is(kept: tuple[str, ...], folder: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "adapter_model.safetensors"):
        (folder / name).touch()
    for path in folder.iterdir():
        if path.name not in (*kept, "adapter_model.safetensors"):
            path.unlink()
    write("adapter_config.json", ADAPTER)(folder)
    with pytest.raises(InputError, match=r"holds an adapter of owner/base, not a model; merge it into its base first"):
        loader.resolve_source(str(folder))
    assert parse_candidate(str(folder)).kind == "adapter"


def test_an_adapters_damage_is_a_sentence(folder: Path) -> None:
    for content, said in (("[]", "can't be read"), ('{"peft_type": "NONE"}', "can't be read"), ("{}", "doesn't name its kind")):
        write("adapter_config.json", content)(folder)
        with pytest.raises(InputError, match=said):
            check_adapter(folder)
    write("adapter_config.json", {"peft_type": "LORA", "r": "x", "target_modules": ["o_proj"]})(folder)
    with pytest.raises(InputError, match="doesn't fit the base"):
        with_adapter(make_model("llama"), folder)


WEIGHTS = {
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pickles (pytorch_model.bin), which aren't",
    ),
    "pickles": (
        lambda f: [(f / "model.safetensors").unlink(), *((f / f"pytorch_model-{n}.bin").touch() for n in "12345")],
        "pytorch_model-3.bin and 2 more), which aren't opened, because opening one can run code",
    ),
    "original": (lambda f: (f / "model.safetensors").rename(f / "consolidated.00.pth"), "pickles (consolidated.00.pth)"),
    "gguf": (
        lambda f: (f / "model.safetensors").rename(f / "model-Q4_K_M.gguf"),
        "a GGUF file (model-Q4_K_M.gguf), which can't",
    ),
    "mistral": (
        lambda f: (f / "model.safetensors").rename(f / "consolidated.safetensors"),
        "(consolidated.safetensors), which transformers doesn't read; rename or convert",
    ),
    "flax": (lambda f: (f / "model.safetensors").rename(f / "flax_model.msgpack"), "another framework's weights (flax_model"),
    "none": (remove("model.safetensors"), "it holds no weights at all"),
    "link": (dangling("model.safetensors"), "model.safetensors is a link to a file that isn't there"),
    "pointer": (write("model.safetensors", LFS), "model.safetensors is only a pointer of Git LFS (git lfs pull fetches"),
    "empty": (write("model.safetensors", ""), "model.safetensors is empty"),
    "text": (write("model.safetensors", "<html>404</html>"), "model.safetensors: "),
    "shard": (
        lambda f: (remove("model.safetensors")(f), write("model.safetensors.index.json", {"weight_map": {"a": "a.st"}})(f)),
        "a.st, which model.safetensors.index.json names, is missing",
    ),
    "index of numbers": (
        lambda f: (remove("model.safetensors")(f), write("model.safetensors.index.json", {"weight_map": {"a": 1}})(f)),
        "model.safetensors.index.json names no weight files",
    ),
    "index": (
        lambda f: (remove("model.safetensors")(f), write("model.safetensors.index.json", "[1]")(f)),
        "model.safetensors.index.json holds no JSON object",
    ),
    "nested index": (
        lambda f: (remove("model.safetensors")(f), write("model.safetensors.index.json", "[" * 99999)(f)),
        "model.safetensors.index.json: ",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_can_not_be_loaded(name: str, folder: Path) -> None:
    change, said = WEIGHTS[name]
    change(folder)
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        load(folder)
    assert "can't be loaded" in str(caught.value)
    if name not in ("text", "pointer", "empty"):  # those are found where the weights are read
        with pytest.raises(InputError, match=re.escape(said)):
            loader.skeleton(str(folder), LoadSettings(), CPU, weights=True)


def test_the_conversion_of_pickles_works_as_the_sentence_says(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        load(folder)
    exec(str(caught.value).partition('python -c "')[2].rpartition('"')[0])
    assert load(folder).info.n_layers == 3


@pytest.mark.parametrize("device", ["0", "cuda:0", "gpu", "-1"])
def test_memory_of_a_device_that_is_not_there(device: str, folder: Path) -> None:
    limits = {"max_memory": {device: "1GiB", "cpu": "8GiB"}, "device_map": "auto"}
    said = f"load.max_memory names the device {device}, which isn't there; the devices here are cpu"
    with pytest.raises(InputError, match=said):
        load(folder, **limits)
    with pytest.raises(InputError, match=said):
        loader.skeleton(str(folder), LoadSettings(**limits), CPU, weights=True)
    assert checkpoint.max_memory(LoadSettings(max_memory={"cpu": "8GiB", "disk": "1GiB"})) == {"cpu": "8GiB", "disk": "1GiB"}


VOCABULARY = {
    "gone": (remove("tokenizer.json"), "becomes nothing: it has none of tokenizer.json, tokenizer.model"),
    "link": (dangling("tokenizer.json"), "tokenizer.json is a link to a file that isn't there"),
    "pointer": (write("tokenizer.json", LFS), "tokenizer.json is only a pointer of Git LFS"),
    "object": (write("tokenizer.json", "{}"), "the tokenizer's files: "),
    "text": (write("tokenizer.json", "no"), "the tokenizer's files: "),
    "settings": (write("tokenizer_config.json", "[]"), "the tokenizer's files: "),
    "class": (updated("tokenizer_config.json", tokenizer_class=["x"]), "the tokenizer's files: "),
    "empty": (
        updated("tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]),
        "a sentence that is encoded and decoded becomes nothing",
    ),
}


@pytest.mark.parametrize("name", VOCABULARY)
def test_a_tokenizer_that_can_not_be_used(name: str, folder: Path) -> None:
    change, said = VOCABULARY[name]
    change(folder)
    with pytest.raises(InputError, match=said):
        loader.load_tokenizer(str(folder), LoadSettings())


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    updated("config.json", vocab_size=40)(folder)
    with pytest.raises(InputError, match=r"another model's: it uses the token id \d+, and by config.json .* there are 40"):
        load(folder)


def test_tensors_of_more_layers_than_the_config_has_are_named(folder: Path) -> None:
    """And not loaded without them, as transformers does with at most a warning."""
    updated("config.json", num_hidden_layers=2)(folder)
    with pytest.raises(
        InputError, match=r"more layers than its config.json describes, .* model\.layers\.2\.\S+, .* and 6 more;"
    ):
        load(folder)


def test_other_unexpected_tensors_are_a_warning(folder: Path) -> None:
    """A layer that predicts further tokens has tensors of its own; a reward head and biases aren't whole layers."""

    def more(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        extra = {name.replace(".layers.2.", ".layers.3."): tensor for name, tensor in stored.items() if ".layers.2." in name}
        names = ("model.layers.3.eh_proj.weight", "v_head.weight", "model.layers.0.self_attn.o_proj.bias")
        return stored | extra | dict.fromkeys(names, torch.ones(32))

    tensors(more)(folder)
    warnings: list[str] = []
    load(folder, warnings.append)
    (warning,) = warnings
    # Layers that predict further tokens are left out of the warning, because exports keep them.
    assert "no place for 2 tensors of its weight files (model.layers.0.self_attn.o_proj.bias, v_head.weight)" in warning


def test_unnamed_tensors_are_named_beside_those_that_are_missing(folder: Path) -> None:
    tensors(lambda stored: {f"tensor_{index}": tensor for index, tensor in enumerate(stored.values())})(folder)
    with pytest.raises(
        InputError, match=r"incomplete: .* lack .*, and hold tensor_0, tensor_1, tensor_10 and \d+ more, which it"
    ):
        load(folder)


@pytest.mark.parametrize("part", ["", "embed_tokens", "layers."])
def test_weights_of_zeros_are_refused(part: str, folder: Path) -> None:
    tensors(lambda stored: {name: tensor * (part not in name) for name, tensor in stored.items()})(folder)
    with pytest.raises(InputError, match=r"are empty: \d+ of its \d+ matrices hold only zeros \((lm_head|model)\.\S+"):
        load(folder)


def test_a_model_with_some_zeros_is_none_of_them(folder: Path) -> None:
    """Blocks that begin as copies of the identity have output matrices of zeros."""
    tensors(lambda stored: {name: tensor * ("2.mlp.down_proj" not in name) for name, tensor in stored.items()})(folder)
    assert load(folder).info.n_layers == 3


TEMPLATES = {
    "division": ("{{ 1 // 0 }}", "can't render a prompt"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "can't render a prompt"),
    "range": ("{% for i in range(10**9) %}{% endfor %}", "can't render a prompt"),
    "memory": ("{{ 'x' * 10**15 }}", "can't render a prompt"),
    "overflow": ("{{ 'x' * 10**30 }}", "can't render a prompt"),
    "syntax": ("{% if %}", "can't be read"),
    "depth": ("{{" + "(" * 5000, "can't be read"),
    "endless": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "doesn't end: it has rendered",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_fails_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "endless":
        monkeypatch.setattr(chat_template, "_RENDER_SECONDS", 0.3)
    tokenizer = make_tokenizer()
    tokenizer.chat_template, said = TEMPLATES[name]
    with pytest.raises(InputError, match=said):
        make_chat(tokenizer).render(PROMPTS[0])


OTHERS = {
    "config": (write("config.json", "{"), "config.json: "),
    "config list": (write("config.json", "[]"), "config.json holds no JSON object"),
    "config bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json: "),
    "config depth": (write("config.json", '{"a":' * 99999), "config.json: "),
    "config link": (dangling("config.json"), "config.json is a link to a file that isn't there"),
    "generation": (write("generation_config.json", "[]"), "generation_config.json of .* no JSON object"),
    "generation number": (write("generation_config.json", "3"), "generation_config.json of .* no JSON object"),
    "generation depth": (write("generation_config.json", '{"a":' * 99999), "generation_config.json of .* can't be used"),
    "template": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "the tokenizer's files: "),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_damaged_file_is_named(name: str, folder: Path) -> None:
    change, said = OTHERS[name]
    change(folder)
    with pytest.raises(InputError, match=said) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_is_not_the_files_fault_passes() -> None:
    def fail(error: BaseException) -> None:
        with library_errors(lambda error: InputError("A sentence."), but=(RuntimeError,)):
            raise error

    own = (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        KeyboardInterrupt(),
        InputError("Ours."),
        RuntimeError("x"),
    )
    for error in own:
        with pytest.raises(type(error)) as caught:
            fail(error)
        assert caught.value is error
    panic = type("PanicException", (BaseException,), {})
    for error in (Exception("x"), AssertionError(), ZeroDivisionError(), AttributeError("x"), panic("x")):
        with pytest.raises(InputError, match=r"A sentence\."):
            fail(error)


def test_adapters_and_pickles_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loader, "skip_retries_without_network", lambda: None)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    monkeypatch.setattr(model_files, "cached_file", lambda source, name, **options: str(tmp_path / "config.json"))
    with pytest.raises(InputError, match="The repository owner/name holds an adapter"):
        loader.load_config("owner/name", LoadSettings())

    def gone(source: str, name: str, **options: Any) -> None:
        raise OSError(f"{source} does not appear to have a file named {name}")

    monkeypatch.setattr(model_files, "cached_file", gone)
    with pytest.raises(
        InputError, match=r"owner/name can't be fetched from the Hub: owner/name does not appear .* config\.json;"
    ):
        loader.load_config("owner/name", LoadSettings())
    text = "owner/name does not appear to have a file named model.safetensors and thus cannot be loaded with `safetensors`"
    assert "pickles (pytorch_model.bin) aren't opened" in str(
        model_files.load_error("owner/name", OSError(text), "its weights")
    )
    assert "the tokenizer's files: a bad file" in str(
        model_files.load_error("owner/name", ValueError("a bad file"), "the tokenizer's files")
    )


def test_names_that_are_no_paths_are_no_adapters() -> None:
    assert not is_adapter(Path("x" * 5000))
    assert not is_adapter(Path(os.devnull))


def test_the_commit_of_a_hub_model_is_that_of_its_cached_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later versions of transformers don't keep it in the config, and without it no run would be pinned to its weights."""
    commit, config = "0123456789" * 4, PretrainedConfig()
    asked: list[dict[str, str]] = []

    def cached(source: str, name: str, **options: str) -> str:
        asked.append(options)
        return str(tmp_path / "models--owner--name" / "snapshots" / commit / name)

    monkeypatch.setattr(model_files, "cached_file", cached)
    assert model_files.commit_of("owner/name", config) == commit
    assert model_files.commit_of("owner/name", config, "v2") == commit
    assert asked == [{}, {"revision": "v2"}]
    assert model_files.commit_of(str(tmp_path), config) == ""
    config._commit_hash = "f" * 40  # as earlier versions do
    assert model_files.commit_of("owner/name", config) == "f" * 40
    monkeypatch.setattr(model_files, "cached_file", lambda *given, **options: str(tmp_path / "config.json"))
    assert model_files.commit_of("owner/name", PretrainedConfig()) == ""
