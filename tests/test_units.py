"""Sizes in and out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcw.errors import UsageError
from tcw.units import parse_size, show_bytes, show_count, show_seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1), ("200MB", 200_000_000), ("4GiB", 4 << 30), ("1.5 gb", 1_500_000_000), ("10k", 10_000),
        (".5M", 500_000), ("3Ki", 3072), ("7 B", 7), (" 2TB ", 2 * 10**12),
    ],
)  # fmt: skip
def test_parse(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1XB", "1 MB 2", "0", "0.1", "1e9", "nan", "inf", "1.2.3", "٣MB x"])
def test_refuse(text: str) -> None:
    with pytest.raises(UsageError, match="as a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_960, "1.0 MB"),
        (269_060_552, "269.1 MB"), (10**18, "1000.0 PB"),
    ],
)  # fmt: skip
def test_show_bytes(count: int, text: str) -> None:
    assert show_bytes(count) == text


@given(st.integers(1, 10**15))
def test_what_is_shown_can_be_read_back(count: int) -> None:
    assert abs(parse_size(show_bytes(count)) - count) <= 0.051 * 1000 ** ((len(str(count)) - 1) // 3) or count < 1000
    assert len(show_bytes(count)) <= 8


def test_counts_and_seconds() -> None:
    assert [show_count(n) for n in (61, 35_136, 134_515_008, 8_030_000_000)] == ["61", "35.1 K", "134.5 M", "8.0 B"]
    assert [show_seconds(s) for s in (0.0451, 0.99961, 8.21, 185)] == ["45 ms", "1.0 s", "8.2 s", "3 min 05 s"]
