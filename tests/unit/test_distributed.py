"""Errors shared by all ranks."""

from __future__ import annotations

import sys

import pytest

from mar import cli, distributed


def test_collective_errors_without_an_error_passes() -> None:
    with distributed.collective_errors():
        pass


@pytest.mark.parametrize("error", [ValueError("no such file"), OSError("no such file")])
def test_collective_errors_on_rank_0_raises_the_error_itself(error: Exception) -> None:
    with pytest.raises(type(error), match="no such file"), distributed.collective_errors():
        raise error


def test_collective_errors_on_another_rank_is_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "ERROR_GRACE_S", 0.0)

    def work() -> int:
        with distributed.collective_errors():
            raise ValueError("no such file")

    with pytest.raises(distributed.OtherRankFailed, match="rank 0 failed: no such file"):
        work()
    assert cli.report_errors(work) == 2
    assert capsys.readouterr() == ("", "")


def test_collective_errors_other_exceptions_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ZeroDivisionError), distributed.collective_errors():
        raise ZeroDivisionError
    monkeypatch.delitem(sys.modules, "mar.distributed")
    with pytest.raises(ZeroDivisionError):
        cli.report_errors(lambda: 1 // 0)
