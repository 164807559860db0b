"""Names of test cases that are the same in every process, as pytest-xdist requires."""

import re


def plain(value: object) -> str:
    """`repr`, without the address of an object."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
