"""What the checks of tests/reliability print, and what is made of it."""

from reliability.outcome import Outcome, outcomes


def test_what_is_printed_is_what_is_read() -> None:
    printed = [
        Outcome("media", 500, 0, seconds=3.5, memory=700 << 20),
        Outcome("properties of rope_3d", 10_000, 2),
        Outcome("soak", 3, 0, seconds=0.1),
    ]
    assert outcomes("something else: 3 cases\n" + "\n".join(map(str, printed)) + "\n1 failures\n") == printed
