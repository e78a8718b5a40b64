"""Inflate a model to another shape without changing its function: real cost on real behaviour, without real weights.

    .venv/bin/python scripts/inflate_model.py --out DIR --layers 18 --width 512 --mlp 1344 --heads 8 --head-dim 64

The residual stream is padded with zeros to the new width: RMS norms then divide by less, so their weights are scaled by √(d/D)
and eps by d/D. A head dimension that is a multiple keeps its RoPE frequencies by spacing: pair j of hd/2 goes to pair j·HD/hd.
Scores are divided by √HD instead of √hd, so queries are scaled by √(HD/hd). Weights that no output depends on are random, so
that they cost as much as real weights. The layers are spread evenly among new layers, which write zero. Llama and Qwen2 can be
inflated. Every layer is a shard of its own, so that one layer is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from abliterate.model.loader import demo_path

STD = 0.02
FAMILIES = ("llama", "qwen2")


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder: `width` d_model, `mlp` d_ff, `heads` query and `kv_heads` key and value heads of `head_dim`."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int

    @staticmethod
    def of(config: dict[str, int]) -> Shape:
        """The shape in a model's config.json."""
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        sizes = (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"])
        return Shape(*sizes, heads, kv_heads, head_dim)

    def check(self, small: Shape) -> None:
        """Raise ValueError if `small` can't be inflated to this shape."""
        if self.head_dim % small.head_dim:
            raise ValueError(f"head_dim must be a multiple of {small.head_dim}, not {self.head_dim}")
        if self.heads % self.kv_heads or self.kv_heads < small.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, and kv_heads at least {small.kv_heads}")
        if self.heads // self.kv_heads < small.heads // small.kv_heads:
            raise ValueError(f"there must be at least {small.heads // small.kv_heads} query heads for each key head")
        for name in ("layers", "width", "mlp"):
            if getattr(self, name) < getattr(small, name):
                raise ValueError(f"{name} must be at least {getattr(small, name)}")


class Inflation:
    """Converts the tensors of a layer from the small shape to the large shape."""

    def __init__(self, small: Shape, large: Shape, seed: int, device: str = "cpu") -> None:
        large.check(small)
        self.small, self.large, self._device = small, large, device
        self._generator = torch.Generator(device).manual_seed(seed)
        ratio = large.head_dim // small.head_dim
        half = torch.arange(small.head_dim // 2) * ratio
        self._dims = torch.cat([half, half + large.head_dim // 2])  # the new indices of a head's dimensions
        group, large_group = small.heads // small.kv_heads, large.heads // large.kv_heads
        self._q = self._rows([head // group * large_group + head % group for head in range(small.heads)])
        self._kv = self._rows(list(range(small.kv_heads)))

    def norm(self, weight: Tensor) -> Tensor:
        """(d) → (D)."""
        return self._into(weight * math.sqrt(self.small.width / self.large.width), self.large.width)

    def embedding(self, weight: Tensor) -> Tensor:
        """(vocabulary, d) → (vocabulary, D): zeros are appended, so that the residual stream is zero there."""
        return torch.nn.functional.pad(weight, (0, self.large.width - self.small.width))

    def layer(self, old: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of one layer, by their names within it."""
        small, large = self.small, self.large
        q_rows, kv_rows = large.heads * large.head_dim, large.kv_heads * large.head_dim
        scale = math.sqrt(large.head_dim / small.head_dim)
        new = {}
        for name, tensor in old.items():
            kind, suffix = name.rsplit(".", 2)[-2:] if "proj" in name else (name, "weight")
            if "norm" in kind:
                new[name] = self.norm(tensor)
            elif kind == "q_proj":  # zero in the new dimensions of a kept head, where the keys are random
                new[name] = self._write_in(tensor * scale, q_rows, self._q, suffix, empty=self._spread(self._q, small.heads))
            elif kind in ("k_proj", "v_proj"):
                new[name] = self._write_in(tensor, kv_rows, self._kv, suffix)
            elif kind in ("gate_proj", "up_proj"):
                new[name] = self._write_in(tensor, large.mlp, torch.arange(small.mlp), suffix)
            elif kind == "o_proj":
                new[name] = self._write_out(tensor, q_rows, self._q, suffix)
            elif kind == "down_proj":
                new[name] = self._write_out(tensor, large.mlp, torch.arange(small.mlp), suffix)
            else:
                raise ValueError(f"no rule for the tensor {name}")
        return new

    def silent(self, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """A layer of random tensors, shaped like those of `like`, that writes nothing."""
        writes = ("o_proj", "down_proj")
        return {
            name: torch.zeros_like(tensor) if any(kind in name for kind in writes) else self._random(*tensor.shape)
            for name, tensor in like.items()
        }

    def _rows(self, heads: list[int]) -> Tensor:
        return torch.cat([head * self.large.head_dim + self._dims for head in heads])

    def _spread(self, rows: Tensor, heads: int) -> Tensor:
        """All rows of the heads that `rows` lie in."""
        first = rows.reshape(heads, -1)[:, 0] // self.large.head_dim * self.large.head_dim
        return (first[:, None] + torch.arange(self.large.head_dim)).flatten()

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self._device) * STD

    def _into(self, tensor: Tensor, size: int) -> Tensor:
        new = self._random(size)
        new[: len(tensor)] = tensor
        return new

    def _write_in(self, old: Tensor, size: int, rows: Tensor, suffix: str, empty: Tensor | None = None) -> Tensor:
        """A matrix (or bias) that reads the residual stream: random except for the old rows."""
        new = self._random(size) if suffix == "bias" else self._random(size, self.large.width)
        if empty is not None:
            new[empty] = 0
        if suffix == "bias":
            new[rows] = old
        else:
            new[rows, : old.shape[1]] = old
        return new

    def _write_out(self, old: Tensor, size: int, columns: Tensor, suffix: str) -> Tensor:
        """A matrix (or bias) that writes to the residual stream: zero except for the old entries."""
        shape = (self.large.width,) if suffix == "bias" else (self.large.width, size)
        new = torch.zeros(shape, device=self._device)
        if suffix == "bias":
            new[: len(old)] = old
        else:
            new[: old.shape[0], columns] = old
        return new


def inflate(source: Path, out: Path, large: Shape, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> int:
    """Write the inflated model directory; returns its number of parameters. A GPU makes random weights much faster.

    Raises:
        ValueError: the family or the shape is not supported.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] not in FAMILIES:
        raise ValueError(f"only {' and '.join(FAMILIES)} models can be inflated, not {config['model_type']}")
    small = Shape.of(config)
    inflation = Inflation(small, large, seed, device)
    tensors: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= {name: tensor.to(device).float() for name, tensor in load_file(file).items()}
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if (
            file.is_file()
            and file.suffix != ".safetensors"
            and file.name not in ("config.json", "model.safetensors.index.json")
        ):
            shutil.copy(file, out / file.name)
    writer = _Writer(out, dtype, large.layers + 1)
    positions = [round(index * large.layers / small.layers) for index in range(small.layers)]
    example: dict[str, Tensor] = {}
    for position in range(large.layers):
        if position in positions:
            prefix = f"model.layers.{positions.index(position)}."
            old = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            layer = example = inflation.layer(old)
        else:
            layer = inflation.silent(example)
        writer.add({f"model.layers.{position}.{name}": tensor for name, tensor in layer.items()})
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.")}
    writer.add({n: inflation.norm(t) if n == "model.norm.weight" else inflation.embedding(t) for n, t in rest.items()})
    writer.finish()
    config |= {"hidden_size": large.width, "intermediate_size": large.mlp, "num_hidden_layers": large.layers}
    config |= {"num_attention_heads": large.heads, "num_key_value_heads": large.kv_heads, "head_dim": large.head_dim}
    config |= {"rms_norm_eps": config["rms_norm_eps"] * small.width / large.width, "dtype": str(dtype).removeprefix("torch.")}
    if config.get("layer_types"):
        config["layer_types"] = ["full_attention"] * large.layers
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return writer.parameters


class _Writer:
    """Writes the shards of a checkpoint, one at a time."""

    def __init__(self, out: Path, dtype: torch.dtype, shards: int) -> None:
        self._out, self._dtype, self._shards = out, dtype, shards
        self._map: dict[str, str] = {}
        self._bytes = 0
        self.parameters = 0
        self._count = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        self._count += 1
        name = f"model-{self._count:05d}-of-{self._shards:05d}.safetensors"
        stored = {key: tensor.to(self._dtype).cpu().contiguous() for key, tensor in tensors.items()}
        save_file(stored, self._out / name, metadata={"format": "pt"})
        self._map |= dict.fromkeys(stored, name)
        self._bytes += sum(tensor.nbytes for tensor in stored.values())
        self.parameters += sum(tensor.numel() for tensor in stored.values())

    def finish(self) -> None:
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._map}
        (self._out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def main() -> None:
    """Inflate the model and print its size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=demo_path() / "model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=0, help="0: half of the query heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where random weights are made")
    args = parser.parse_args()
    kv_heads = args.kv_heads or args.heads // 2
    large = Shape(args.layers, args.width, args.mlp, args.heads, kv_heads, args.head_dim)
    try:
        count = inflate(args.source, args.out, large, getattr(torch, args.dtype), args.seed, args.device)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{count / 1e6:.1f} M parameters in {args.out}")


if __name__ == "__main__":
    main()
