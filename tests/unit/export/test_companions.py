"""An export has every file of its base but weights, cards and plumbing, byte for byte, whatever made them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abliterate.errors import InputError
from abliterate.export import EXPORTERS, base_weights, companions, finished_folder
from abliterate.export.companions import is_companion
from abliterate.model.loader import demo_path, load_tokenizer
from abliterate.settings.schema import LoadSettings
from support.exports import Case, make_case, odd_checkpoint, write
from support.models import logits_of

TEMPLATE = (demo_path() / "model" / "chat_template.jinja").read_text(encoding="utf-8")
KINDS = pytest.mark.parametrize("kind", ["merged", "adapter"])

# Files that must be copied, with contents that no class would write so, and that some classes couldn't read.
COPIED: dict[str, str | bytes] = {
    "tokenizer.model": b"\x00sentencepiece\xff",
    "special_tokens_map.json": '{"eos_token":{"content":"<|im_end|>","lstrip":false}}',
    "added_tokens.json": '{"<|im_end|>":3}\n',
    "vocab.json": "{}",
    "merges.txt": "#version: 0.2\n",
    "qwen.tiktoken": "IQ== 0\n",
    "generation_config.json": '{"do_sample": false, "temperature": 0.7, "eos_token_id": [3, 2]}',
    "preprocessor_config.json": '{"image_processor_type": "NobodysImageProcessor"}',
    "video_preprocessor_config.json": "{}",
    "processor_config.json": '{"processor_class": "NobodysProcessor"}',
    "configuration_own.py": "raise SystemExit('run at import')\n",
    "modeling_own.py": "raise SystemExit('run at import')\n",
    "own/tokenization.py": "raise SystemExit('run at import')\n",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "original/params.json": '{"dim": 32}',
    "original/tokenizer.model": b"\x01\x02",
    "LICENSE": "the licence\n",
    "USE_POLICY.md": "the policy\n",
    "Notice.txt": "the notice\r\n",
    "assets/logo.png": b"\x89PNG",
}
LEFT_OUT = (
    *("README.md", "README_zh.md", "original/readme.txt"),
    *(".gitattributes", ".git/config", ".cache/huggingface/download/config.json.metadata", ".DS_Store", "__pycache__/own.pyc"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "consolidated.safetensors.index.json"),
    *("original/consolidated.00.pth", "model-Q4_K_M.gguf", "x.gguf.part1of2", "onnx/model.onnx", "onnx/model.onnx_data"),
    *("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.ckpt.index", "variables/variables.data-00000-of-00001"),
    *("coreml/Model.mlpackage/Manifest.json", "training_args.bin", "optimizer.pt", "model.safetensors.bak"),
    *("abliterate.json", "recipe.json"),
)


def v4_tokenizer(folder: Path, **changes: Any) -> None:
    """Write the tokenizer as transformers 4 saved it: template inside, no pad token, padding on the right."""
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    record = {
        "added_tokens_decoder": {str(token.pop("id")): token for token in tokens},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": "<|begin|>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 1024,
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(record | changes, indent=1), encoding="utf-8")


def fill(folder: Path) -> None:
    """Put the files above into a model directory, whose config names the code among them."""
    for name, content in (COPIED | dict.fromkeys(LEFT_OUT, "not copied")).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    v4_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A trial on a model whose directory has all these files."""
    case = make_case(tmp_path, stored="float32")
    fill(Path(case.job.source))
    # As a run loads it: with a pad token and padding on the left, which no export may have.
    return replace(case, job=replace(case.job, tokenizer=load_tokenizer(case.job.source, LoadSettings())))


