"""Gradient descent on θ by Adam: one step on a batch of training rows, with the state that continues it exactly.

The edited pass is the one of trials: the same hooks apply the same factors, which here are leaves of the graph. Where memory is
short, activations are kept one layer at a time (checkpointing), and batches shrink when it runs out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from abliterate.edits import Factors
from abliterate.engine.batching import Batches
from abliterate.evaluation.teacher_forced import TeacherForced, answer_logits, fed_tokens
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.formats import opaque, storage_of
from abliterate.refine.loss import Loss, Rows, kl_losses, target_loss
from abliterate.refine.parameters import Parameters

# Steps between two looks at the validation rows, at which the state becomes durable.
LOOK = 10
# The most bytes of the unedited model's logits that are kept in main memory.
BASE_LOGITS_BYTES = 2**30
# A module and its arguments.
_Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
# One row of a batch: whether it is harmful, and the row.
_Item = tuple[bool, TeacherForced]
# A row's prompt and answer; and logits (T, vocabulary) by them.
_Key = tuple[tuple[int, ...], tuple[int, ...]]
BaseLogits = dict[_Key, Tensor]


@dataclass(frozen=True)
class Rates:
    """Peak step sizes of Adam; a rate of 0 keeps the directions as they are."""

    coeffs: float
    directions: float


@dataclass
class Pass:
    """Forward and backward passes of `model` under the edit of some factors.

    `checkpointing` keeps only each layer's input for the backward pass and computes the layer again there. Rows `share` the
    beginning of their prompts if they may (`may_share`); that needs a cache, which checkpointing excludes.
    """

    model: Any
    layers: nn.ModuleList
    hooks: EditHooks
    device: torch.device
    batches: Batches
    checkpointing: bool = True
    share: bool = False
    check: Callable[[], None] = lambda: None
    base_logits: BaseLogits = field(default_factory=dict)  # of the rows given to `keep_base_logits`
    # Fed so far: forward counts once, backward twice. A checkpointed layer's second forward isn't counted. Nor is
    # `keep_base_logits`, which every process does once.
    tokens: int = 0

    def __post_init__(self) -> None:
        self.share = self.share and not self.checkpointing

    def keep_base_logits(self, rows: Sequence[TeacherForced], most_bytes: int = BASE_LOGITS_BYTES) -> None:
        """Keep the unedited model's logits of `rows` in main memory, as many as `most_bytes` hold.

        They are the same in every step, so without them each step would compute its rows' anew.
        """
        new = [row for row in rows if _key(row) not in self.base_logits]
        new.sort(key=lambda row: len(row.prompt) + len(row.answer))
        left = most_bytes - sum(logits.nbytes for logits in self.base_logits.values())

        def work(part: Sequence[TeacherForced]) -> Sequence[None]:
            nonlocal left
            self.check()
            for row, logits in zip(part, self.base_of(part) if left > 0 else [], strict=False):
                left -= logits.nbytes
                if left < 0:
                    break
                self.base_logits[_key(row)] = logits.to("cpu", copy=True)
            return [None] * len(part)

        self.hooks.suspend()
        self.batches.run(new, work)

    def loss(self, factors: dict[str, Factors], rows: Rows) -> Loss:
        """The loss of `rows` without gradients."""
        with torch.no_grad():
            parts = self._run(factors, rows, lambda items, base: _numbers(self._losses(items, base)))
        return _mean(rows, parts)

    def probe(self, prompt: Sequence[int], factors: dict[str, Factors]) -> None:
        """A small forward and backward pass; RuntimeError or NotImplementedError if a layer has no backward pass.

        A quantized kernel may return outputs that no gradient goes through, which the residual stream beside it would hide. So
        one module of each quantized kind is asked for the gradient of its own input.
        """
        row = TeacherForced(prompt[:4], prompt[:2])
        with _inputs_of(module for module in self.layers.modules() if storage_of(module) or opaque(module)) as calls:
            self.gradients(factors, Rows([row], [row]), 1.0)
        self.hooks.suspend()  # an edit beside the module passes gradients on
        for module, given, options in calls:
            places = [index for index, value in enumerate(given) if torch.is_tensor(value) and value.is_floating_point()]
            if not places:
                continue
            place = places[0]
            asked = given[place].detach().requires_grad_()
            output = module(*given[:place], asked, *given[place + 1 :], **options)
            output = output[0] if isinstance(output, tuple) else output
            (gradient,) = torch.autograd.grad(output.float().sum(), [asked], allow_unused=True)
            if gradient is None or not gradient.any():
                raise RuntimeError(f"{type(module).__name__} passes no gradient on")

    def gradients(self, factors: dict[str, Factors], rows: Rows, beta: float) -> tuple[Loss, dict[str, list[Tensor | None]]]:
        """The loss of `rows`, and the gradients of its total in every tensor of `factors`."""
        leaves = [tensor for each in factors.values() for tensor in each.tensors()]
        totals: list[Tensor | None] = [None] * len(leaves)

        def work(items: Sequence[_Item], base: dict[int, Tensor]) -> list[tuple[float, float, float]]:
            losses = self._losses(items, base)
            weighted = [
                target / len(rows.harmful) if harmful else beta * (first + along) / len(rows.harmless)
                for (harmful, _), (target, first, along) in zip(items, losses, strict=True)
            ]
            found = torch.autograd.grad(torch.stack(weighted).sum(), leaves, allow_unused=True)
            for index, gradient in enumerate(found):  # only now, so that a batch that ran out of memory isn't counted twice
                if gradient is not None:
                    before = totals[index]
                    totals[index] = gradient if before is None else before + gradient
            self.tokens += 2 * self._fed(row for _, row in items)
            return _numbers(losses)

        with self._checkpointed():
            loss = _mean(rows, self._run(factors, rows, work))
        of_leaves = iter(totals)
        return loss, {name: [next(of_leaves) for _ in each.tensors()] for name, each in factors.items()}

    def _run(
        self,
        factors: dict[str, Factors],
        rows: Rows,
        work: Callable[[Sequence[_Item], dict[int, Tensor]], Sequence[tuple[float, float, float]]],
    ) -> list[tuple[bool, tuple[float, float, float]]]:
        """`work` on all rows, a batch of similar lengths at a time, with the unedited model's logits of its harmless rows."""
        items: list[_Item] = [(True, row) for row in rows.harmful] + [(False, row) for row in rows.harmless]
        items.sort(key=_length)

        def batch(part: Sequence[_Item]) -> Sequence[tuple[float, float, float]]:
            harmless = [index for index, (harmful, _) in enumerate(part) if not harmful]
            known = self.base_logits
            base = {index: known[key] for index in harmless if (key := _key(part[index][1])) in known}
            if new := [index for index in harmless if index not in base]:
                self.hooks.suspend()
                asked = [part[index][1] for index in new]
                self.tokens += self._fed(asked)
                base |= zip(new, self.base_of(asked), strict=True)
            # Written anew for each batch, since a backward pass frees the graph of the casts to the model's dtype.
            self.hooks.apply({name: (object(), partial(_same, each)) for name, each in factors.items()})
            self.tokens += self._fed(row for _, row in part)
            self.check()
            return work(part, base)

        try:
            found = self.batches.run(items, batch)
        finally:
            self.hooks.clear()
        return [(harmful, losses) for (harmful, _), losses in zip(items, found, strict=True)]

    @torch.no_grad()
    def base_of(self, rows: Sequence[TeacherForced]) -> list[Tensor]:
        """The model's logits of each row's answer, without an edit."""
        return answer_logits(self.model, rows, self.device, share=self.share)

    def _fed(self, rows: Iterable[TeacherForced]) -> int:
        return fed_tokens(list(rows), share=self.share)

    def _losses(self, items: Sequence[_Item], base: dict[int, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(target, first, along) of each row under the edit; those that a row doesn't have are 0."""
        logits = answer_logits(self.model, [row for _, row in items], self.device, share=self.share)
        zero = logits[0].new_zeros((), dtype=torch.float32)
        return [
            (target_loss(own, row), zero, zero) if harmful else (zero, *kl_losses(base[index].to(own.device), own))
            for index, ((harmful, row), own) in enumerate(zip(items, logits, strict=True))
        ]

    @contextlib.contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """While active, the layers keep only their inputs for the backward pass."""
        if not self.checkpointing:
            yield
            return
        own_forwards = [layer.__dict__.get("forward") for layer in self.layers]
        try:
            for layer in self.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
            yield
        finally:
            for layer, forward in zip(self.layers, own_forwards, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward


@dataclass
class Descent:
    """Adam on θ; `steps` were taken. A step's batch depends only on the seed and the step's number."""

    parameters: Parameters
    passes: Pass
    rows: Rows
    rates: Rates
    batch: int
    seed: int
    steps: int = 0
    _adam: torch.optim.Adam = field(init=False)

    def __post_init__(self) -> None:
        groups = [{"params": [self.parameters.coeffs]}, {"params": [self.parameters.directions]}]
        self._adam = torch.optim.Adam(groups, lr=0.0)

    def step(self, beta: float, rate: float) -> Loss:
        """One step on the next batch at `rate` times the peak rates; returns the batch's loss before it."""
        factors = self.parameters.factors()
        loss, gradients = self.passes.gradients(factors, self._next_batch(), beta)
        self.parameters.pull_back(gradients)
        for group, peak in zip(self._adam.param_groups, (self.rates.coeffs, self.rates.directions), strict=True):
            group["lr"] = peak * rate
        self._adam.step()
        self.parameters.normalize()
        self.steps += 1
        return loss

    def state(self) -> dict[str, Tensor]:
        """θ, the number of steps, and Adam's moments, for `load_state`."""
        state = {"coeffs": self.parameters.coeffs, "directions": self.parameters.directions, "steps": torch.tensor(self.steps)}
        return {name: value.detach().clone().contiguous() for name, value in state.items()} | self.moments()

    def moments(self) -> dict[str, Tensor]:
        """Adam's moments of the gradient and how many steps they are from, for `load_moments`."""
        return {
            f"adam.{index}.{name}": value.detach().clone().contiguous()
            for index, moments in self._adam.state_dict()["state"].items()
            for name, value in moments.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue exactly where `state` was taken."""
        with torch.no_grad():
            self.parameters.coeffs.copy_(state["coeffs"])
            self.parameters.directions.copy_(state["directions"])
        self.steps = int(state["steps"])
        self.load_moments(state)

    def load_moments(self, state: Mapping[str, Tensor]) -> None:
        """Take over the moments in `state`, and nothing else of it; without any, Adam begins anew."""
        moments: dict[int, dict[str, Tensor]] = {0: {}, 1: {}}
        for name, value in state.items():
            if name.startswith("adam."):
                _, index, moment = name.split(".")
                moments[int(index)][moment] = value.clone()
        self._adam.load_state_dict({"state": moments, "param_groups": self._adam.state_dict()["param_groups"]})

    def _next_batch(self) -> Rows:
        return Rows(
            _drawn(self.rows.harmful, self.batch, self.seed, self.steps),
            _drawn(self.rows.harmless, self.batch, self.seed + 1, self.steps),
        )


@contextlib.contextmanager
def _inputs_of(modules: Iterable[nn.Module]) -> Iterator[Collection[_Call]]:
    """While active, the first call of a module of each type is kept: most experts of a mixture are never called."""
    calls: dict[type, _Call] = {}

    def keep(module: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        calls.setdefault(type(module), (module, given, options))

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield calls.values()
    finally:
        for handle in handles:
            handle.remove()


def _drawn(rows: Sequence[TeacherForced], count: int, seed: int, step: int) -> list[TeacherForced]:
    """The rows of a step: all rows in a random order, then all in another order, and so on, `count` at a time."""
    chosen: list[TeacherForced] = []
    count = min(count, len(rows))
    position = step * count
    while len(chosen) < count:
        round_number, index = divmod(position, len(rows))
        generator = torch.Generator().manual_seed((seed * 100_003 + round_number) % 2**63)
        order = torch.randperm(len(rows), generator=generator).tolist()
        chosen.append(rows[order[index]])
        position += 1
    return chosen


def _length(item: _Item) -> int:
    return len(item[1].prompt) + len(item[1].answer) - 1


def _key(row: TeacherForced) -> _Key:
    return tuple(row.prompt), tuple(row.answer)


def _same(factors: Factors) -> Factors:
    return factors


def _numbers(losses: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[float, float, float]]:
    """The losses of a batch's rows, read from the device at once."""
    values = torch.stack([value.detach() for row in losses for value in row]).tolist()
    return list(zip(values[::3], values[1::3], values[2::3], strict=True))


def _mean(rows: Rows, parts: Sequence[tuple[bool, tuple[float, float, float]]]) -> Loss:
    target = sum(losses[0] for harmful, losses in parts if harmful) / max(1, len(rows.harmful))
    first, along = (sum(losses[k] for harmful, losses in parts if not harmful) / max(1, len(rows.harmless)) for k in (1, 2))
    return Loss(target, first, along)
