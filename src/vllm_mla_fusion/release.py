# SPDX-License-Identifier: Apache-2.0
"""The numbers of a version."""


def release(version: str) -> tuple[int, ...]:
    """(2, 11, 0) of "2.11.0a0+git", (2, 12, 0) of "2.12.0rc1": up to three numbers, without what follows them."""
    numbers = []
    for part in version.split("+")[0].split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        numbers.append(int(digits or 0))
    return tuple(numbers)
