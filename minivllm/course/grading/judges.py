"""Small judges that checks are made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import difference, show
from minivllm.course.grading.errors import CheckError, Mistake, NotRunnableHere

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


def expect_refusal(
    call: Callable[[], Any], case: str, error: type[Exception] = ValueError, name: str = ""
) -> None:
    """Require that call() raises this error; a stub's exception and a CheckError are passed on.

    case: the arguments, in words ("7 heads on 2 ranks"). The Mistake is called name, else
    "not-refused" where nothing was raised and "wrong-error" where something else was.
    """
    wanted = error.__name__
    try:
        result = call()
    except (CheckError, NotImplementedError):
        raise
    except Exception as raised:
        if isinstance(raised, error):
            return
        raise Mistake(
            name or "wrong-error",
            f"With {case} your code raised {type(raised).__name__}: {raised}\nA {wanted} is asked"
            " for, raised on purpose and before anything else happens, with a text that says what"
            " does not fit.",
        ) from raised
    raise Mistake(
        name or "not-refused",
        f"With {case} your code gave {show(result)}.\nIt must raise a {wanted}: a wrong result"
        " that nobody notices is worse than an error.",
    )


def expect_unchanged(now: Any, before: Any, what: str) -> None:
    """Require that the value equals the copy that was made of it before the call.

    what: the argument, as the learner knows it ("prompt_token_ids").
    """
    if found := difference(now, before, 0.0, 0.0):
        raise Mistake(
            "changed-input",
            f"Your code changed {what}, which belongs to its caller: {found[1]}.\nWork on a copy,"
            " or on a new object.",
        )


@dataclass(frozen=True)
class Prediction:
    """A number that a learner predicts.

    name: of the variable. right: the true value, in unit. near: the share of it by which a
    prediction may miss; 0 for counts. usual: mistake's name -> (the number that it leads to, what
    is wrong with it). advice: for all other numbers.
    """

    name: str
    right: float
    unit: str = ""
    near: float = 0.0
    usual: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    advice: str = "Take a smaller case that you can count on paper."

    def judge(self, said: Any) -> None:
        """Raise Mistake where the number is wrong. The message does not tell the right one."""
        number = isinstance(said, int | float) and not isinstance(said, bool)
        if not number or math.isnan(said):
            raise Mistake("wrong-type", f"{self.name} should be one number.\nIt is {said!r}.")
        # The value alone, whatever a class of its own calls equal.
        said = int.__int__(said) if isinstance(said, int) else float.__float__(said)
        if _near(said, self.right, self.near):
            return
        unit = self.unit and f" {self.unit}"
        seen = f"{self.name}: {said:,.6g}{unit} is too {'small' if said < self.right else 'large'}."
        for name, (wrong, why) in self.usual.items():
            if _near(said, wrong, self.near):
                raise Mistake(name, f"{seen}\n{why}")
        raise Mistake(f"wrong-{self.name.replace('_', '-')}", f"{seen}\n{self.advice}")


def _near(said: float, right: float, share: float) -> bool:
    return said == right or abs(said - right) <= share * abs(right)


def expect_predictions(*said: tuple[Prediction, Any]) -> None:
    """Judge several predictions, and raise one Mistake for all that are wrong."""
    expect_all(*(partial(prediction.judge, value) for prediction, value in said))


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


#: Other names of the operation that `softmax` is.
SOFTMAX = ("softmax", "softmin", "log_softmax", "logsumexp", "logcumsumexp", "logaddexp")
#: Other names of attention.
ATTENTION = ("scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention")


def expect_own_work(
    answer: Callable, case: Sequence[Any], forbidden: Sequence[str], use: str
) -> None:
    """Require that answer(*case) computes by itself what these operations of torch compute.

    forbidden: names without spelling: "softmax" stands for `torch.special.softmax`, `aten._softmax`
    and `Tensor.softmax_`, too. The message of Mistake("torch-did-it") says what to use instead. A
    tensor that leaves torch for NumPy or Python numbers is Mistake("left-torch").
    """
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    called: list[str] = []

    class Names(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Names(), Operations():
        answer(*case)
    plain = [name.strip("_") for name in called]
    for name in plain:
        expect(
            name not in forbidden and name.removesuffix("_backward") not in forbidden,
            "torch-did-it",
            f"The result is right, but torch computed it: your code calls {name}.\n"
            f"Here the point is to see what happens inside: use {use}.",
        )
        expect(
            name not in ("numpy", "tolist", "array"),
            "left-torch",
            f"The result is right, but your code leaves torch with `{name}` to compute it.\n"
            f"Compute with tensors: use {use}.",
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
