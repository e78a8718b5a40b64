"""Pack weights in quantized formats, element by element from each format's definition, and save them as checkpoints.

Nothing here is shared with `abliterate.model.formats`, whose unpacking the tests check with this independent packing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from abliterate.model.loader import demo_path

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
Packed = tuple[dict[str, Tensor], Tensor]  # ({end of the name: tensor}, the W (d_out, d_in) that the tensors encode)


def bit_stream(codes: list[int], bits: int) -> list[int]:
    """Pack codes one after the other, lowest bits first, into signed 32-bit words."""
    total = sum(code << (index * bits) for index, code in enumerate(codes))
    words = [(total >> (32 * index)) & 0xFFFFFFFF for index in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def rows_as_words(codes: Tensor, bits: int) -> Tensor:
    """Pack each row (…, n) into words."""
    return torch.tensor([bit_stream(row.tolist(), bits) for row in codes], dtype=torch.int32)


def gptq(weight: Tensor, *, bits: int = 4, group: int = 16, version: int = 1, act_order: bool = False) -> Packed:
    """GPTQ: codes along d_in, zero points along d_out, asymmetric."""
    d_out, d_in = weight.shape
    order = torch.randperm(d_in, generator=torch.Generator().manual_seed(0)) if act_order else torch.arange(d_in)
    index = torch.empty(d_in, dtype=torch.int64)
    index[order] = torch.arange(d_in) // group
    scales, zeros = torch.zeros(d_in // group, d_out), torch.zeros(d_in // group, d_out, dtype=torch.int64)
    top = 2**bits - 1
    for g in range(d_in // group):
        part = weight[:, index == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scales[g] = ((high - low) / top).half().float()
        zeros[g] = (-low / scales[g]).round().clamp(0, top).long()
    codes = (weight / scales[index].T + zeros[index].T).round().clamp(0, top).long()
    dense = torch.zeros_like(weight)
    for i in range(d_in):
        dense[:, i] = scales[index[i]] * (codes[:, i] - zeros[index[i]])
    stored = (zeros - 1) % 2**bits if version == 1 else zeros
    tensors = {
        ".qweight": rows_as_words(codes, bits).T.contiguous(),
        ".qzeros": rows_as_words(stored, bits),
        ".scales": scales.half(),
        ".g_idx": index.int(),
    }
    return tensors, dense


def awq(weight: Tensor, *, group: int = 16) -> Packed:
    """AWQ's GEMM layout: output 8 j + AWQ_ORDER[k] is the k-th code of word j."""
    d_out, d_in = weight.shape
    tensors, dense = gptq(weight, group=group, version=2)
    codes = torch.zeros(d_in, d_out, dtype=torch.int64)
    zeros = torch.zeros(d_in // group, d_out, dtype=torch.int64)
    for o in range(d_out):
        for g in range(d_in // group):
            zeros[g, o] = (int(tensors[".qzeros"][g, o // 8]) >> (4 * (o % 8))) & 15
        for i in range(d_in):
            codes[i, o] = (int(tensors[".qweight"][i // 8, o]) >> (4 * (i % 8))) & 15

    def interleaved(rows: Tensor) -> Tensor:
        moved = [[row[8 * j + AWQ_ORDER[k]] for j in range(d_out // 8) for k in range(8)] for row in rows.tolist()]
        return rows_as_words(torch.tensor(moved), 4)

    return {".qweight": interleaved(codes), ".qzeros": interleaved(zeros), ".scales": tensors[".scales"]}, dense


def fp8(weight: Tensor, *, block: tuple[int, int] = (16, 16), suffix: str = ".weight_scale_inv") -> Packed:
    """FP8 with a scale per block; blocks at the edges are cut off."""
    d_out, d_in = weight.shape
    scales = torch.zeros(-(-d_out // block[0]), -(-d_in // block[1]))
    stored, dense = torch.zeros_like(weight).to(torch.float8_e4m3fn), torch.zeros_like(weight)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            rows, columns = slice(r * block[0], (r + 1) * block[0]), slice(c * block[1], (c + 1) * block[1])
            scales[r, c] = weight[rows, columns].abs().max() / 448
            stored[rows, columns] = (weight[rows, columns] / scales[r, c]).to(torch.float8_e4m3fn)
            dense[rows, columns] = stored[rows, columns].float() * scales[r, c]
    return {".weight": stored, suffix: scales}, dense


def nearest_fp4(value: float) -> int:
    """The code of the E2M1 number next to a value."""
    code = min(range(8), key=lambda index: abs(E2M1[index] - abs(value)))
    return code + 8 if value < 0 else code


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(blocks (…, G, 16), scales (…, G), W) for blocks of 32 values along the last dimension; 4-bit codes in order."""
    flat = weight.reshape(-1, 32)
    blocks, scales = torch.zeros(len(flat), 16, dtype=torch.uint8), torch.zeros(len(flat), dtype=torch.uint8)
    dense = torch.zeros_like(flat)
    for row, values in enumerate(flat):
        exponent = int(torch.log2(values.abs().max() / 6).ceil())
        codes = [nearest_fp4(float(value) / 2.0**exponent) for value in values]
        blocks[row] = torch.tensor([codes[2 * k] | codes[2 * k + 1] << 4 for k in range(16)], dtype=torch.uint8)
        scales[row] = exponent + 127
        dense[row] = torch.tensor([(-1 if code & 8 else 1) * E2M1[code & 7] * 2.0**exponent for code in codes])
    shape = weight.shape[:-1]
    return blocks.view(*shape, -1, 16), scales.view(*shape, -1), dense.view(weight.shape)


def packed_int4(weight: Tensor, *, group: int = 16) -> Packed:
    """compressed-tensors' pack-quantized, symmetric: signed codes, stored with an offset of 8."""
    d_out, d_in = weight.shape
    scales, dense, codes = (
        torch.zeros(d_out, d_in // group),
        torch.zeros_like(weight),
        torch.zeros(d_out, d_in, dtype=torch.int64),
    )
    for o in range(d_out):
        for i in range(d_in):
            start = i // group * group
            scales[o, i // group] = float((weight[o, start : start + group].abs().max() / 7).bfloat16())
            code = max(-8, min(7, round(float(weight[o, i]) / float(scales[o, i // group]))))
            codes[o, i], dense[o, i] = code + 8, code * scales[o, i // group]
    shape = torch.tensor([d_out, d_in])
    return {".weight_packed": rows_as_words(codes, 4), ".weight_scale": scales.bfloat16(), ".weight_shape": shape}, dense


def quantize_folder(
    source: Path, folder: Path, pack: Callable[[Tensor], Packed], entry: Mapping[str, Any], *, ends: str = "_proj.weight"
) -> dict[str, Tensor]:
    """Copy a model directory and pack every matrix whose name ends so; returns {name: the W it encodes}."""
    shutil.copytree(source, folder)
    tensors, meaning = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(ends)]:
        parts, meaning[name] = pack(tensors.pop(name).float())
        tensors |= {name.removesuffix(".weight") + ending: part for ending, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(entry)}), encoding="utf-8")
    return meaning


DEMO = demo_path() / "model"