def hashes(folder: Path) -> dict[str, str]:
    """{file: sha256} of a directory."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("how", ["streamed", "as a whole"])
@KINDS
def test_every_file_beside_the_weights_is_the_bases(kind: str, how: str, case: Case, tmp_path: Path) -> None:
    base = Path(case.job.source)
    if how == "as a whole":
        odd_checkpoint(base)
    ok, record = case.check(kind, tmp_path / "out")
    assert ok, record
    expected, found = hashes(base), hashes(tmp_path / "out")
    names = {*COPIED, "tokenizer.json", "tokenizer_config.json"} | ({"config.json"} if kind == "merged" else set())
    assert {name: found.get(name) for name in names} == {name: expected[name] for name in names}
    own = {"README.md", "adapter_config.json", "adapter_model.safetensors"} if kind == "adapter" else {"README.md"}
    assert {name for name in found.keys() - names - own if name != "model.safetensors"} == set()
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "the card"


def test_weights_of_two_names_are_told_from_texts() -> None:
    for name in (
        "vocab.pt-br.json",
        "tokenizer.bin.txt",
        "notes.onnx.md",
        "spiece.model",
        "LICENSE",
        "a/b.json",
        "readmes.json",
    ):
        assert is_companion(name)
    for name in (*LEFT_OUT, "config.json", "adapter_config.json", "model.safetensors", "/etc/passwd", "../x.txt", "two\nlines"):
        assert not is_companion(name)
    assert is_companion("original/config.json")


@pytest.mark.parametrize("what", ["changed", "missing"])
@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "original/params.json", "processor_config.json"])
@KINDS
def test_the_check_covers_them(kind: str, name: str, what: str, case: Case, tmp_path: Path) -> None:
    assert case.check(kind, tmp_path / "out")[0]
    path = tmp_path / "out" / name
    if what == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b" ")
    ok, record = case.check(kind, tmp_path / "out")
    assert not ok
    assert record["checks"] == {"weights": True, "untouched": False}
    assert record["differs"] == [name]


@pytest.mark.parametrize("stands", ["alone", "among others", "in a file of its own", "nowhere"])
@KINDS
def test_only_a_template_of_the_settings_is_written(kind: str, stands: str, case: Case, tmp_path: Path) -> None:
    base = Path(case.job.source)
    named = [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "{{ tools }}"}]
    if stands == "among others":
        v4_tokenizer(base, chat_template=named)
    elif stands != "alone":
        record = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
        del record["chat_template"]
        (base / "tokenizer_config.json").write_text(json.dumps(record), encoding="utf-8")
    if stands == "in a file of its own":
        (base / "chat_template.json").write_text('{"chat_template": "old"}', encoding="utf-8")
    (tmp_path / "mine.jinja").write_text("{{ 'mine, ü' }}", encoding="utf-8")
    job = replace(case.job, load=case.job.load.model_copy(update={"chat_template": str(tmp_path / "mine.jinja")}))
    case = replace(case, job=job)
    ok, record = case.check(kind, tmp_path / "out")
    assert ok, record
    expected, found = hashes(base), hashes(tmp_path / "out")
    changed = {name for name in expected.keys() & found.keys() if expected[name] != found[name]}
    tokenizers, own = "tokenizer_config.json", "chat_template.json"
    holds = {"alone": tokenizers, "among others": tokenizers, "in a file of its own": own, "nowhere": ""}[stands]
    assert changed - {"model.safetensors", "README.md", "adapter_config.json"} == ({holds} if holds else set())
    template = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert (template["default"] if isinstance(template, dict) else template) == "{{ 'mine, ü' }}"
    if stands == "among others":
        written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
        assert written == [{"name": "default", "template": "{{ 'mine, ü' }}"}, named[1]]
    (tmp_path / "out" / "chat_template.jinja").write_text("another", encoding="utf-8")
    assert case.check(kind, tmp_path / "out")[1]["differs"] == ["chat_template.jinja"]


@pytest.mark.parametrize("network", [True, False])
def test_a_hub_model_s_files_are_fetched_by_its_listing(
    network: bool, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network, those that an earlier download has left are copied."""
    hub, snapshot = Path(case.job.source), tmp_path / "snapshot"
    here = ("config.json", "tokenizer.json", "tokenizer_config.json", "original/params.json")
    asked: list[str] = []

    def fetch(source: str, name: str, *, revision: str, **options: bool) -> str:
        assert (source, revision) == ("owner/name", "abc")
        asked.append(name)
        assert network or name in here
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copyfile(hub / name, snapshot / name))

    class Api:
        def list_repo_files(self, source: str, *, revision: str) -> Iterator[str]:
            assert (source, revision) == ("owner/name", "abc")
            if not network:
                raise ConnectionError("no network")
            return iter(hashes(hub))

    monkeypatch.setattr(base_weights, "cached_file", fetch)
    monkeypatch.setattr(base_weights, "skip_retries_without_network", lambda: None)
    monkeypatch.setattr(base_weights, "HfApi", Api)
    job = replace(case.job, source="owner/name", load=case.job.load.model_copy(update={"revision": "abc"}))
    if not network:
        for name in here:
            fetch("owner/name", name, revision="abc")
    (tmp_path / "out").mkdir()
    companions.save_companions(job, tmp_path / "out")
    expected, found = hashes(hub), hashes(tmp_path / "out")
    names = {*COPIED, "tokenizer.json", "tokenizer_config.json"} if network else {*here} - {"config.json"}
    assert found.keys() == {*names, "README.md"}
    assert all(found[name] == expected[name] for name in names)
    assert companions.changed_companions(job, tmp_path / "out") == []
    assert not {name for name in asked if not is_companion(name)} - {"config.json"}


