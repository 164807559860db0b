"""Small judges that checks are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.errors import Mistake, NotRunnableHere

if TYPE_CHECKING:
    import torch


def expect(condition: Any, name: str, message: str) -> None:
    """Raise ``Mistake(name, message)`` unless the condition holds."""
    if not condition:
        raise Mistake(name, message)


def expect_all(*judgements: Callable[[], None]) -> None:
    """Call each judgement, and raise one Mistake for all that fail.

    The Mistake has the name of the first one and the messages of all.
    """
    found: list[Mistake] = []
    for judge in judgements:
        try:
            judge()
        except Mistake as mistake:
            found.append(mistake)
    if found:
        raise Mistake(found[0].name, "\n".join(mistake.message for mistake in found))


def seeded(seed: int) -> torch.Generator:
    """A new random generator, so that no check depends on earlier random draws."""
    import torch

    return torch.Generator().manual_seed(seed)


def counted(function: Callable) -> Callable:
    """The same function, which counts its calls in `.calls`.

    A check uses the count to require that a piece was called.
    """

    @functools.wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:
        counting.calls += 1
        return function(*args, **kwargs)

    counting.calls = 0
    return counting


def expect_own_work(
    answer: Callable, case: Sequence[Any], forbidden: Sequence[str], use: str
) -> None:
    """Require that answer(*case) calls none of these functions or methods of torch.

    The message of Mistake("torch-did-it") says what to use instead.
    """
    from torch.overrides import TorchFunctionMode

    called: list[str] = []

    class Names(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Names():
        answer(*case)
    for name in called:
        expect(
            name not in forbidden,
            "torch-did-it",
            f"The result is right, but torch computed it: your code calls {name}.\n"
            f"Here the point is to see what happens inside: use {use}.",
        )


def expect_triton(instead: str) -> None:
    """Require that Triton works here; NotRunnableHere where it does not.

    The test is a kernel that is known to be right. instead: a sentence that says what the learner
    can do without Triton.
    """
    import torch

    from minivllm.kernels.online_softmax import softmax

    x = torch.tensor([[1.0, 2.0, 3.0]])
    try:
        works = torch.allclose(softmax(x, block=2), torch.softmax(x, dim=1))
    except ImportError:
        raise NotRunnableHere(
            "Triton is not installed, so no kernel can run: it has wheels for Linux"
            f" only.\n{instead}"
        ) from None
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NotRunnableHere(
            f"Triton cannot run a kernel here, not even the package's own: {what}\nOn a CPU it"
            " needs TRITON_INTERPRET=1 before it is imported: restart the kernel, and run the"
            " first cell first."
        ) from None
    if not works:
        raise NotRunnableHere(
            "Triton's interpreter gives wrong numbers here, even for the package's own kernel."
        )
