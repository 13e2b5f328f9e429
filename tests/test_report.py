"""The report of ``python -m star_kernels``."""

from star_kernels.__main__ import report


def test_the_report_names_versions_libraries_and_backends() -> None:
    lines = dict(report())
    assert lines["torch"]
    assert lines["CPU library"].startswith(("yes, using ", "no: "))
    assert lines["CUDA library"].startswith(("yes, for sm_", "no: "))
    assert lines["attention, cpu, float32"] == "vendor"
    assert lines["policy loss, cpu, bfloat16"] in ("native", "naive")