def test_runs_and_exports_in_the_models_directory_stay_there(case: Case, tmp_path: Path) -> None:
    """A run started there writes to runs/, with paths of this machine."""
    base = Path(case.job.source)
    for name in (
        "runs/a/study.journal",
        "runs/a/settings.toml",
        "other/study.name",
        "out.old-1/abliterate.json",
        "out.old-1/x",
    ):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("/home/somebody", encoding="utf-8")
    (base / "loop").symlink_to(base, target_is_directory=True)
    (base / "linked.txt").symlink_to(base / "LICENSE")  # as all files of a snapshot of the Hub are
    assert case.check("merged", tmp_path / "out")[0]
    found = hashes(tmp_path / "out")
    assert not [name for name in found if name.startswith(("runs", "other", "out.old", "loop"))]
    assert found["linked.txt"] == found["LICENSE"]


def test_a_file_that_cannot_be_read_is_named(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def refused(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == "NOTICE":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **options)

    (Path(case.job.source) / "NOTICE").touch()
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(InputError, match=r"NOTICE can't be read \(Permission denied\); make it readable, or remove it\."):
        write("merged", case.job, tmp_path / "out")


def test_a_template_that_is_gone_is_named(case: Case, tmp_path: Path) -> None:
    gone = case.job.load.model_copy(update={"chat_template": str(tmp_path / "gone.jinja")})
    with pytest.raises(InputError, match=r"gone\.jinja can't be read any more"):
        write("merged", replace(case.job, load=gone), tmp_path / "out")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
@pytest.mark.parametrize("kind", ["merged", "as a whole", "adapter"])
def test_modes_follow_the_umask(kind: str, umask: int, case: Case, tmp_path: Path) -> None:
    if kind == "as a whole":
        odd_checkpoint(Path(case.job.source))
    before = os.umask(umask)
    try:
        with finished_folder(tmp_path / "out") as folder:
            EXPORTERS[kind if kind == "adapter" else "merged"].write(case.job, folder)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


# Loads a directory with transformers 4.57.3 and writes what it finds.
PROBE = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
messages = [{"role": "user", "content": "Hello there"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
logits = model(torch.tensor([ids])).logits[0, -1].tolist()
found = {"version": transformers.__version__, "ids": ids, "logits": logits}
found |= {"side": tokenizer.padding_side, "pad": tokenizer.pad_token}
json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="session")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers 4.57.3, to be put before this environment's packages."""
    folder = tmp_path_factory.mktemp("older")
    packages = ["transformers==4.57.3", "tokenizers==0.22.1", "huggingface_hub==0.36.0"]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *packages]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"pip can't get {packages[0]} here: {done.stderr.strip()[-200:]}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["streamed", "as a whole"])
def test_transformers_4_loads_what_it_loaded_before(how: str, older: Path, tmp_path: Path) -> None:
    case = make_case(tmp_path, stored="float32")
    base = Path(case.job.source)
    v4_tokenizer(base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config |= {"rope_theta": 500.0, "torch_dtype": config.pop("dtype"), "transformers_version": "4.57.3"}
    del config["rope_parameters"]
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if how == "as a whole":
        odd_checkpoint(base)
    facts = write("merged", case.job, tmp_path / "out")
    assert facts["streamed"] is (how == "streamed")
    command = [sys.executable, "-c", PROBE, str(tmp_path / "out"), str(tmp_path / "found.json")]
    environment = os.environ | {"PYTHONPATH": str(older), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert (found["version"], found["side"], found["pad"]) == ("4.57.3", "right", None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = model(torch.tensor([found["ids"]])).logits[0, -1]
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=1e-4, atol=1e-4)
    assert logits_of(model).isfinite().all()


def test_a_link_out_of_the_model_s_directory_isnt_followed(case: Case, tmp_path: Path) -> None:
    """A stranger's model may link to any private file; links within it and into the Hub's cache are usual."""
    base, private = Path(case.job.source), tmp_path / "id_rsa"
    private.write_text("private", encoding="utf-8")
    (base / "NOTICE").symlink_to(private)
    (base / "original").mkdir(exist_ok=True)
    (base / "original" / "tokenizer.json").symlink_to(private)
    (base / "tokenizer.model").unlink(missing_ok=True)
    (base / "tokenizer.model").symlink_to(private)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "merges.txt").write_text("#version: 0.2", encoding="utf-8")
    (base / "merges.txt").unlink(missing_ok=True)
    (base / "merges.txt").symlink_to(tmp_path / "elsewhere" / "merges.txt")
    (base / "inner.txt").write_text("mine", encoding="utf-8")
    (base / "again.txt").symlink_to(base / "inner.txt")
    (base / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (base / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "secret.json").write_text('{"auth": "private"}', encoding="utf-8")  # which loads as any of the others
    for name in ("generation_config.json", "special_tokens_map.json"):
        (base / name).unlink(missing_ok=True)
        (base / name).symlink_to(tmp_path / "secret.json")
    for name, folder in (("vocab.json", "models--a--b"), ("vocab.txt", "private")):
        (tmp_path / folder / "blobs").mkdir(parents=True)
        (tmp_path / folder / "blobs" / "1").write_text("{}", encoding="utf-8")
        (base / name).unlink(missing_ok=True)
        (base / name).symlink_to(tmp_path / folder / "blobs" / "1")
    found = companions.companions_of(case.job)
    assert "vocab.json" in found
    assert "vocab.txt" not in found
    assert not {"generation_config.json", "special_tokens_map.json"} & set(found)
    assert {"again.txt", "inner.txt", "tokenizer.json", "merges.txt"} <= set(found)
    assert not {"NOTICE", "original/tokenizer.json", "tokenizer.model"} & set(found)


def test_links_into_the_hubs_cache_are_followed(case: Case, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--o--n" / "snapshots" / "abc"
    shutil.copytree(case.job.source, snapshot)
    blobs = tmp_path / "models--o--n" / "blobs"
    blobs.mkdir()
    (blobs / "1").write_text("a licence", encoding="utf-8")
    (snapshot / "NOTICE").symlink_to(blobs / "1")
    assert "NOTICE" in companions.companions_of(replace(case.job, source=str(snapshot)))
