"""The svd representation: ΔW as a LoRA of rank r by truncated randomized SVD, memoized.

heretic and this project's first proposal do the same; it loses 3–10 % of ‖ΔW‖ where the edit scales rows. We keep it for
comparison and for plain-LoRA exports. The memo is keyed by exact inputs, the randomness is isolated, and a failed
decomposition falls back to the slow exact one.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from abliterate.edits.base import Factors
from abliterate.errors import TrialError

# svd_lowrank needs a slightly larger rank and a few power iterations to find the leading subspace.
OVERSAMPLE, ITERATIONS = 6, 6


def truncated_svd(delta: Tensor, rank: int, seed: int) -> Factors:
    """The best (up to randomization) rank-`rank` factors of `delta` (d_out, d_in); deterministic in `seed`.

    Raises:
        TrialError: `delta` isn't finite, or no algorithm converged.
    """
    if not torch.isfinite(delta).all():
        raise TrialError("the edit of a matrix is not finite")
    rank = min(rank, *delta.shape)
    u, s, v = _decompose(delta, rank, seed)
    root = s.sqrt()
    return Factors(None, (root[:, None] * v.T).contiguous(), (u * root).contiguous())


def relative_error(delta: Tensor, factors: Factors) -> float:
    """‖ΔW − BA‖ / ‖ΔW‖; 0 for a zero ΔW."""
    norm = float(delta.norm())
    return float((delta - factors.b @ factors.a).norm()) / norm if norm > 0 else 0.0


def _decompose(delta: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    devices = [delta.device] if delta.device.type == "cuda" else []
    try:
        # svd_lowrank draws from the global generator; the fork leaves everybody else's random numbers unchanged.
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(delta, q=min(rank + OVERSAMPLE, *delta.shape), niter=ITERATIONS)
        if all(torch.isfinite(factor).all() for factor in (u, s, v)):
            return u[:, :rank], s[:rank], v[:, :rank]
    except torch.linalg.LinAlgError:
        pass
    try:
        u, s, vh = torch.linalg.svd(delta.double().cpu(), full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise TrialError(f"no singular value decomposition converged: {error}") from error
    exact = (u[:, :rank], s[:rank], vh[:rank].T)
    return tuple(factor.to(delta) for factor in exact)  # type: ignore[return-value]


class SvdMemo:
    """A bounded memo of factors that drops the least recently used and counts hits and misses. Size 0 stores nothing."""

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._entries: OrderedDict[Hashable, Factors] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Factors | None:
        """The factors stored under `key`, or None."""
        factors = self._entries.get(key)
        if factors is None:
            self.misses += 1
            return None
        self._entries.move_to_end(key)
        self.hits += 1
        return factors

    def put(self, key: Hashable, factors: Factors) -> None:
        """Store `factors`, and forget the least recently used entries beyond the bound."""
        if self._max_size <= 0:
            return
        self._entries[key] = factors
        self._entries.move_to_end(key)
        while len(self._entries) > self._max_size:
            self._entries.popitem(last=False)


def svd_key(
    module: str, mode: str, vectors: Tensor, coeffs: Sequence[float], rank: int, numbers: Sequence[tuple[str, float]] = ()
) -> tuple[Hashable, ...]:
    """The exact inputs of one decomposition; the directions (k, d_model) are identified by all their bytes.

    `numbers` are the trial's own for the mode, by name.
    """
    raw = vectors.detach().cpu().contiguous().numpy().tobytes()
    found = (module, mode, hashlib.blake2b(raw, digest_size=16).hexdigest(), *(coeff.hex() for coeff in coeffs), rank)
    return (*found, *((name, float(value).hex()) for name, value in numbers))


def seed_of(key: tuple[Hashable, ...]) -> int:
    """A seed that depends on the key alone, so that a hit and a miss give the same factors."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")
