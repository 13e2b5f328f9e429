"""tools.run_workflows runs the steps of each job and says which do not run here; tools.check_wheel inspects a wheel."""

from __future__ import annotations

import platform
import subprocess
import zipfile
from pathlib import Path

import pytest

from tools import check_wheel, run_workflows

WORKFLOW = """
jobs:
  build:
    env: {GREETING: hello}
    strategy:
      matrix:
        include: [{arch: x86_64}, {arch: aarch64}]
    steps:
      - uses: actions/checkout@0
      - run: test "$GREETING" = hello && test -z "${STAR_KERNELS_LIB:-}" && echo ${{ matrix.arch }} > made
      - run: |
          false | true
          test -e tracked && test -e made
      - uses: actions/upload-artifact@0
  broken:
    steps:
      - run: |
          false
          true
      - run: touch "$MARK"
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit; the workflow above takes the place of the project's."""
    (tmp_path / "tracked").touch()
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows" / "a.yml").write_text(WORKFLOW)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "tracked"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setenv("STAR_KERNELS_LIB", "elsewhere")
    return tmp_path


def test_every_step_of_the_workflows_runs_here_or_has_a_reason() -> None:
    found = run_workflows.jobs()
    assert {job.name.split("/")[0] for job in found} == {"ci", "docs", "wheels"}
    for job in found:
        assert job.steps
        assert all(step.command or step.reason for step in job.steps), job.name


def test_steps_run_in_a_clone_until_one_fails(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = {job.name: job for job in run_workflows.jobs(repository / "workflows")}
    assert set(jobs) == {"a/build/x86_64", "a/build/aarch64", "a/broken"}
    here = run_workflows.MACHINES.get(platform.machine())
    for arch in ("x86_64", "aarch64"):
        assert bool(jobs[f"a/build/{arch}"].reason) == (arch != here)
    assert run_workflows.run(jobs["a/build/x86_64"], [], repository)
    assert "skipped: actions/upload-artifact@0 (uploads to GitHub)" in capfd.readouterr().out
    monkeypatch.setenv("MARK", str(repository / "mark"))
    assert not run_workflows.run(jobs["a/broken"], [], repository)
    assert not (repository / "mark").exists()
    assert run_workflows.run(jobs["a/broken"], ["false"], repository)
    assert (repository / "mark").exists()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("uses: someone/something@0", "someone/something is not in tools/run_workflows.py"),
        ("run: echo ${{ github.ref }}", "an expression that only GitHub can evaluate"),
    ],
)
def test_a_step_that_cannot_be_understood_is_an_error(step: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(f"jobs:\n  one:\n    steps:\n      - {step}\n")
    with pytest.raises(ValueError, match=message):
        run_workflows.jobs(tmp_path)


def test_jobs_that_do_not_exist_or_run_elsewhere_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name, message in (("docs/none", "no job 'docs/none'; jobs: ci/test"), ("docs/publish", "no step that runs")):
        with pytest.raises(SystemExit):
            run_workflows.main([name])
        assert message in capsys.readouterr().err


def wheel(folder: Path, metadata: str, *more: str, tag: str = "linux_x86_64", machine: int = 62) -> Path:
    path = folder / f"a-1-py3-none-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*check_wheel.FILES, "a.dist-info/licenses/LICENSE", *more):
            library = b"\x7fELF" + bytes(14) + machine.to_bytes(2, "little")
            archive.writestr(name, library if name.endswith(".so") else "")
        archive.writestr("a.dist-info/METADATA", metadata)
        archive.writestr("a.dist-info/entry_points.txt", "star-train = a\nstar-train-small = b")
    return path


def test_a_wheel_with_other_files_or_without_its_licence_is_reported(tmp_path: Path) -> None:
    good = "License-Expression: Apache-2.0\nDescription-Content-Type: text/markdown\nRequires-Dist: torch>=2.11\n\n"
    assert check_wheel.problems(wheel(tmp_path, good)) == []
    assert check_wheel.problems(wheel(tmp_path, good, "tests/a.py")) == ["tests is in the wheel"]
    assert check_wheel.problems(wheel(tmp_path, good.replace("torch", "numpy"))) == [
        "torch is not among the requirements ['numpy>=2.11']"
    ]
    assert check_wheel.problems(wheel(tmp_path, good.replace("Apache-2.0", "MIT"))) == [
        "the licence is 'MIT', not 'Apache-2.0'"
    ]


def test_libraries_are_for_the_processor_of_the_tag(tmp_path: Path) -> None:
    good = "License-Expression: Apache-2.0\nDescription-Content-Type: text/markdown\nRequires-Dist: torch>=2.11\n\n"
    cross = wheel(tmp_path, good, tag="manylinux_2_28_aarch64", machine=183)
    assert check_wheel.processor(cross) == "aarch64"
    assert check_wheel.problems(cross) == []
    assert check_wheel.problems(wheel(tmp_path, good, tag="linux_aarch64")) == [
        "star_kernels/lib/libstar_kernels_cpu.so is for x86_64, the tag for aarch64"
    ]
    with pytest.raises(
        ValueError, match=r"the tag of a-1-py3-none-any\.whl must end with one of the processors x86_64"
    ):
        check_wheel.problems(wheel(tmp_path, good, tag="any"))


def test_the_first_use_is_that_of_the_quickstart() -> None:
    program = check_wheel.first_use()
    assert "weighted_policy_loss(" in program
    assert "diffusers" not in program
    compile(program, "first use", "exec")
