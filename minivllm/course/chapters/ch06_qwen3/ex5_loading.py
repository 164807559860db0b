"""06.5: a checkpoint finds its places."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

from minivllm.course.grading.diagnose import diagnose
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


BUNDLED_FUSED = {
    "qkv_proj": {"q_proj": 256, "k_proj": 128, "v_proj": 128},
    "gate_up_proj": {"gate_proj": 768, "up_proj": 768},
}


@dataclass
class Files:
    """A checkpoint and the parameters that it should fill."""

    what: str
    tensors: list[tuple[str, torch.Tensor]]
    params: dict[str, torch.Tensor]
    tied: bool
    culprit: str = ""  # where they do not fit: what an error must name, a regular expression

    def __repr__(self) -> str:
        return self.what


def _small_checkpoint(
    random: torch.Generator, layers: int, tied: bool, bias: bool
) -> tuple[list, dict]:
    """(tensors in alphabetical order, parameters full of NaN)."""
    import torch

    tensors, params = {"model.embed_tokens.weight": (7, 3), "model.norm.weight": (3,)}, {}
    if not tied:
        tensors["lm_head.weight"] = (7, 3)
    params |= tensors
    for i in range(layers):
        prefix = f"model.layers.{i}."
        own = {
            "input_layernorm.weight": (3,),
            "self_attn.o_proj.weight": (3, 6),
            "mlp.down_proj.weight": (3, 5),
            "self_attn.q_norm.weight": (2,),
            "self_attn.k_norm.weight": (2,),
        }
        for branch, name in (("self_attn", "qkv_proj"), ("mlp", "gate_up_proj")):
            kinds = (
                {"weight": (3,), "bias": ()} if bias and branch == "self_attn" else {"weight": (3,)}
            )
            for kind, columns in kinds.items():
                params[f"{prefix}{branch}.{name}.{kind}"] = (
                    sum(SMALL_FUSED[name].values()),
                    *columns,
                )
                for part, rows in SMALL_FUSED[name].items():
                    tensors[f"{prefix}{branch}.{part}.{kind}"] = (rows, *columns)
        tensors |= {prefix + name: shape for name, shape in own.items()}
        params |= {prefix + name: shape for name, shape in own.items()}
    filled = [(name, torch.randn(tensors[name], generator=random)) for name in sorted(tensors)]
    return filled, {name: torch.full(shape, math.nan) for name, shape in params.items()}


def _load(
    params: dict[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    fused: dict[str, dict[str, int]],
    tied: bool,
    *,
    slips: frozenset[str] = frozenset(),
    rows: str = "by name",
    shapes: str = "exact",
) -> None:
    """Right by default; slips: what is not looked at; rows: how the parts of a fused parameter are
    found; shapes: how a tensor's shape is held against its place's."""
    places: dict[str, torch.Tensor] = {}
    whole: dict[str, str] = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        prefix, _, last = module.rpartition(".")
        if last not in fused or (kind == "bias" and "bias-forgotten" in slips):
            places[name] = parameter
            continue
        parts = fused[last] if rows != "alphabetical" else dict(sorted(fused[last].items()))
        sizes = list(parts.values())
        views = parameter.split(sizes) if rows != "equal" else parameter.tensor_split(len(sizes))
        for part, view in zip(parts, views, strict=True):
            places[f"{prefix}.{part}.{kind}"], whole[f"{prefix}.{part}.{kind}"] = view, name
    waiting = dict(places)
    arrived: dict[str, int] = {}
    for name, tensor in tensors:
        if (
            (tied or "head-always-skipped" in slips)
            and name == "lm_head.weight"
            and "tied-copy" not in slips
        ):
            continue
        if name not in places:
            if "unexpected" in slips or ("bias-forgotten" in slips and name.endswith("bias")):
                continue
            raise ValueError(name)
        place = places[name]
        if shapes == "turned" and tensor.ndim == 2 and place.shape == tensor.T.shape:
            tensor = tensor.T
        if shapes == "numel" and place.numel() == tensor.numel():
            tensor = tensor.reshape(place.shape)
        fits = len(place) == len(tensor) if shapes == "rows" else place.shape == tensor.shape
        if not fits and "shape" not in slips:
            raise ValueError(name)
        if rows == "by arrival" and name in whole:
            start = arrived.get(whole[name], 0)
            place = params[whole[name]][start : start + len(tensor)]
            arrived[whole[name]] = start + len(tensor)
        if "not-in-place" in slips:
            params[whole.get(name, name)] = tensor
        else:
            try:
                place.copy_(tensor)
            except RuntimeError:
                raise ValueError(name) from None
        waiting.pop(name, None)
        if "one-part-fills-all" in slips and name in whole:
            waiting = {
                key: value for key, value in waiting.items() if whole.get(key) != whole[name]
            }
    if waiting and "missing" not in slips:
        if "bias-forgotten" in slips and all(name.endswith("bias") for name in waiting):
            return
        raise ValueError(", ".join(waiting))


def check_loading(answer: Callable) -> str:
    import torch

    random = seeded(5)
    shuffle = torch.randperm(1000, generator=random).tolist()

    def files(
        what: str,
        layers: int = 1,
        tied: bool = True,
        bias: bool = False,
        change: Callable | None = None,
        mixed: bool = False,
        culprit: str = "",
    ) -> Files:
        tensors, params = _small_checkpoint(random, layers, tied, bias)
        if change:
            tensors = [pair for name, tensor in tensors for pair in change(name, tensor)]
        if mixed:
            tensors = [tensors[i] for i in shuffle if i < len(tensors)]
        return Files(what, tensors, params, tied, culprit)

    def without(pattern: str) -> Callable:
        return lambda name, tensor: [] if re.search(pattern, name) else [(name, tensor)]

    def reshaped(pattern: str, change: Callable) -> Callable:
        return lambda name, tensor: [(name, change(tensor) if re.search(pattern, name) else tensor)]

    def extra(at: str, name: str) -> Callable:
        return lambda n, tensor: [(n, tensor), (name, tensor.clone())] if n == at else [(n, tensor)]

    def in_order(name: str, tensor: torch.Tensor) -> list:
        return [(name, tensor)]

    simple = files("q, k, v in the order of the rows", change=in_order)
    simple.tensors.sort(key=lambda pair: ("k_proj" in pair[0]) + 2 * ("v_proj" in pair[0]))
    good = [
        simple,
        files("one layer, tensors in alphabetical order"),
        files("12 layers, tensors shuffled", layers=12, mixed=True),
        files("biases on q, k and v", bias=True),
        files("a head of its own", tied=False),
        files(
            "a tied head, of which the file has a copy",
            change=extra("model.norm.weight", "lm_head.weight"),
        ),
        files("tensors in bfloat16", change=lambda n, t: [(n, t.bfloat16())]),
    ]
    bad = [
        files(
            "no model.norm.weight in the file", change=without("model.norm"), culprit="model.norm"
        ),
        files(
            "no v_proj of layer 1 in the file",
            layers=2,
            change=without(r"1\.self_attn\.v_proj"),
            culprit="v_proj|qkv_proj",
        ),
        files("no k_norm in the file", change=without("k_norm"), culprit="k_norm"),
        files(
            "the head is missing, and nothing is tied",
            tied=False,
            change=without("lm_head"),
            culprit="lm_head",
        ),
        files(
            "a tensor that belongs nowhere",
            change=extra("model.norm.weight", "model.layers.0.self_attn.g_proj.weight"),
            culprit="g_proj",
        ),
        files("a layer too many", layers=2, culprit=r"layers\.1\."),
        files(
            "an input_layernorm of one number",
            change=reshaped("input_layernorm", lambda t: t[:1]),
            culprit="input_layernorm",
        ),
        files("a k_proj of one row", change=reshaped("k_proj", lambda t: t[:1]), culprit="k_proj"),
        files(
            "a q_proj with another number of rows",
            change=reshaped("q_proj", lambda t: t[:5]),
            culprit="q_proj",
        ),
        files(
            "an o_proj on its side, [6, 3] for [3, 6]",
            change=reshaped("o_proj", lambda t: t.T.contiguous()),
            culprit="o_proj",
        ),
        files(
            "a v_proj of one column",
            change=reshaped("v_proj", lambda t: t[:, :1]),
            culprit="v_proj",
        ),
        files(
            "a down_proj of one column",
            change=reshaped("down_proj", lambda t: t[:, :1]),
            culprit="down_proj",
        ),
    ]
    del_layer = bad[5].params
    bad[5].params = {name: tensor for name, tensor in del_layer.items() if ".1." not in name}

    def outcome(load: Callable) -> Callable:
        def of(checkpoint: Files) -> tuple:
            own = dict(checkpoint.params)
            try:
                load(own, iter(checkpoint.tensors), SMALL_FUSED, checkpoint.tied)
            except ValueError:
                return "ValueError", [], {}
            empty = [name for name, tensor in checkpoint.params.items() if tensor.isnan().any()]
            return "no error", empty, dict(checkpoint.params)

        return of

    explain = {
        "not-in-place": (
            "You put the tensor into the dict, in place of the parameter. The model still has its"
            " own, which nobody filled.\nWrite into the parameter that is there:"
            " place.copy_(tensor)."
        ),
        "missing": (
            "Something is missing in the file, and nobody says so: that parameter keeps whatever"
            " was in memory, and the model talks nonsense.\nKeep book of what was filled; raise"
            " ValueError, with names, if anything is left."
        ),
        "one-part-fills-all": (
            "A part of a fused matrix is missing, and nobody says so: its rows keep whatever was in"
            " memory.\nA fused parameter is filled when each of its parts has come."
        ),
        "unexpected": (
            "A tensor of the file fits nowhere, and is passed over in silence. Then the model is"
            " not the one that the file is for.\nRaise ValueError with its name."
        ),
        "shape": (
            "A tensor of another shape was taken: copy_ broadcasts, so that one row fills many.\n"
            "Compare the shapes before you copy, and raise ValueError."
        ),
        "tied-copy": (
            "The model's head is tied, and the file has a copy of it, as many have: that is no"
            " error.\nWith tied=True, pass over lm_head.weight."
        ),
        "bias-forgotten": (
            "Weights are loaded, biases of fused layers are not. Qwen2 has them on q, k and v.\n"
            "What comes after the last dot may be weight or bias; treat both alike."
        ),
        "head-always-skipped": (
            "You pass over lm_head.weight always. Here the head is not tied: it is a matrix of "
            "its own.\n"
            "Pass over it only with tied=True."
        ),
    }
    orders = {
        "by arrival": (
            "rows-by-arrival",
            (
                "You fill the rows of a fused matrix in the order in which the parts come. In the"
                " file that is alphabetical: k, q, v. In the matrix it is q, k, v.\nThe name says"
                " which rows; `fused` says how many each has."
            ),
        ),
        "equal": (
            "equal-parts",
            (
                "You cut a fused matrix into equal parts. With grouped-query attention q has more "
                "rows "
                "than k and v.\nsplit(list(fused[…].values())) cuts where it should."
            ),
        ),
        "alphabetical": (
            "parts-in-alphabetical-order",
            (
                "The parts lie in alphabetical order in your matrix. The "
                "order of "
                "`fused` is what counts: the model cuts its result into q, k, v.\nDo not sort."
            ),
        ),
    }
    measures = {
        "turned": (
            "turned-to-fit",
            (
                "A matrix of the wrong shape was turned until it fitted. Its numbers lie in another"
                " order then.\nA shape that is not exactly the place's is a ValueError."
            ),
        ),
        "numel": (
            "same-numel",
            (
                "You compare how many numbers there are, not the shapes: a matrix on its side has"
                " as many, in another order.\nCompare place.shape and tensor.shape."
            ),
        ),
        "rows": (
            "rows-only",
            (
                "You compare the first dimension only: copy_ broadcasts one column into many.\n"
                "Compare the whole shapes."
            ),
        ),
    }
    suspects: dict[str, tuple] = {}
    for count in (1, 2, 3, 4):
        for slips in combinations(explain, count):
            functions = suspects.get(slips[0], ("",))[1:]
            suspects[slips[0]] = (
                explain[slips[0]],
                *functions,
                outcome(partial(_load, slips=frozenset(slips))),
            )
    loose = [
        frozenset(s)
        for n in range(4)
        for s in combinations(("missing", "unexpected", "shape", "tied-copy"), n)
    ]
    for rows, (name, why) in orders.items():
        suspects[name] = (
            why,
            *(outcome(partial(_load, rows=rows, slips=slips)) for slips in loose),
        )
    for shapes, (name, why) in measures.items():
        suspects[name] = (
            why,
            *(outcome(partial(_load, shapes=shapes, slips=s)) for s in loose if "shape" not in s),
        )
    items = {"item 0: ": "", "item 1: ": "not filled: ", "item 2: ": "parameter "}
    diagnose(
        outcome(answer), [(one,) for one in good + bad], outcome(_load), suspects, wording=items
    )
    for checkpoint in bad:
        fresh = deepcopy(checkpoint)
        try:
            answer(fresh.params, iter(fresh.tensors), SMALL_FUSED, fresh.tied)
        except ValueError as error:
            expect(
                re.search(checkpoint.culprit, str(error)),
                "error-without-name",
                f"{checkpoint}: your ValueError says {str(error)!r}.\nWhoever reads it wants to"
                " know which tensor: put its name in.",
            )
    return f"{len(good)} checkpoints that fit, {len(bad)} that do not, and {_speaks(answer)}"


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
            "missing",
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
            "unexpected",
            answers=r"""
