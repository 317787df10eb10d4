"""The random numbers of every kernel: their definition against the published vectors."""

from __future__ import annotations

from sslkernels.philox import philox


def test_philox_known_answers():
    """The vectors of the Random123 distribution for Philox4x32-10."""
    answers = {
        (0, 0, 0, 0, 0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (*[0xFFFFFFFF] * 6,): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0): (
            0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
        ),
    }  # fmt: skip
    for (*counter, k0, k1), words in answers.items():
        assert tuple(map(int, philox(counter, (k0, k1)))) == words
