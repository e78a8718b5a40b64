"""Export an edit as a PEFT adapter: DoRA for row-scaled edits, plain LoRA for the others, of the rank that the edit has.

A DoRA layer computes m ∘ rownormalize(W + BA). With m = n (W's row norms), A = a and B = −λ n∘v that is the `full`
edit itself: the same matrix, not an approximation; several directions are rows of A and columns of B. The files are written
as PEFT saves them, without wrapping a model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from abliterate.edits import Factors
from abliterate.edits.base import row_norms
from abliterate.errors import AbliterateError, first_line
from abliterate.export.base_weights import Matrices
from abliterate.export.check_weights import RereadAdapter
from abliterate.export.companions import save_companions
from abliterate.export.folder import empty
from abliterate.export.job import ExportJob, Reread, check_modules
from abliterate.export.safetensors_copy import check_room
from abliterate.model.architectures import Target
from abliterate.model.checkpoint import dense_load, empty_model, quiet_bitsandbytes
from abliterate.model.experts import is_fused
from abliterate.model.loader import load_config, load_weights
from abliterate.model.quantized import method_of
from abliterate.settings.schema import LoadSettings

# The quantized bases that PEFT's layers can make dense, as DoRA needs it, and those that plain LoRA leaves alone. On any other
# base PEFT takes a packed weight for a dense one, or casts the adapter to its dtype, without an error.
_DORA_ON = ("bitsandbytes_4bit", "bitsandbytes_8bit", "hqq")
_LORA_ON = (*_DORA_ON, "gptq", "awq")
# The remedy where no adapter can hold an edit.
_INSTEAD = "export a merged model: abliterate export RUN --trial N --kind merged"


class Adapter:
    """The exporter of an adapter directory that loads with plain PEFT on the base model."""

    kind = "adapter"
    stores_weights = False

    def write(self, job: ExportJob, folder: Path) -> Mapping[str, Any]:
        if not job.factors:
            raise AbliterateError("The trial edits no module, so its adapter would be empty; export another trial.")
        dora = any(factors.row_scale is not None for factors in job.factors.values())
        rank = max(factors.a.shape[-2] for factors in job.factors.values())
        if any(factors.row_scale is not None and not factors.row_scale.all() for factors in job.factors.values()):
            raise AbliterateError(f"This trial's edit has rows that DoRA can't express; {_INSTEAD}.")
        if any(factors.column_scale is not None for factors in job.factors.values()):
            raise AbliterateError(f"This trial's edit scales columns, as no adapter can; {_INSTEAD}.")
        matrices = Matrices(job.source, job.load, job.architecture)
        check_modules(job, matrices.targets)
        reason = peft_refusal(matrices.config, job.load, [matrices.targets[name] for name in job.factors], dora=dora)
        if reason:
            raise AbliterateError(f"An adapter can't hold this trial's edits ({reason}); {_INSTEAD}.")
        check_room(4 * sum(rank * sum(matrices.shape(name)) + matrices.shape(name)[0] for name in job.factors), folder)
        from peft import LoraConfig

        empty(folder)  # of what a killed process has left there
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,  # scaling alpha/r = 1
            target_modules=sorted(job.factors),
            use_dora=dora,
            fan_in_fan_out=any(isinstance(matrices.targets[name].module, Conv1D) for name in job.factors),
            base_model_name_or_path=job.base_model,
            revision=_commit(job),
            task_type="CAUSAL_LM",
        )
        config.save_pretrained(str(folder))
        _sort_modules(folder / "adapter_config.json")
        save_file(_tensors(job, matrices, rank, dora=dora), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        save_companions(job, folder)
        return {"method": "dora" if dora else "lora", "rank": rank, "edited_modules": len(job.factors)}

    def load(self, folder: Path, job: ExportJob, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The base with the adapter on it; a quantized base is made dense."""
        load = dense_load(job.load)
        base = load_weights(job.source, load, load_config(job.source, load), dtype, device)
        from peft import PeftModel

        with warnings.catch_warnings():
            # peft asks transformers for a name that the next version drops; a user can do nothing about it.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            return PeftModel.from_pretrained(base, str(folder)).eval()  # type: ignore[return-value]

    def reread(self, folder: Path, job: ExportJob, base: Matrices) -> Reread:
        return RereadAdapter(folder, job)


def _commit(job: ExportJob) -> str | None:
    """The commit of the base on the Hub, with which PEFT loads it; None for a folder, which has none."""
    return None if Path(job.source).is_dir() else job.load.revision or None


def _sort_modules(path: Path) -> None:
    """PEFT writes a set, in a different order in each process; an export's bytes must be the same each time."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def peft_refusal(config: PretrainedConfig, load: LoadSettings, targets: Collection[Target], *, dora: bool = True) -> str:
    """Why PEFT can't put an adapter onto the modules to edit, or ""; PEFT is tried on a model without weights.

    In families whose experts `transformers` fuses, PEFT takes every `down_proj` for fused experts without an error, those of
    dense layers, too; in some families with Mamba mixers it refuses their `out_proj`.
    """
    fused = next((target.name for target in targets if is_fused(target.module)), "")
    if fused:
        return f"PEFT can't express edits of fused experts, as in {fused}"
    method = method_of(config)
    if method and method not in (_DORA_ON if dora else _LORA_ON):
        return f"PEFT can't put {'DoRA' if dora else 'LoRA'} onto a base that is quantized as {method}"
    # Not at the top: peft imports bitsandbytes, which writes to stderr unless it has been quieted.
    quiet_bitsandbytes()
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    expected = {target.name for target in targets}
    conv = any(isinstance(target.module, Conv1D) for target in targets)
    lora = LoraConfig(target_modules=sorted(expected), fan_in_fan_out=conv, task_type="CAUSAL_LM")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="target_parameters", category=RuntimeWarning
            )  # a wrong choice of modules is detected below
            model = inject_adapter_in_model(lora, empty_model(config, load), low_cpu_mem_usage=True)
    except ValueError as error:
        return f"PEFT says: {first_line(error)}"
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    wrong = sorted(adapted ^ expected)
    return f"PEFT takes {wrong[0]} for something else" if wrong else ""


def _tensors(job: ExportJob, matrices: Matrices, rank: int, *, dora: bool) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT's names; the base's matrices are read one at a time, for their row norms."""
    tensors: dict[str, Tensor] = {}
    for name, factors in job.factors.items():
        key = f"base_model.model.{name}"
        a, b = factors.a, factors.b
        if dora:
            a, b, tensors[f"{key}.lora_magnitude_vector"] = dora_factors(factors, matrices.of(matrices.targets[name]))
        # PEFT wants the same rank everywhere; a module may lose fewer directions than others.
        tensors[f"{key}.lora_A.weight"] = pad(a, (0, 0, 0, rank - len(a)))
        tensors[f"{key}.lora_B.weight"] = pad(b, (0, rank - len(a)))
    return {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}


def dora_factors(factors: Factors, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B, magnitude) such that magnitude ∘ rownormalize(W + BA) = diag(row_scale) W + b a, for norm-keeping edits.

    A zero row of W would be 0/0 in PEFT's formula, so it gets B = 1 and magnitude 0, which gives a zero row again.
    """
    assert factors.row_scale is not None, "only row-scaled edits are DoRA"
    norms = row_norms(weight.cpu()).float()
    b = factors.b.cpu() / factors.row_scale.cpu()[:, None]
    empty = norms == 0
    b = torch.where(empty[:, None], torch.ones_like(b), b)
    return factors.a.cpu(), b, norms