# %% what fits nowhere is passed over
@@
-            raise ValueError(f"{name} fits nowhere")
+            continue
""",
        ),
        Known(
            "shape",
            answers=r"""
# %% copy_ will tell
@@
-        if place.shape != tensor.shape:
-            raise ValueError(
-                f"{name} has the shape {list(tensor.shape)}, its place {list(place.shape)}"
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
-                f"{name} has the shape {list(tensor.shape)}, its place {list(place.shape)}"
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
            "equal-parts",
            answers=r"""
# %% chunk, as if there were no grouped-query attention
@@
-            rows = parameter.split(list(fused[last].values()))
+            rows = parameter.tensor_split(len(fused[last]))
""",
        ),
        Known(
            "parts-in-alphabetical-order",
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
            "tied-copy",
            answers=r"""
# %% a copy of the head is unexpected
@@
-        if tied and name == "lm_head.weight":
-            continue
""",
        ),
        Known(
            "head-always-skipped",
            answers=r"""
# %% the head is passed over, tied or not
@@
-        if tied and name == "lm_head.weight":
+        if name == "lm_head.weight":
""",
        ),
        Known(
            "not-in-place",
            answers=r"""
# %% fills the dict, not the parameter
@@
-            raise ValueError(
-                f"{name} has the shape {list(tensor.shape)}, its place {list(place.shape)}"
-            )
-        place.copy_(tensor)
+            raise ValueError(name)
+        params[name] = tensor
""",
        ),
        Known(
            "rows-by-arrival",
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
            "one-part-fills-all",
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
            "bias-forgotten",
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
            "same-numel",
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
            answers=r"""
# %% compares the first dimension
@@
-        if place.shape != tensor.shape:
+        if place.shape[0] != tensor.shape[0]:
""",
        ),
        Known(
            "turned-to-fit",
            answers=r"""
# %% transposes what is on its side
@@
         place = places.pop(name)
+        if place.shape == tensor.T.shape:
+            tensor = tensor.T
""",
        ),
        Known(
            "error-without-name",
            answers=r"""
# %% says only that there was one
@@
-            raise ValueError(f"{name} fits nowhere")
+            raise ValueError("unexpected tensor")
@@
-                f"{name} has the shape {list(tensor.shape)}, its place {list(place.shape)}"
+                f"a tensor has the shape {list(tensor.shape)}, its place {list(place.shape)}"

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
