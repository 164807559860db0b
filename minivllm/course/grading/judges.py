"""Small judges that checks are made of."""

from __future__ import annotations

import functools
import math
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import difference, shares_memory, show
from minivllm.course.grading.copies import copied
from minivllm.course.grading.errors import CheckError, Mistake, NotRunnableHere

if TYPE_CHECKING:
    import torch

    from minivllm.course.grading.exercise import Exercise


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


def expect_nothing_kept(
    answer: Callable,
    pairs: Iterable[tuple[tuple, tuple]],
    right: Callable,
    what: str,
    **tolerances: float,
) -> None:
    """Require that a call depends on nothing but its arguments, and leaves old results alone.

    pairs: (arguments, arguments of the same kinds and shapes). The second call gets the very
    tensors, lists and dicts of the first one, filled anew. what: what has changed in between, in
    words. tolerances: rtol and atol of `difference`.
    """
    for first, second in pairs:
        expected = right(*copied(second))
        args = copied(first)
        before = answer(*args)
        kept = None if shares_memory(before, args) else copied(before)
        args = tuple(_refilled(old, new) for old, new in zip(args, second, strict=True))
        after = answer(*args)
        if found := difference(after, expected, **tolerances):
            raise Mistake(
                "keeps-state",
                f"The first call is right. Then {what}, in the same objects, and the second result"
                " is wrong: your code keeps something between calls.\nLook for a cache, a default"
                " argument that is changed, or a variable outside of the function. Compute"
                f" everything anew from the arguments. {found[1]}.",
            )
        if kept is not None and difference(before, kept, 0.0, 0.0):
            raise Mistake(
                "result-reused",
                "Your function returns the same tensor or list at each call, and overwrites it. Its"
                " caller may still use the result of the call before.\nMake a new one in each"
                " call.",
            )


def expect_new_result(answer: Callable, case: tuple) -> None:
    """Require that two calls with equal arguments return two lists."""
    first, second = (answer(*copied(case)) for _ in range(2))
    expect(
        first is not second,
        "result-reused",
        "Your function returns one and the same list in two calls. Each belongs to its caller, who"
        " may change it.\nMake a new one in each call.",
    )


def one_by_one(first: tuple, second: tuple) -> Iterator[tuple[tuple, tuple]]:
    """Pairs for `expect_nothing_kept`: all arguments change, and then each one alone.

    They find an answer that remembers its results by some of its arguments only. The arguments must
    fit each other in every mixture.
    """
    yield first, second
    for i, value in enumerate(second):
        yield first, (*first[:i], value, *first[i + 1 :])


def _refilled(old: Any, new: Any) -> Any:
    """The object `old` with what is in `new`; `new` itself where an object cannot be refilled."""
    if hasattr(old, "copy_"):
        old.copy_(new)
    elif isinstance(old, list):
        old[:] = new
    elif isinstance(old, dict):
        old.clear()
        old.update(new)
    else:
        return new
    return old


def expect_no_growth(run: Callable[[int], Any], what: str) -> None:
    """Require that an object is no larger after 1,200 rounds of work than after 300.

    run(rounds) makes the object, does the work, and gives everything back.
    """
    few, many = footprint(run(300)), footprint(run(1200))
    expect(
        many <= few + 200,
        "grows",
        f"After 300 rounds of {what} your object holds {few:,} things, after 1,200 rounds"
        f" {many:,}.\nNothing is in use after a round, so nothing more should be kept: an engine"
        " runs for weeks. Which list or dict gets longer with each call?",
    )


def footprint(value: Any) -> int:
    """How many objects a value holds in lists, dicts, sets, deques and attributes, itself included.

    Each byte of a buffer and each letter of a text counts as one object. Classes of the answer
    count, too: what they hold is kept as long as the answer.
    """
    seen: set[int] = set()
    todo, count = [value], 0
    while todo:
        item = todo.pop()
        if id(item) in seen and not isinstance(item, int | str | None):
            continue
        seen.add(id(item))
        count += 1
        if isinstance(item, Mapping):
            todo += [part for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple | set | frozenset | deque):
            todo += item
        elif isinstance(item, bytes | bytearray | str | array):
            count += len(item)
        elif isinstance(item, int):
            count += item.bit_length() // 1024
        elif type(type(item)) is type and type(item).__module__ in ("__main__", "builtins"):
            todo += vars(item).values() if hasattr(item, "__dict__") else []
            slots = getattr(type(item), "__slots__", ())
            todo += [getattr(item, slot, None) for slot in slots]
        if item is value:
            members = vars(type(item)).values()
            todo += [each for each in members if isinstance(each, list | dict | set | deque)]
    return count


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
        # A plain number: one of a class of its own may compare as it likes.
        said = int.__add__(said, 0) if isinstance(said, int) else float.__add__(said, 0.0)
        if _near(said, self.right, self.near):
            return
        unit = self.unit and f" {self.unit}"
        seen = f"{self.name}: {said:,.6g}{unit} is too {'small' if said < self.right else 'large'}."
        # Usual numbers may lie closer together than `near`: the nearest one tells the cause.
        ordered = sorted(self.usual.items(), key=lambda item: abs(said - item[1][0]))
        for name, (wrong, why) in ordered:
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
    answer: Callable,
    case: Sequence[Any],
    forbidden: Sequence[str],
    use: str,
    scalars: int | None = None,
) -> None:
    """Require that answer(*case) computes by itself what these operations of torch compute.

    forbidden: names without spelling: "softmax" stands for `torch.special.softmax`, `aten._softmax`
    and `Tensor.softmax_`, too. The message of Mistake("torch-did-it") says what to use instead. A
    tensor that leaves torch for NumPy or Python numbers is Mistake("left-torch"), and so are more
    than `scalars` numbers that leave it one by one; None: any number may.
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
    taken = plain.count("local_scalar_dense")
    expect(
        scalars is None or taken <= scalars,
        "left-torch",
        f"The result is right, but your code takes {taken:,} numbers out of torch one by one, to"
        " compute with them (float, item, a comparison in `if`).\n"
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


def expect_inside(exercise: Exercise, written: list[tuple[str, str]]) -> None:
    """Raise a kernel's "out-of-bounds-write". written: (place, case), in words, of such writes."""
    if written:
        raise exercise.mistake("out-of-bounds-write", _touched("writes to", written))


def expect_own_reads(exercise: Exercise, read: list[tuple[str, str]]) -> None:
    """Raise a kernel's "load-without-mask". read: (place, case), in words, of such reads."""
    if read:
        raise exercise.mistake("load-without-mask", _touched("reads", read))


def _touched(does: str, noted: list[tuple[str, str]]) -> str:
    place, sizes = noted[0]
    return f"With {sizes}, your kernel {does} {place}: that is not its own."
