"""`--push`: what is checked before a run, what goes to the Hub and what doesn't, and that the token shows nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import AbliterateError, InputError
from abliterate.export import push
from abliterate.export.folder import LOCK, MARKER
from abliterate.files import digest_of
from abliterate.model import hub as hub_module
from abliterate.model.hub import check_push
from abliterate.pipeline import export as pipeline_export
from abliterate.pipeline import export_trial as pipeline_export_trial
from abliterate.pipeline import run as pipeline_run
from abliterate.pipeline import workbench
from abliterate.settings.schema import ExportSettings, Settings
from support.cli import Invoke, assert_sentence, forbidden
from support.runs import Recorder, copy_run, other_trial, quick_settings, run_in, with_kind

TOKEN = "hf_notThisOne0123456789"
Finished = tuple[Path, dict[str, Any], Settings]


class FakeApi:
    """Stands for the Hub's client."""

    calls: list[tuple[str, dict[str, Any]]]
    error: Exception | None = None

    def __init__(self, **options: Any) -> None:
        assert options == {}, "the token is the library's affair"

    def create_repo(self, repo: str, **options: Any) -> str:
        self.calls.append(("create_repo", {"repo": repo, **options}))
        return f"https://huggingface.co/{repo}"

    def list_repo_files(self, repo: str) -> list[str]:
        earlier = ["model-00001-of-00002.safetensors", "config.json", "adapter_config.json"]
        return [*earlier, "model-Q8_0.gguf", "README.md", "mlx/model.safetensors"]

    def upload_folder(self, **options: Any) -> None:
        if self.error:
            raise self.error
        names = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        self.calls.append(("upload_folder", {**options, "names": names}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    """A Hub that takes everything, and a token."""
    FakeApi.calls, FakeApi.error = [], None
    monkeypatch.setattr(push, "HfApi", FakeApi)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return FakeApi


def pushed(settings: Settings, **over: Any) -> Settings:
    return with_kind(settings, "merged", push="me/model", **over)


def no_token_in(*folders: Path) -> bool:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    return not [path for path in files if TOKEN.encode() in path.read_bytes()]


@pytest.mark.usefixtures("lean")
def test_a_run_pushes_its_export(
    finished: Finished, tmp_path: Path, hub: type[FakeApi], capfd: pytest.CaptureFixture[str]
) -> None:
    path, first, settings = finished
    run = copy_run(path, tmp_path / "run")
    result, recorder = run_in(run, pushed(settings), resume=True)
    assert result["export"]["pushed"] == "https://huggingface.co/me/model"
    written = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert written.pop("sha256") == digest_of(result)
    assert written == json.loads(json.dumps(result))
    assert json.loads((run / "model" / MARKER).read_text(encoding="utf-8"))["export"] == result["export"]
    assert "huggingface.co/me/model" in (run / "report.html").read_text(encoding="utf-8")
    (create, created), (upload, uploaded) = hub.calls
    assert (create, created) == ("create_repo", {"repo": "me/model", "private": True, "exist_ok": True})
    assert (upload, uploaded["repo_id"], uploaded["folder_path"]) == ("upload_folder", "me/model", run / "model")
    assert {"model.safetensors", "config.json", "README.md", MARKER} <= set(uploaded["names"])
    assert uploaded["ignore_patterns"] == [LOCK]
    assert uploaded["delete_patterns"] == ["model-00001-of-00002.safetensors", "config.json", "adapter_config.json"]
    assert recorder.stages[-1] == "push"
    assert no_token_in(run)
    assert TOKEN not in "".join(capfd.readouterr())


def test_nothing_is_pushed_unasked(finished: Finished, tmp_path: Path, hub: type[FakeApi]) -> None:
    path, first, settings = finished
    result = pipeline_export_trial.export_trial(settings, Recorder(), RunDirectory(path), first["selected"], tmp_path / "out")
    assert (hub.calls, result.export.pushed) == ([], None)


def test_a_later_export_is_pushed(finished: Finished, tmp_path: Path, hub: type[FakeApi]) -> None:
    path, first, settings = finished
    public = pushed(settings, push_private=False)
    result = pipeline_export_trial.export_trial(public, Recorder(), RunDirectory(path), other_trial(first), tmp_path / "out")
    assert result.export.pushed == "https://huggingface.co/me/model"
    assert json.loads((tmp_path / "out" / MARKER).read_text(encoding="utf-8"))["export"]["pushed"] is not None
    assert hub.calls[0][1]["private"] is False


def test_what_failed_its_verification_is_not_pushed(
    finished: Finished, tmp_path: Path, hub: type[FakeApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, first, settings = finished
    real = pipeline_export_trial.write

    def write(context: Any, job: Any, *rest: Any) -> Any:
        next(iter(job.factors.values())).b.mul_(2)
        return real(context, job, *rest)

    monkeypatch.setattr(pipeline_export_trial, "write", write)
    with pytest.raises(AbliterateError, match="not pushed to me/model"):
        pipeline_export_trial.export_trial(
            pushed(settings), Recorder(), RunDirectory(path), other_trial(first), tmp_path / "out"
        )
    assert hub.calls == []


class ConnectError(Exception):
    """As an HTTP library raises them: of no kind that we could name."""


ERRORS = [
    OSError(f"403 Forbidden for a token like {TOKEN}"),
    ConnectError("no route to host"),
    LocalTokenNotFoundError("no token"),
    RuntimeError("the uploader gave up\nfor reasons of its own"),
    ValueError("Invalid metadata in README.md"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_failed_upload_is_one_sentence(error: Exception, finished: Finished, tmp_path: Path, hub: type[FakeApi]) -> None:
    folder = copy_run(finished[0] / "model", tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.error = error
    with pytest.raises(AbliterateError, match="could not be pushed to me/model") as caught:
        push.push(folder, pushed(finished[2]).export)
    message = str(caught.value)
    assert f"hf upload me/model {folder}" in message
    assert TOKEN not in message
    assert "\n" not in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.usefixtures("lean")
def test_a_failed_upload_keeps_everything(finished: Finished, tmp_path: Path, hub: type[FakeApi]) -> None:
    """Of a run, which ends with the upload's sentence."""
    path, first, settings = finished
    run = copy_run(path, tmp_path / "run")
    hub.error = ERRORS[0]
    with pytest.raises(AbliterateError, match="could not be pushed to me/model") as caught:
        run_in(run, pushed(settings), resume=True)
    message = str(caught.value)
    assert f"hf upload me/model {run / 'model'}" in message
    assert TOKEN not in message
    kept = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert (kept["export"]["verified"], kept["export"]["pushed"]) == (True, None)
    assert (run / "model" / "model.safetensors").is_file()
    assert (run / "report.html").is_file()


@pytest.mark.parametrize("repo", ["model", "a/b/c", "me/mo del", "me/", "https://x/y"])
def test_names_that_are_no_repository(repo: str, hub: type[FakeApi]) -> None:
    with pytest.raises(InputError, match="owner/name"):
        check_push(ExportSettings(push=repo))


def test_without_a_token_nothing_begins(
    finished: Finished, tmp_path: Path, hub: type[FakeApi], monkeypatch: pytest.MonkeyPatch, prompt_files: dict[str, str]
) -> None:
    path, first, settings = finished
    monkeypatch.setattr(hub_module, "get_token", lambda: None)
    monkeypatch.setattr(workbench, "open_workbench", forbidden)
    monkeypatch.setattr(pipeline_export, "finished_folder", forbidden)
    quick = quick_settings(prompt_files, tmp_path / "cache", export={"push": "me/model"})
    with pytest.raises(InputError, match="hf auth login, or set HF_TOKEN"):
        pipeline_run.run(quick, Recorder(), RunDirectory(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="hf auth login, or set HF_TOKEN"):
        pipeline_export_trial.export_trial(
            pushed(settings), Recorder(), RunDirectory(path), first["selected"], tmp_path / "out"
        )


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run", "demo", "--push", "me/model", "--export", "none"], "nothing to push to me/model"),
        (["run", "demo", "--push", "model"], "owner/name"),
    ],
)
def test_bad_usage_is_one_sentence(
    invoke: Invoke,
    hub: type[FakeApi],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    part: str,
) -> None:
    monkeypatch.setattr(workbench, "open_workbench", forbidden)
    assert_sentence(invoke(*arguments), 2, part)
    assert not list(tmp_path.glob("runs/*"))


def test_the_command_pushes_and_only_where_it_says(
    invoke: Invoke,
    finished: Finished,
    tmp_path: Path,
    hub: type[FakeApi],
) -> None:
    path, first, settings = finished
    run = copy_run(path, tmp_path / "run")
    stored = (run / "settings.toml").read_text(encoding="utf-8")
    (run / "settings.toml").write_text(stored.replace('push = ""', 'push = "me/first"'), encoding="utf-8")
    number = str(other_trial(first))
    assert invoke("export", run, "--trial", number, "-o", tmp_path / "quiet").code == 0
    assert hub.calls == []  # the repository of the run's own choice is no place for another trial
    outcome = invoke("export", run, "--trial", number, "-o", tmp_path / "loud", "--push", "me/second")
    assert outcome.code == 0, outcome
    assert [call["repo"] for name, call in hub.calls if name == "create_repo"] == ["me/second"]
    assert "https://huggingface.co/me/second" in outcome.out
    assert TOKEN not in outcome.out + outcome.err
    assert no_token_in(run, tmp_path / "loud")
    hub.error = OSError("502 Bad Gateway")
    assert_sentence(
        invoke("export", run, "--trial", number, "-o", tmp_path / "loud", "--push", "me/second"), 1, "hf upload me/second"
    )
