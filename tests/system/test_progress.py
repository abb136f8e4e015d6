"""Progress of long jobs and time spans as text."""

import pytest

from fastiat.system.progress import duration

HOUR, DAY = 3600, 24 * 3600


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (HOUR - 1, "59:59"),
        (23 * HOUR + 59 * 60, "23:59:00"),
        (DAY, "1 day 0 h"),
        (DAY + 1.5 * HOUR + 1, "1 day 2 h"),
        (2 * DAY - 1, "2 days 0 h"),
        (12 * DAY + 3 * HOUR, "12 days 3 h"),
        (30 * DAY, "30 days 0 h"),
    ],
)
def test_a_time_span_is_in_days_from_a_day_on(seconds, text):
    assert duration(seconds) == text
