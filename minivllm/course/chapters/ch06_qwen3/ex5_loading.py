"""06.5: a checkpoint finds its places."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations, cycle
from typing import TYPE_CHECKING

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import CheckError, Mistake
from minivllm.course.grading.judges import expect, seeded
from minivllm.course.grading.with_engine import PROMPTS

if TYPE_CHECKING:
    import torch

from minivllm.course.grading.exercise import Exercise, Known

#: Rows of each part of a fused matrix, in a small model and in the bundled one.
SMALL_FUSED = {
    "qkv_proj": {"q_proj": 6, "k_proj": 4, "v_proj": 4},
    "gate_up_proj": {"gate_proj": 5, "up_proj": 5},
}
#: Without grouped-query attention.
EQUAL_FUSED = {
    "qkv_proj": {"q_proj": 4, "k_proj": 4, "v_proj": 4},
    "gate_up_proj": {"gate_proj": 5, "up_proj": 5},
}
#: Other names, and parts that are not in alphabetical order.
OTHER_FUSED = {"in_proj": {"z_proj": 3, "x_proj": 5, "dt_proj": 1, "b_proj": 2}}
#: Each part's name ends in the name of another part; and the same in another order.
CROSS_FUSED = {
    "cross_qkv_proj": {"cross_q_proj": 3, "cross_k_proj": 2, "cross_v_proj": 1},
    **SMALL_FUSED,
}
CROSS_LAST_FUSED = dict(reversed(CROSS_FUSED.items()))
BUNDLED_FUSED = {
    "qkv_proj": {"q_proj": 256, "k_proj": 128, "v_proj": 128},
    "gate_up_proj": {"gate_proj": 768, "up_proj": 768},
}
#: What a parameter holds that nobody has filled. A model has arbitrary numbers there, and no NaN.
EMPTY = 32768.0
#: A change of a checkpoint: a tensor's name and the tensor -> what the file has instead.
_Change = Callable[[str, "torch.Tensor"], list]


@dataclass
class Files:
    """A checkpoint and the parameters that it should fill."""

    what: str
    tensors: list[tuple[str, torch.Tensor]]
    params: dict[str, torch.Tensor]
    tied: bool
    fused: dict[str, dict[str, int]]
    culprit: str = ""  # where they do not fit: what an error must name, a regular expression

    def __repr__(self) -> str:
        return self.what

    def numel(self) -> int:
        """For `diagnose`, which shows the smallest case: those that fit come first."""
        return len(self.tensors) + (1000 if self.culprit else 0)


@dataclass(frozen=True)
class _Layout:
    """What a small model is like."""

    layers: int = 1
    tied: bool = True
    bias: bool = False
    fused: str = "grouped"  # "grouped", "equal", "other", "cross", "cross last" or "nothing"
    root: str = "model.layers."  # what stands before a layer's number
    lookalike: bool = False  # whether a parameter that is not fused has a fused name in its own

    def shapes(self) -> tuple[dict[str, tuple], dict[str, tuple]]:
        """(shapes by the file's names, shapes by the parameters' names)."""
        tensors: dict[str, tuple] = {"model.embed_tokens.weight": (7, 3), "model.norm.weight": (3,)}
        if not self.tied:
            tensors["lm_head.weight"] = (7, 3)
        params = dict(tensors)
        for i in range(self.layers):
            prefix = f"{self.root}{i}."
            own = {
                f"{prefix}input_layernorm.weight": (3,),
                f"{prefix}self_attn.o_proj.weight": (3, 6),
                f"{prefix}mlp.down_proj.weight": (3, 5),
                f"{prefix}self_attn.q_norm.weight": (2,),
                f"{prefix}self_attn.k_norm.weight": (2,),
            }
            if self.lookalike:
                own[f"{prefix}self_attn.qkv_proj.norm.weight"] = (3,)
            tensors |= own
            params |= own
            for name, parts in self.parts().items():
                branch = f"{prefix}{'mlp' if name.startswith('gate') else 'self_attn'}."
                with_bias = self.bias and not name.startswith("gate")
                kinds = {"weight": (3,), "bias": ()} if with_bias else {"weight": (3,)}
                for kind, columns in kinds.items():
                    params[f"{branch}{name}.{kind}"] = (sum(parts.values()), *columns)
                    tensors |= {f"{branch}{p}.{kind}": (n, *columns) for p, n in parts.items()}
        return tensors, params

    def parts(self) -> dict[str, dict[str, int]]:
        known = {"grouped": SMALL_FUSED, "equal": EQUAL_FUSED, "other": OTHER_FUSED}
        known |= {"cross": CROSS_FUSED, "cross last": CROSS_LAST_FUSED}
        return known.get(self.fused, {})


class _Author:
    """Writes small checkpoints of random numbers."""

    def __init__(self) -> None:
        self.random = seeded(5)

    def files(
        self,
        what: str,
        layout: _Layout | None = None,
        change: _Change | None = None,
        culprit: str = "",
    ) -> Files:
        """The tensors, in alphabetical order of their names, and parameters full of `EMPTY`."""
        import torch

        layout = layout or _Layout()
        shapes, places = layout.shapes()
        tensors = [(n, torch.randn(shapes[n], generator=self.random)) for n in sorted(shapes)]
        if change:
            tensors = [pair for name, tensor in tensors for pair in change(name, tensor)]
        params = {name: torch.full(shape, EMPTY) for name, shape in places.items()}
        return Files(what, tensors, params, layout.tied, layout.parts(), culprit)

    def fitting(self) -> list[Files]:
        """Checkpoints that fill their parameters."""
        import torch

        simple = self.files("q, k, v in the order of the rows")
        simple.tensors.sort(key=lambda pair: ("k_proj" in pair[0]) + 2 * ("v_proj" in pair[0]))
        long = self.files("12 layers, tensors shuffled", _Layout(layers=12))
        order = torch.randperm(len(long.tensors), generator=self.random).tolist()
        long.tensors = [long.tensors[i] for i in order]
        kinds = cycle((torch.bfloat16, torch.float64, torch.float16))
        narrow = self.files("parameters in bfloat16, tensors in float16", _Layout(tied=False))
        narrow.params = {name: tensor.bfloat16() for name, tensor in narrow.params.items()}
        narrow.tensors = [(name, tensor.half()) for name, tensor in narrow.tensors]
        copy = _extra("model.norm.weight", "lm_head.weight")
        flat = self.files("a fused layer right inside of the model", _Layout(fused="other"))
        inside = "model.layers.0.self_attn."
        flat.params = {n.replace(inside, "mixer."): t for n, t in flat.params.items()}
        flat.tensors = [(n.replace(inside, "mixer."), t) for n, t in flat.tensors]
        huge = self.files("numbers up to 10³⁰", change=lambda n, t: [(n, t * 1e30)])
        return [
            simple,
            self.files("one layer, tensors in alphabetical order"),
            long,
            self.files("biases on q, k and v", _Layout(bias=True)),
            self.files("a head of its own", _Layout(tied=False)),
            self.files("a tied head, of which the file has a copy", change=copy),
            self.files(
                "tensors in bfloat16, float64 and float16",
                change=lambda n, t: [(n, t.to(next(kinds)))],
            ),
            narrow,
            self.files("a norm called qkv_proj.norm", _Layout(lookalike=True)),
            self.files("as many heads for k and v as for q", _Layout(fused="equal")),
            self.files(
                "a fused layer of another name, of four parts", _Layout(bias=True, fused="other")
            ),
            self.files("a model in which nothing is fused", _Layout(fused="nothing")),
            self.files("layers called h.0, h.1", _Layout(2, root="h.")),
            self.files("layers deep inside", _Layout(root="model.text.decoder.layers.")),
            self.files("a fused name in the path, too", _Layout(root="qkv_proj.gate_up_proj.")),
            flat,
            self.files("tensors of 8 bits", change=lambda n, t: [(n, t.to(torch.float8_e5m2))]),
            huge,
            self.files("101 layers", _Layout(layers=101)),
            *(
                self.files(
                    "cross attention: parts called q_proj and cross_q_proj", _Layout(fused=f)
                )
                for f in ("cross", "cross last")
            ),
        ]

    def lacking(self) -> list[Files]:
        """Checkpoints that leave something unfilled."""

        def lacking(what: str, pattern: str, culprit: str, layout: _Layout | None = None) -> Files:
            return self.files(f"{what} in the file", layout, _without(pattern), culprit)

        return [
            lacking("no model.norm.weight", "model.norm", "model.norm"),
            lacking("no v_proj of layer 1", r"\.1\..*v_proj", "v_proj|qkv_proj", _Layout(2)),
            lacking(
                "no k_proj of layer 11", r"\.11\..*k_proj", r"\.11\..*(k|qkv)_proj", _Layout(12)
            ),
            lacking("no k_norm", "k_norm", "k_norm"),
            lacking("no bias of k_proj", "k_proj.bias", "(k|qkv)_proj.bias", _Layout(bias=True)),
            lacking("no biases", "bias", "bias", _Layout(bias=True)),
            lacking(
                "the head is missing, and nothing is tied: no lm_head",
                "lm_head",
                "lm_head",
                _Layout(tied=False),
            ),
            lacking("no tensor at all", "", r"\w+\.\w+"),
        ]

    def unexpected(self) -> list[Files]:
        """Checkpoints with a tensor that fits nowhere."""
        many = self.files("a layer too many", _Layout(2), culprit=r"layers\.1\.")
        many.params = {name: tensor for name, tensor in many.params.items() if ".1." not in name}
        attention = "model.layers.0.self_attn."
        bare = self.files("names without the `model.` in front", culprit="embed|layers|norm")
        bare.tensors = [(name.removeprefix("model."), t) for name, t in bare.tensors]
        return [
            many,
            bare,
            *(
                self.files(f"{what} that belongs nowhere", None, _extra(at, attention + name), name)
                for what, at, name in (
                    ("a tensor", "model.norm.weight", "g_proj.weight"),
                    ("an inv_freq", "model.norm.weight", "rotary_emb.inv_freq"),
                    ("a bias", attention + "q_proj.weight", "q_proj.bias"),
                    ("a name of many parts", "model.norm.weight", "q_proj.lora.0.weight"),
                    ("the fused name itself", "model.norm.weight", "qkv_proj.weight"),
                )
            ),
            *(
                self.files(
                    f"{name}, which belongs nowhere",
                    None,
                    _extra("model.norm.weight", name),
                    re.escape(name),
                )
                for name in ("lm_head.bias", "model.lm_head.weight", "q_proj.weight", "scale")
            ),
        ]

    def misshapen(self) -> list[Files]:
        """Checkpoints with a tensor of another shape than its place."""
        changes: list[tuple[str, str, Callable]] = [
            ("an input_layernorm of one number", "input_layernorm", lambda t: t[:1]),
            ("an input_layernorm of [1, 3] for [3]", "input_layernorm", lambda t: t[None]),
            ("a k_proj of one row", "k_proj", lambda t: t[:1]),
            ("a q_proj with another number of rows", "q_proj", lambda t: t[:5]),
            ("an o_proj on its side, [6, 3] for [3, 6]", "o_proj", lambda t: t.T.contiguous()),
            ("a v_proj of one column", "v_proj", lambda t: t[:, :1]),
            ("a down_proj of one column", "down_proj", lambda t: t[:, :1]),
            ("an embedding with a row too many", "embed_tokens", lambda t: t[[0, *range(len(t))]]),
        ]
        one = _reshaped("v_proj.bias", lambda t: t[:1])
        return [
            *(self.files(what, None, _reshaped(name, how), name) for what, name, how in changes),
            self.files("a bias of v_proj of one number", _Layout(bias=True), one, "v_proj.bias"),
        ]


def _without(pattern: str) -> _Change:
    return lambda name, tensor: [] if re.search(pattern, name) else [(name, tensor)]


def _reshaped(pattern: str, change: Callable) -> _Change:
    return lambda name, tensor: [(name, change(tensor) if re.search(pattern, name) else tensor)]


def _extra(at: str, name: str) -> _Change:
    """A tensor of this name after the one that is called at."""
    return lambda n, tensor: [(n, tensor), (name, tensor.clone())] if n == at else [(n, tensor)]


@dataclass(frozen=True)
class _Loader:
    """How somebody loads; as it stands here, rightly.

    slips: what is not looked at, by the names of `_SLIPS`. rows: how the parts of a fused parameter
    are found. shapes: how a tensor's shape is compared with its place's.
    """

    slips: frozenset[str] = frozenset()
    rows: str = "by name"
    shapes: str = "exact"

    def load(
        self,
        params: dict[str, torch.Tensor],
        tensors: Iterable[tuple[str, torch.Tensor]],
        fused: dict[str, dict[str, int]],
        tied: bool,
    ) -> None:
        places, whole = self.places(params, fused)
        waiting, arrived = dict(places), dict.fromkeys(params, 0)
        for name, tensor in tensors:
            if self.passes_over(name, places, tied):
                continue
            if name not in places:
                raise ValueError(name)
            place, tensor = places[name], self.fitted(name, tensor, places[name])
            if self.rows == "by arrival" and name in whole:
                start = arrived[whole[name]]
                place = params[whole[name]][start : start + len(tensor)]
                arrived[whole[name]] += len(tensor)
            if "not-in-place" in self.slips:
                params[whole.get(name, name)] = tensor
            else:
                _copy(name, place, tensor)
            waiting.pop(name, None)
            if "one-part-fills-all" in self.slips and name in whole:
                for other in [key for key in waiting if whole.get(key) == whole[name]]:
                    del waiting[other]
        self.finish(waiting)

    def places(
        self, params: dict[str, torch.Tensor], fused: dict[str, dict[str, int]]
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """(the file's name -> where its tensor goes, a part's name -> its parameter's name)."""
        places: dict[str, torch.Tensor] = {}
        whole: dict[str, str] = {}
        for name, parameter in params.items():
            module, _, kind = name.rpartition(".")
            prefix, _, last = module.rpartition(".")
            if last not in fused or (kind == "bias" and "bias-forgotten" in self.slips):
                places[name] = parameter
                continue
            parts = dict(sorted(fused[last].items())) if self.rows == "sorted" else fused[last]
            sizes = list(parts.values())
            equal = self.rows == "equal"
            views = parameter.tensor_split(len(sizes)) if equal else parameter.split(sizes)
            for part, view in zip(parts, views, strict=True):
                places[f"{prefix}.{part}.{kind}"], whole[f"{prefix}.{part}.{kind}"] = view, name
        return places, whole

    def passes_over(self, name: str, places: dict[str, torch.Tensor], tied: bool) -> bool:
        """Whether nothing is done with a tensor of the file."""
        skips = (tied or "head-always-skipped" in self.slips) and "tied-copy" not in self.slips
        if name == "lm_head.weight" and skips:
            return True
        if "inv-freq-passed-over" in self.slips and name.endswith("inv_freq"):
            return True
        bias = "bias-forgotten" in self.slips and name.endswith("bias")
        return name not in places and ("unexpected" in self.slips or bias)

    def fitted(self, name: str, tensor: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """The tensor, in the shape in which it is copied; ValueError where it is refused."""
        if self.shapes == "turned" and tensor.ndim == 2 and place.shape == tensor.T.shape:
            return tensor.T
        if self.shapes == "numel" and place.numel() == tensor.numel():
            return tensor.reshape(place.shape)
        fits = place.shape == tensor.shape or (
            self.shapes == "dimensions" and place.ndim == tensor.ndim
        )
        if self.shapes == "matrices" and tensor.ndim < 2:
            fits = True
        if self.shapes == "rows" and tensor.ndim:
            fits = len(place) == len(tensor)
        if not fits and "shape" not in self.slips:
            raise ValueError(name)
        return tensor

    def finish(self, waiting: dict[str, torch.Tensor]) -> None:
        """ValueError where something is left unfilled."""
        if "bias-forgotten" in self.slips:
            waiting = {name: place for name, place in waiting.items() if name[-4:] != "bias"}
        if waiting and "missing" not in self.slips:
            raise ValueError(", ".join(waiting))


def _copy(name: str, place: torch.Tensor, tensor: torch.Tensor) -> None:
    try:
        place.copy_(tensor)
    except RuntimeError:
        raise ValueError(name) from None


def _outcome(load: Callable, kind: Callable = iter) -> Callable:
    """Files -> (error or none, names of parameters that are not filled, the parameters).

    kind: what load gets the tensors as.
    """

    def of(checkpoint: Files) -> tuple:
        own = dict(checkpoint.params)
        # The memory of the model: what somebody puts in its place later does not count.
        memory = {name: tensor.detach() for name, tensor in own.items()}
        try:
            load(own, kind(checkpoint.tensors), deepcopy(checkpoint.fused), checkpoint.tied)
        except ValueError:
            return "ValueError", [], {}
        except Exception as error:
            if checkpoint.culprit and not isinstance(error, CheckError | NotImplementedError):
                raise EXERCISE.mistake(
                    "wrong-error", f"{checkpoint}: {type(error).__name__}: {error}"
                ) from error
            raise
        empty = [name for name, tensor in memory.items() if (tensor == EMPTY).any()]
        return "no error", empty, memory

    return of


#: What somebody may not look at. An answer with several of them gets the name of the first.
_SLIPS = (
    "not-in-place",
    "missing",
    "one-part-fills-all",
    "unexpected",
    "inv-freq-passed-over",
    "shape",
    "tied-copy",
    "bias-forgotten",
    "head-always-skipped",
)


def _careless(first: str) -> tuple[Callable, ...]:
    """Loaders with this slip, and with up to two that follow it in `_SLIPS`."""
    later = _SLIPS[_SLIPS.index(first) + 1 :]
    return tuple(
        _outcome(_Loader(frozenset((first, *others))).load)
        for count in range(3)
        for others in combinations(later, count)
    )


def _loose(rows: str = "by name", shapes: str = "exact") -> tuple[Callable, ...]:
    """Loaders that find rows or compare shapes in this way, and look away a little or not."""
    some = ("missing", "unexpected", "inv-freq-passed-over", "shape", "tied-copy")
    return tuple(
        _outcome(_Loader(frozenset(slips), rows, shapes).load)
        for count in range(3)
        for slips in combinations(some, count)
        if shapes == "exact" or "shape" not in slips
    )


def check_loading(answer: Callable) -> str:
    author = _Author()
    good = author.fitting()
    bad = [*author.lacking(), *author.unexpected(), *author.misshapen()]
    # Most wrong loaders differ in files that do not fit; so these come first, and long ones last.
    cases = [(one,) for one in sorted(bad + good, key=lambda one: len(one.tensors) > 100)]
    items = {"item 0: ": "", "item 1: ": "not filled: ", "item 2: ": "parameter "}
    right = _outcome(_Loader().load)
    try:
        diagnose(_outcome(answer), cases, right, EXERCISE.suspects, wording=items)
    except Mistake:
        if _is_right(_outcome(answer, list), cases, right):
            raise EXERCISE.mistake("iterator-used-up") from None
        raise
    for checkpoint in good[:6]:
        _expect_left_alone(answer, deepcopy(checkpoint))
    for checkpoint in bad:
        _expect_name(answer, deepcopy(checkpoint))
    return f"{len(good)} checkpoints that fit, {len(bad)} that do not, and {_speaks(answer)}"


def _is_right(load: Callable, cases: list[tuple], right: Callable) -> bool:
    try:
        diagnose(load, cases, right)
    except CheckError:
        return False
    return True


def _expect_left_alone(load: Callable, fresh: Files) -> None:
    """Require that the dicts themselves stay as they are: only the tensors' numbers change."""
    own, fused = dict(fresh.params), deepcopy(fresh.fused)
    load(own, iter(fresh.tensors), fused, fresh.tied)
    same = list(own) == list(fresh.params) and all(own[n] is t for n, t in fresh.params.items())
    if not same or fused != fresh.fused:
        which = "fused" if same else "params"
        raise EXERCISE.mistake("changed-params", f"{fresh}: you have changed the dict `{which}`.")


def _expect_name(load: Callable, fresh: Files) -> None:
    """Require that the ValueError for files that do not fit says which tensor it is about."""
    try:
        load(fresh.params, iter(fresh.tensors), fresh.fused, fresh.tied)
    except ValueError as error:
        if not re.search(fresh.culprit, str(error)):
            raise EXERCISE.mistake(
                "error-without-name", f"{fresh}: your ValueError says {str(error)!r}."
            ) from error


def _speaks(load: Callable) -> str:
    """The bundled model, filled by this function, in the engine: the same tokens, or Mistake."""
    import torch

    from minivllm import LLM, SamplingParams
    from minivllm.bundled import BUNDLED_MODEL_PATH
    from minivllm.course.grading import with_engine
    from minivllm.models.loader import iterate_weights

    expected = with_engine.engine_tokens()
    with LLM(device="cpu", load_format="dummy") as llm:
        model = llm.llm_engine.model_runner.model
        params = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for parameter in params.values():
            parameter.fill_(math.nan)
        load(dict(params), iterate_weights(BUNDLED_MODEL_PATH), BUNDLED_FUSED, True)
        empty = [name for name, parameter in params.items() if torch.isnan(parameter).any()]
        expect(
            not empty,
            "missing",
            f"The bundled model was loaded, but {', '.join(empty[:3])} are not filled.\n"
            "Each parameter, and each row of it, must have come from the file.",
        )
        outputs = llm.generate(
            list(PROMPTS), SamplingParams(temperature=0, max_tokens=20), use_tqdm=False
        )
    got = [list(output.outputs[0].token_ids) for output in outputs]
    expect(
        got == expected,
        "engine-differs",
        "All parameters are filled, but the model writes other tokens than with the package's"
        " loader.\nSome tensor has found a wrong place; compare with `load_weights` on a model of"
        " your own.",
    )
    return f"the bundled model writes its {sum(map(len, expected))} tokens"


EXERCISE = Exercise(
    id="06.5",
    title="A checkpoint finds its places",
    check=check_loading,
    mistakes=(
        Known(
            "iterator-used-up",
            message=(
                "With a list of tensors your function is right, with an iterator it is not: you go"
                " through `tensors` twice, and the second time nothing comes.\nAn Iterable may be"
                " read once only. Do all your work in one loop, or keep what you need from it."
            ),
            answers=r"""
# %% looks at all names first
@@
+    for name, _ in tensors:
+        if name not in places and not (tied and name == "lm_head.weight"):
+            raise ValueError(f"{name} fits nowhere")
     for name, tensor in tensors:
""",
        ),
        Known(
            "not-in-place",
            message=(
                "You put the tensor into the dict, in place of the parameter, or give the parameter"
                " other memory (`.data =`). What the model computes with is not filled.\nWrite into"
                " the parameter that is there: place.copy_(tensor)."
            ),
            suspects=(*_careless("not-in-place"),),
            answers=r"""
# %% fills the dict, not the parameter
@@
-            raise ValueError(
-                f"{name} is {list(tensor.shape)}, its place {list(place.shape)}"
-            )
-        place.copy_(tensor)
+            raise ValueError(name)
+        params[name] = tensor

# %% gives the parameter other memory
@@
-        place.copy_(tensor)
+        place.data = tensor.to(place.dtype)
""",
        ),
        Known(
            "missing",
            message=(
                "Something is missing in the file, and nobody says so: that parameter keeps"
                " whatever was in memory, and the model talks nonsense.\nKeep book of what was"
                " filled; raise ValueError, with names, if anything is left."
            ),
            suspects=(*_careless("missing"),),
            answers=r"""
# %% nothing is asked for in the end (reference bug 7)
@@
-    if places:
-        raise ValueError(f"not in the file: {', '.join(places)}")

# %% neither missing nor unexpected
@@
-            raise ValueError(f"{name} fits nowhere")
+            continue
@@
-    if places:
-        raise ValueError(f"not in the file: {', '.join(places)}")
""",
        ),
        Known(
            "one-part-fills-all",
            message=(
                "A part of a fused matrix is missing, and nobody says so: its rows keep whatever"
                " was in memory.\nA fused parameter is filled when each of its parts has come."
            ),
            suspects=(*_careless("one-part-fills-all"),),
            answers=r"""
# %% a fused parameter counts as filled with its first part
def load(
    params: dict[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    missing = set(params)
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        target, start, rows = name, 0, None
        for whole, parts in fused.items():
            for part, count in parts.items():
                if f".{part}." in name:
                    target, rows = name.replace(part, whole), count
                    break
                start += count
            else:
                start = 0
                continue
            break
        if target not in params:
            raise ValueError(name)
        place = params[target] if rows is None else params[target][start : start + rows]
        if place.shape != tensor.shape:
            raise ValueError(name)
        place.copy_(tensor)
        missing.discard(target)
    if missing:
        raise ValueError(missing)
""",
        ),
        Known(
            "unexpected",
            message=(
                "A tensor of the file fits nowhere, and is passed over in silence. Then the model"
                " is not the one that the file is for.\nRaise ValueError with its name."
            ),
            suspects=(*_careless("unexpected"),),
            answers=r"""
# %% what fits nowhere is passed over
@@
-            raise ValueError(f"{name} fits nowhere")
+            continue
""",
        ),
        Known(
            "inv-freq-passed-over",
            message=(
                "You pass over a tensor whose name ends in inv_freq. Nothing in `params` has this"
                " name, so it fits nowhere.\nRaise ValueError for it as for any other."
            ),
            suspects=(*_careless("inv-freq-passed-over"),),
            answers=r"""
# %% as old checkpoints need it
@@
         if name not in places:
+            if name.endswith("inv_freq"):
+                continue
             raise ValueError(f"{name} fits nowhere")
""",
        ),
        Known(
            "shape",
            message=(
                "A tensor of another shape was taken: copy_ broadcasts, so that one row fills"
                " many.\nCompare the shapes before you copy, and raise ValueError."
            ),
            suspects=(
                *_careless("shape"),
                *_loose(shapes="dimensions"),
                *_loose(shapes="matrices"),
            ),
            answers=r"""
# %% copy_ will tell
@@
-        if place.shape != tensor.shape:
-            raise ValueError(
-                f"{name} is {list(tensor.shape)}, its place {list(place.shape)}"
-            )
-        place.copy_(tensor)
+        try:
+            place.copy_(tensor)
+        except RuntimeError as error:
+            raise ValueError(f"{name}: {error}") from error

# %% only the number of dimensions is compared
@@
-        if place.shape != tensor.shape:
-            raise ValueError(
-                f"{name} is {list(tensor.shape)}, its place {list(place.shape)}"
-            )
-        place.copy_(tensor)
+        if place.dim() != tensor.dim():
+            raise ValueError(name)
+        try:
+            place.copy_(tensor)
+        except RuntimeError as error:
+            raise ValueError(f"{name}: {error}") from error
""",
        ),
        Known(
            "tied-copy",
            message=(
                "The model's head is tied, and the file has a copy of it, as many have: that is no"
                " error.\nWith tied=True, pass over lm_head.weight."
            ),
            suspects=(*_careless("tied-copy"),),
            answers=r"""
# %% a copy of the head is unexpected
@@
-        if tied and name == "lm_head.weight":
-            continue
""",
        ),
        Known(
            "bias-forgotten",
            message=(
                "Weights are loaded, biases of fused layers are not. Qwen2 has them on q, k and"
                " v.\nWhat comes after the last dot may be weight or bias; treat both alike."
            ),
            suspects=(*_careless("bias-forgotten"),),
            answers=r"""
# %% only names that end in weight are split
def load(
    params: dict[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    places = {}
    for name, parameter in params.items():
        parent, _, last = name.removesuffix(".weight").rpartition(".")
        if last in fused:
            rows = parameter.split(list(fused[last].values()))
            places |= {
                f"{parent}.{part}.weight": place
                for part, place in zip(fused[last], rows)
            }
        elif not name.endswith("bias"):
            places[name] = parameter
    for name, tensor in tensors:
        if name.endswith("bias") or (tied and name == "lm_head.weight"):
            continue
        if name not in places or places[name].shape != tensor.shape:
            raise ValueError(name)
        places.pop(name).copy_(tensor)
    if places:
        raise ValueError(sorted(places))
""",
        ),
        Known(
            "head-always-skipped",
            message=(
                "You pass over lm_head.weight always. Here the head is not tied: it is a matrix of"
                " its own.\nPass over it only with tied=True."
            ),
            suspects=(*_careless("head-always-skipped"),),
            answers=r"""
# %% the head is passed over, tied or not
@@
-        if tied and name == "lm_head.weight":
+        if name == "lm_head.weight":
""",
        ),
        Known(
            "rows-by-arrival",
            message=(
                "You fill the rows of a fused matrix in the order in which the parts come. In the"
                " file that is alphabetical: k, q, v. In the matrix it is q, k, v.\nThe name says"
                " which rows; `fused` says how many each has."
            ),
            suspects=(*_loose(rows="by arrival"),),
            answers=r"""
# %% parts are appended as they come
def load(
    params: dict[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    filled, owner = {name: 0 for name in params}, {}
    for name in params:
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        for part in fused.get(last, [last]):
            owner[f"{parent}.{part}.{kind}" if last in fused else name] = name
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in owner:
            raise ValueError(name)
        target, start = params[owner[name]], filled[owner[name]]
        last = name.split(".")[-2]
        rows = next(
            (parts[last] for parts in fused.values() if last in parts), len(target)
        )
        if tensor.shape != (rows, *target.shape[1:]):
            raise ValueError(name)
        target[start : start + len(tensor)] = tensor
        filled[owner[name]] += len(tensor)
    if short := [name for name in params if filled[name] < len(params[name])]:
        raise ValueError(short)
""",
        ),
        Known(
            "equal-parts",
            message=(
                "You cut a fused matrix into equal parts. With grouped-query attention q has more"
                " rows than k and v.\nsplit(list(fused[…].values())) cuts where it should."
            ),
            suspects=(*_loose(rows="equal"),),
            answers=r"""
# %% chunk, as if there were no grouped-query attention
@@
-            rows = parameter.split(list(fused[last].values()))
+            rows = parameter.tensor_split(len(fused[last]))
""",
        ),
        Known(
            "parts-in-alphabetical-order",
            message=(
                "The parts lie in alphabetical order in your matrix. The order of `fused` is what"
                " counts: the model cuts its result into q, k, v.\nDo not sort."
            ),
            suspects=(*_loose(rows="sorted"),),
            answers=r"""
# %% sorted parts
@@
-            rows = parameter.split(list(fused[last].values()))
+            parts = sorted(fused[last])
+            rows = parameter.split([fused[last][part] for part in parts])
@@
-                f"{parent}.{part}.{kind}": place
-                for part, place in zip(fused[last], rows)
+                f"{parent}.{part}.{kind}": place for part, place in zip(parts, rows)
""",
        ),
        Known(
            "turned-to-fit",
            message=(
                "A matrix of the wrong shape was turned until it fitted. Its numbers lie in another"
                " order then.\nA shape that is not exactly the place's is a ValueError."
            ),
            suspects=(*_loose(shapes="turned"),),
            answers=r"""
# %% transposes what is on its side
@@
         place = places.pop(name)
+        if place.shape == tensor.T.shape:
+            tensor = tensor.T
""",
        ),
        Known(
            "same-numel",
            message=(
                "You compare how many numbers there are, not the shapes: a matrix on its side has"
                " as many, in another order.\nCompare place.shape and tensor.shape."
            ),
            suspects=(*_loose(shapes="numel"),),
            answers=r"""
# %% counts the numbers
@@
-        if place.shape != tensor.shape:
+        if place.numel() != tensor.numel():
@@
-        place.copy_(tensor)
+        place.copy_(tensor.reshape(place.shape))

# %% looks at it as the place is
@@
-        if place.shape != tensor.shape:
+        if place.numel() != tensor.numel():
@@
-        place.copy_(tensor)
+        place.copy_(tensor.view_as(place))
""",
        ),
        Known(
            "rows-only",
            message=(
                "You compare the first dimension only: copy_ broadcasts one column into"
                " many.\nCompare the whole shapes."
            ),
            suspects=(*_loose(shapes="rows"),),
            answers=r"""
# %% compares the first dimension
@@
-        if place.shape != tensor.shape:
+        if place.shape[0] != tensor.shape[0]:
""",
        ),
        Known(
            "raised",
            answers=r"""
# %% a fused name anywhere in the name
@@
-        if last in fused:
-            rows = parameter.split(list(fused[last].values()))
+        if last := next((whole for whole in fused if whole in name), ""):
+            rows = parameter.split(list(fused[last].values()))
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% a part's name anywhere in the name
def load(
    params: dict[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    left = set()
    for name in params:
        layer = name.split(".")[-2] if "." in name else ""
        left |= {name.replace(layer, part) for part in fused.get(layer, [layer])}
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        place = params.get(name)
        for layer, parts in fused.items():
            start = 0
            for part, rows in parts.items():
                if part in name and name.replace(part, layer) in params:
                    whole = params[name.replace(part, layer)]
                    place = whole[start : start + rows]
                start += rows
        if place is None or place.shape != tensor.shape:
            raise ValueError(name)
        place.copy_(tensor)
        left.discard(name)
    if left:
        raise ValueError(sorted(left))

# %% names are cut at fixed places
@@
-        parent, _, last = module.rpartition(".")
+        pieces = module.split(".")
+        parent, last = ".".join(pieces[:4]), pieces[4] if len(pieces) == 5 else ""

# %% passes over all that begins with lm_head
@@
-        if name not in places:
+        if name not in places and name.startswith("lm_head"):
+            continue
+        if name not in places:

# %% passes over all that ends with lm_head.weight
@@
-        if tied and name == "lm_head.weight":
+        if tied and name.endswith("lm_head.weight"):

# %% reads other 16 bits as if they were its own
@@
-        place.copy_(tensor)
+        alike = place.element_size() == tensor.element_size()
+        place.copy_(tensor.view(place.dtype) if alike else tensor)
""",
        ),
        Known(
            "changed-params",
            "The dicts belong to their owners; the model does not look into `params`, it has the"
            " tensors. Write into these, `place.copy_(tensor)`, and leave the dicts as they are.",
            answers=r"""
# %% fills it, and then puts the file's tensor there
@@
-        place.copy_(tensor)
+        place.copy_(tensor)
+        if name in params:
+            params[name] = tensor
""",
        ),
        Known(
            "wrong-error",
            message=(
                "These files do not fit, and your code raised another error than the one asked"
                " for.\nLook for what does not fit before you use it, and raise a ValueError with"
                " the tensor's name."
            ),
            answers=r"""
# %% an unknown name is a KeyError of the dict
@@
-        if name not in places:
-            raise ValueError(f"{name} fits nowhere")

# %% an assert is no ValueError
@@
-    if places:
-        raise ValueError(f"not in the file: {', '.join(places)}")
+    assert not places, f"not in the file: {', '.join(places)}"
""",
        ),
        Known(
            "error-without-name",
            message=(
                "Whoever reads it wants to know which tensor does not fit.\nPut the tensor's name"
                " into the text of the error."
            ),
            answers=r"""
# %% says only that there was one
@@
-            raise ValueError(f"{name} fits nowhere")
+            raise ValueError("unexpected tensor")
@@
-                f"{name} is {list(tensor.shape)}, its place {list(place.shape)}"
+                f"a tensor is {list(tensor.shape)}, its place {list(place.shape)}"

# %% does not say what is missing
@@
-        raise ValueError(f"not in the file: {', '.join(places)}")
+        raise ValueError(f"{len(places)} missing")
""",
        ),
    ),
    right=r"""
# %% from the tensor's side, with a set of what is done
def load(
    params: dict[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    whole_of = {part: whole for whole, parts in fused.items() for part in parts}
    expected = set()
    for name in params:
        *parent, last, kind = name.split(".")
        expected |= {
            ".".join([*parent, part, kind]) for part in fused.get(last, [last])
        }
    for name, tensor in tensors:
        if name == "lm_head.weight" and tied:
            continue
        if name not in expected:
            raise ValueError(f"unexpected or twice: {name}")
        expected.remove(name)
        *parent, last, kind = name.split(".")
        if last in whole_of:
            whole = whole_of[last]
            names = list(fused[whole])
            start = sum(fused[whole][part] for part in names[: names.index(last)])
            place = params[".".join([*parent, whole, kind])][
                start : start + fused[whole][last]
            ]
        else:
            place = params[name]
        if place.shape != tensor.shape:
            raise ValueError(f"{name}: {place.shape} and {tensor.shape}")
        place[...] = tensor.to(place.dtype)
    if expected:
        raise ValueError(f"missing: {sorted(expected)}")
""",
)
