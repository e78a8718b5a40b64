"""`abliterate run` on two processes that share one model is the run of one process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.settings.schema import Settings
from support import ranks
from support.forked import Lean, write_config
from support.runs import Files, quick_options


def results(path: Path) -> dict[str, Any]:
    return Result.read(RunDirectory(path)).to_record()


def plain(trial: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """A trial without its seconds and its KL, and its KL."""
    scores, values = dict(trial["scores"]), dict(trial["values"])
    kl = scores.pop("kl") | {"value": values.pop("kl")}
    return {**trial, "seconds": 0, "scores": scores, "values": values}, kl


def same_trials(mine: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for trial, expected in zip(mine, other, strict=True):
        (facts, kl), (expected_facts, expected_kl) = plain(trial), plain(expected)
        assert facts == expected_facts
        assert kl == pytest.approx(expected_kl, abs=1e-5)


@pytest.mark.slow
def test_a_run_on_two_ranks_is_the_run_of_one_process(
    prompt_files: Files, finished: tuple[Path, dict[str, Any], Settings], tmp_path: Path
) -> None:
    config = write_config(tmp_path / "quick.toml", quick_options(prompt_files, tmp_path / "cache"))
    first, second = ranks.finish(
        ranks.command(["--debug", "run", "demo", "-c", config, "-o", "run", "--json"], tmp_path, before=Lean())
    )
    assert second.out == second.err == ""
    alone, _, _ = finished
    mine, other = results(tmp_path / "run"), results(alone)
    assert (mine["front"], mine["selected"]) == (other["front"], other["selected"])
    same_trials(mine["trials"], other["trials"])
    assert mine["export"]["verified"] is True
    tensors, expected_tensors = (load_file(path / "model" / "model.safetensors") for path in (tmp_path / "run", alone))
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected_tensors[name], rtol=2**-7, atol=0)  # one rounding to bfloat16
        assert (tensor != expected_tensors[name]).float().mean() < 1e-3


class Dies:
    """In the child: rank 1 ends in its third trial, by an error or as `kill -9` ends it."""

    def __init__(self, *, killed: bool) -> None:
        self.killed = killed

    def __call__(self) -> None:
        Lean()()
        from abliterate.pipeline import stages

        evaluate = stages.evaluate

        def evaluate_or_die(bench: Any, number: int, *rest: Any) -> Any:
            if number == 2 and os.environ["RANK"] == "1":
                if self.killed:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("the cable is broken")
            return evaluate(bench, number, *rest)

        stages.evaluate = evaluate_or_die


@pytest.mark.slow
def test_a_rank_that_dies_ends_all_and_nothing_is_lost(prompt_files: Files, tmp_path: Path) -> None:
    over = {"search": {"objectives": ["refusals", "kl"]}, "export": {"kind": "none"}}
    config = write_config(tmp_path / "quick.toml", quick_options(prompt_files, tmp_path / "cache", **over))
    words = ["run", "demo", "-c", config, "-o", "run", "--json"]
    for killed in (False, True):
        first, second = ranks.command([*words, *["--resume"] * killed], tmp_path, before=Dies(killed=killed))
        assert (first.end(), second.end()) == (1, -signal.SIGKILL if killed else 1)
        assert second.err == ""
        said = " ".join(first.err.split())
        assert said.startswith("error: Another process of the run has ended (")
        assert killed or "rank 1: the cable is broken" in said
        assert "finished trials are kept in run. Continue with abliterate run --resume --out run" in said
        assert len(results(tmp_path / "run")["trials"]) == 2
    ranks.finish(ranks.command([*words, "--resume"], tmp_path, before=Lean()))
    assert [trial["number"] for trial in results(tmp_path / "run")["trials"]] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "least-squares"])
def test_refinement_on_two_ranks_is_that_of_one_process(mode: str, prompt_files: Files, tmp_path: Path) -> None:
    """Two descents: the coeffs and directions, the scores on evaluation prompts, and the points that are kept."""
    refine = {"enabled": True, "steps": 4, "betas": [1.0, 4.0], "descents": 2, "batch": 4}
    over = {"search": {"trials": 2}, "refine": refine, "edit": {"mode": mode}, "export": {"kind": "none"}}
    config = write_config(tmp_path / "quick.toml", quick_options(prompt_files, tmp_path / "cache", **over))
    words = ["--debug", "run", "demo", "-c", config, "--refine", "--json"]
    ranks.finish(ranks.command([*words, "-o", "run"], tmp_path, before=Lean()))
    ranks.finish(ranks.command([*words, "-o", "alone"], tmp_path, count=1, before=Lean()))
    mine, other = (results(tmp_path / name)["trials"] for name in ("run", "alone"))
    assert [trial["number"] for trial in mine] == [trial["number"] for trial in other] == [0, 1, 2, 3]
    for trial, expected in zip(mine[2:], other[2:], strict=True):
        assert trial["scores"]["refusals"] == expected["scores"]["refusals"]
        assert trial["scores"]["kl"] == pytest.approx(expected["scores"]["kl"], rel=1e-3, abs=1e-5)
        assert trial["params"]["coeffs"] == pytest.approx(expected["params"]["coeffs"], rel=1e-3, abs=1e-5)
        files = [load_file(tmp_path / name / "refined" / f"{trial['number']}.safetensors") for name in ("run", "alone")]
        assert files[0].keys() == files[1].keys()
        for name, v in files[0].items():
            torch.testing.assert_close(v, files[1][name], rtol=1e-3, atol=1e-4)
