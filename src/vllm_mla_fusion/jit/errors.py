# SPDX-License-Identifier: Apache-2.0
"""The one exception of the build path."""


class BuildError(RuntimeError):
    """The kernel cannot be built or loaded.

    The message says what went wrong, with the compiler's own output if there is any, and what to do.

    Args:
        problem: What went wrong.
        remedy: What the user can do about it.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}\nWhat to do: {remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy
