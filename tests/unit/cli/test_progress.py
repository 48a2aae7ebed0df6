import pytest

from pals.cli.progress import LINE_EVERY_S, Lines


def test_lines_tell_the_start_the_rate_the_time_left_and_the_end(
    capsys: pytest.CaptureFixture[str],
):
    now = [0.0]
    lines = Lines("org/tiny", clock=lambda: now[0])
    lines(0, 40_000_000)
    lines(10_000_000, 40_000_000)  # too soon for another line
    now[0] = LINE_EVERY_S
    lines(20_000_000, 40_000_000)
    now[0] = 2 * LINE_EVERY_S
    lines(40_000_000, 40_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "org/tiny: 40.0 MB to download",
        "org/tiny: 20.0 MB of 40.0 MB, 2.0 MB/s, 10 s left",
        "org/tiny: 40.0 MB of 40.0 MB, 2.0 MB/s",
    ]
