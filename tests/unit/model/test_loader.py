"""Loading, chat rendering and the architecture table, on tiny models built offline."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from abliterate.errors import AbliterateError, InputError
from abliterate.model import loader
from abliterate.model.architectures import ATTENTION, MLP, find_targets, missing_components
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.weights import dense_weight, out_features
from abliterate.settings.schema import LoadSettings
from abliterate.types import Prompt
from support.contracts import ArchitectureContract
from support.models import (
    CPU,
    FAMILIES,
    PROMPTS,
    find_architecture,
    make_chat,
    make_loaded,
    make_model,
    make_tokenizer,
    save_model,
    write_weight,
)

NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def load(folder: Path | str, **settings: Any) -> loader.LoadedModel:
    """`load_model` with a one-prompt probe."""
    return loader.load_model(
        str(folder),
        LoadSettings(**settings),
        CPU,
        lambda tokenizer, at: PromptEncoder(tokenizer, at).encode(PROMPTS[:1]),
        print,
    )


class TestFamilies(ArchitectureContract):
    """Those of which the tests build tiny models; `test_models.py` has all others."""

    @pytest.fixture(params=FAMILIES)
    def model(self, request: pytest.FixtureRequest) -> PreTrainedModel:
        return make_model(request.param)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_both_components(family: str) -> None:
    loaded = make_loaded(make_model(family))
    assert len(loaded.targets) == 2 * len(loaded.layers)
    assert {target.component for target in loaded.targets} == {ATTENTION, MLP}
    assert missing_components(loaded.targets, loaded.architecture, len(loaded.layers)) == {}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dense_weight_is_what_multiplies(family: str) -> None:
    target = make_loaded(make_model(family)).targets[1].module
    weight = dense_weight(target)
    x = torch.randn(5, weight.shape[1])
    torch.testing.assert_close(target(x), torch.nn.functional.linear(x, weight, getattr(target, "bias", None)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_write_weight_is_read_back(family: str) -> None:
    target = make_loaded(make_model(family)).targets[0].module
    wanted = torch.randn_like(dense_weight(target))
    write_weight(target, wanted)
    assert torch.equal(dense_weight(target), wanted)
    assert out_features(target) == wanted.shape[0]


def test_unknown_family_names_the_remedy() -> None:
    with pytest.raises(InputError, match=r"load\.decoder_layers"):
        find_architecture("no_such_family")


def test_family_by_settings_finds_modules() -> None:
    described = find_architecture("odd", "model.layers", {ATTENTION: "self_attn.o_proj", MLP: "mlp.none|mlp.down_proj"})
    assert len(find_targets(make_model("llama"), described, 32)) == 6


def test_no_matrix_to_edit_is_an_error() -> None:
    described = find_architecture("odd", "model.layers", {ATTENTION: "self_attn.nothing"})
    with pytest.raises(InputError, match="no matrix to edit"):
        find_targets(make_model("llama"), described, 32)


def test_module_of_another_width_is_an_error() -> None:
    described = find_architecture("odd", "model.layers", {MLP: "mlp.up_proj"})
    with pytest.raises(InputError, match="48 features"):
        find_targets(make_model("llama"), described, 32)


def test_wrong_layer_path_is_an_error() -> None:
    described = find_architecture("odd", "model.nowhere", {MLP: "mlp.down_proj"})
    with pytest.raises(InputError, match="no decoder layers"):
        find_targets(make_model("llama"), described, 32)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_loaded_equals_saved(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    loaded = load(save_model(model, tmp_path / "m"))
    saved = dict(model.named_parameters())
    assert all(torch.equal(parameter, saved[name]) for name, parameter in loaded.model.named_parameters())
    assert loaded.info.n_layers == 3
    assert loaded.info.d_model == 32
    assert loaded.info.dtype == "float32"
    assert not loaded.model.training


def test_fingerprint_follows_weights(tmp_path: Path) -> None:
    first = load(save_model(make_model("llama", seed=0), tmp_path / "a")).info.fingerprint
    again = load(save_model(make_model("llama", seed=0), tmp_path / "b")).info.fingerprint
    other = load(save_model(make_model("llama", seed=1), tmp_path / "c")).info.fingerprint
    assert first == again
    assert first != other


def test_dtypes_are_tried_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(make_model("llama"), tmp_path / "m")
    monkeypatch.setattr(loader, "_generates", lambda model, probe: model.dtype == torch.float32)
    assert load(folder, dtypes=("float16", "float32")).info.dtype == "float32"
    with pytest.raises(AbliterateError, match="float16, bfloat16"):
        load(folder, dtypes=("float16", "bfloat16"))


@pytest.mark.parametrize("name", ["/no/such/model", "./nowhere", "a/b/c", ""])
def test_missing_model_is_bad_input(name: str) -> None:
    with pytest.raises(InputError):
        loader.resolve_source(name)


def test_folder_without_model_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        loader.resolve_source(str(tmp_path))


def test_damaged_model_is_bad_input(tmp_path: Path) -> None:
    folder = save_model(make_model("llama"), tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InputError, match="can't be loaded"):
        load(folder)


def test_public_name_hides_the_path(tmp_path: Path) -> None:
    folder = tmp_path / "secret" / "model-x"
    folder.mkdir(parents=True)
    assert loader.public_name(str(folder)) == "model-x"
    assert loader.public_name("owner/name") == "owner/name"


def test_chat_has_one_bos() -> None:
    chat = make_chat()
    batch = chat.encode(PROMPTS)
    bos = (batch["input_ids"] == chat.tokenizer.bos_token_id) & (batch["attention_mask"] == 1)
    assert (bos.sum(dim=1) == 1).all()


def test_no_double_bos_where_tokenizer_would_add_one() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id  # it would
    batch = make_chat(tokenizer).encode(PROMPTS)
    bos = (batch["input_ids"] == tokenizer.bos_token_id) & (batch["attention_mask"] == 1)
    assert (bos.sum(dim=1) == 1).all()


def test_padding_is_left() -> None:
    mask = make_chat().encode(PROMPTS)["attention_mask"]
    assert (mask[:, -1] == 1).all()
    assert mask[0, 0] == 0


def test_pads_carry_the_rows_own_first_token() -> None:
    batch = make_chat().encode(PROMPTS)
    pads = batch["attention_mask"] == 0
    assert pads.any()
    assert (batch["input_ids"][pads] == make_tokenizer().bos_token_id).all()
    alone = [make_chat().token_ids(prompt) for prompt in PROMPTS]
    assert [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)] == alone


def test_system_prompt_and_prefix_are_rendered() -> None:
    text = PromptEncoder(make_tokenizer(), CPU, "Sure:").render(Prompt("Question?", "Be brief."))
    assert text.index("Be brief.") < text.index("Question?") < text.index("assistant")
    assert text.endswith("Sure:")


def test_template_without_system_role_gets_it_before_the_user_text() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    text = make_chat(tokenizer).render(Prompt("Question?", "Be brief."))
    assert "user\nBe brief.\n\nQuestion?" in text
    assert "system" not in text


def test_template_that_never_renders_is_bad_input() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(InputError, match=r"load\.chat_template"):
        make_chat(tokenizer).render(PROMPTS[0])


def test_no_template_is_bad_input() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        make_chat(tokenizer)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the model's one weight file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("quantization", ["none", "bnb_8bit"])
def test_missing_weights_are_bad_input(quantization: str, tmp_path: Path) -> None:
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    folder = save_model(make_model("llama"), tmp_path / "m")

    def drop_layer(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.2." in name]:
            del tensors[name]

    change_tensors(folder, drop_layer)
    with pytest.raises(InputError, match=r"incomplete: .* lack model\.layers\.2\.input_layernorm\.weight, .* and 6 more"):
        load(folder, quantization=quantization)


def test_weights_of_another_shape_are_bad_input(tmp_path: Path) -> None:
    folder = save_model(make_model("llama"), tmp_path / "m")
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(InputError, match=r"lack model\.norm\.weight, or store them in another shape"):
        load(folder)


def test_tied_model_is_complete(tmp_path: Path) -> None:
    model = make_model("qwen2")
    folder = save_model(model, tmp_path / "m")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = load(folder).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_fingerprint_follows_code(tmp_path: Path) -> None:
    folder = save_model(make_model("llama"), tmp_path / "m")
    config = loader.load_config(str(folder), LoadSettings())
    fingerprints = [loader.fingerprint(str(folder), config)]
    for code in ("x = 1\n", "x = 2\n"):
        (folder / "modeling_own.py").write_text(code, encoding="utf-8")
        fingerprints.append(loader.fingerprint(str(folder), config))
    assert len(set(fingerprints)) == 3


FULL, UNKNOWN = torch.OutOfMemoryError("CUDA out of memory"), RuntimeError('not implemented for "Half"')


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("load_weights", FULL),
        ("_generates", UNKNOWN),
        pytest.param("load_weights", UNKNOWN, marks=pytest.mark.slow),
        pytest.param("_generates", FULL, marks=pytest.mark.slow),
    ],
)
def test_dtype_that_fails_leads_to_the_next(
    place: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(make_model("llama"), tmp_path / "m")
    real, alive, warnings = getattr(loader, place), [], []

    def failing(*args: Any) -> Any:
        if torch.float16 in args or getattr(args[0], "dtype", None) == torch.float16:
            alive.append(weakref.ref(args[0]) if place == "_generates" else lambda: None)
            raise type(error)(*error.args)  # a new one: the traceback of one that a test keeps would keep the model
        assert alive[0]() is None, "the failed model is still in memory"
        return real(*args)

    monkeypatch.setattr(loader, place, failing)
    loaded = loader.load_model(
        str(folder),
        LoadSettings(dtypes=("float16", "float32")),
        CPU,
        lambda tokenizer, at: PromptEncoder(tokenizer, at).encode(PROMPTS[:1]),
        warnings.append,
    )
    assert loaded.info.dtype == "float32"
    assert [str(error) in warning and "float16" in warning for warning in warnings] == [True]
    with pytest.raises(AbliterateError, match="works in none of float16") as caught:
        load(folder, dtypes=("float16",))
    assert not isinstance(caught.value, InputError)
    assert str(error) in str(caught.value)


def test_bad_input_tries_no_other_dtype(tmp_path: Path) -> None:
    folder = save_model(make_model("llama"), tmp_path / "m")
    (folder / "model.safetensors").unlink()
    warnings: list[str] = []
    with pytest.raises(InputError, match="can't be loaded"):
        loader.load_model(
            str(folder),
            LoadSettings(),
            CPU,
            lambda tokenizer, at: PromptEncoder(tokenizer, at).encode(PROMPTS[:1]),
            warnings.append,
        )
    assert warnings == []


QUIET = """
import sys, abliterate.pipeline.run
print(*[name for name in ("peft", "bitsandbytes") if name in sys.modules])
import torch, transformers
transformers.utils.logging.disable_progress_bar()
from abliterate.model.chat_template import PromptEncoder
from abliterate.export import EXPORTERS
from abliterate.model import loader
from abliterate.settings.schema import LoadSettings
from abliterate.types import Prompt
load = LoadSettings(quantization="bnb_8bit")
loader.load_model("demo", load, torch.device("cpu"), lambda t, at: PromptEncoder(t, at).encode([Prompt("Hi")]), print)
import peft
"""


def test_the_pipeline_imports_neither_peft_nor_bitsandbytes_and_both_are_quiet() -> None:
    pytest.importorskip("bitsandbytes")
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []
    assert done.stderr == ""


@pytest.mark.parametrize("kernel", ["owner/kernel", {"": "owner/kernel@v2:attention"}])
def test_kernels_that_a_config_names_are_code(kernel: Any, tmp_path: Path) -> None:
    """A model's own file can't choose code from the Hub; a person can, or can choose another attention."""
    path = save_model(make_model("llama"), tmp_path) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"attn_implementation": kernel}
    path.write_text(json.dumps(config), encoding="utf-8")
    for work in (lambda: loader.skeleton(str(tmp_path), LoadSettings(), CPU), lambda: load(tmp_path)):
        with pytest.raises(InputError, match=r"kernels owner/kernel.*, which are code from the Hub; allow them with --set"):
            work()
    found = loader.skeleton(str(tmp_path), LoadSettings(attn_implementation="eager"), CPU)
    assert found is not None
    assert found.model.config._attn_implementation == "eager"
    assert load(tmp_path, attn_implementation="eager").model.config._attn_implementation == "eager"


OWN_CODE = '''
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM


class OwnLayer(LlamaDecoderLayer):
    """Its MLP has another name than in the class of transformers."""

    mlp = property(lambda self: self.feed)

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.feed = self._modules.pop("mlp")


class OwnForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers = nn.ModuleList(OwnLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()
'''


def test_a_models_own_code_may_name_its_modules_otherwise(tmp_path: Path) -> None:
    """By the table's names its MLPs wouldn't be found, and nothing would say that they stay as they are."""
    folder = save_model(make_model("llama"), tmp_path / "own")
    (folder / "modeling_own.py").write_text(OWN_CODE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = {name.replace(".mlp.", ".feed."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load(folder, trust_remote_code=True)
    assert loaded.architecture.found_by == "structure"
    layers = len(loaded.layers)
    assert sorted(target.name.split(".", 3)[3] for target in loaded.targets) == sorted(
        ["self_attn.o_proj"] * layers + ["feed.down_proj"] * layers
    )
    config = loader.load_config(str(folder), LoadSettings())
    plain = loader.known_architecture(config, LoadSettings())  # transformers' own class is loaded
    assert plain is not None
    assert plain.found_by == "table"
    with pytest.raises(InputError, match=r"load\.readers needs the module names of llama in transformers"):
        loader.known_architecture(config, LoadSettings(trust_remote_code=True, readers=True))
    named = loader.known_architecture(
        config, LoadSettings(trust_remote_code=True, components={MLP: "feed.down_proj"}, decoder_layers="model.layers")
    )
    assert named is not None
    assert named.found_by == "settings"


def test_layers_that_settings_name_take_the_place_of_a_rows() -> None:
    config = make_model("llama").config
    found = loader.known_architecture(config, LoadSettings(decoder_layers="language_model.model.layers"))
    row = loader.known_architecture(config, LoadSettings())
    assert found is not None
    assert row is not None
    assert (found.layers, found.components) == ("language_model.model.layers", row.components)
