"""The report of ``python -m star_kernels``."""

import pytest

from star_kernels.__main__ import main, report


def test_the_report_names_versions_libraries_and_backends() -> None:
    lines = dict(report())
    assert lines["torch"]
    assert lines["CPU library"].startswith(("yes, using ", "no: "))
    assert lines["CUDA library"].startswith(("yes, for sm_", "no: "))
    assert lines["attention, cpu, float32"] == "vendor"
    assert lines["policy loss, cpu, bfloat16"] in ("native", "naive")


def test_unknown_arguments_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nonsense"])
    assert "unrecognized arguments: nonsense" in capsys.readouterr().err
