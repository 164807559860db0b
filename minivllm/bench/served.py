"""What the clients of `minivllm bench serve` saw, as numbers.

TTFT is the time from sending a request (or, at a rate, from when it was due) to its first chunk; if
the request takes a new connection, making that is part of it.
TPOT is the time from the first chunk to the last, divided by the tokens but one: where a chunk
holds several tokens, their time is shared out evenly. Gaps are those between chunks. Taught in
notebooks/12_serving.ipynb.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from minivllm.bench.report import percentiles

#: From this share of a core on, a client process may be what limits the numbers.
BUSY = 0.8
#: From this share of cached prompt tokens on, the prompts were not new to the server.
KNOWN = 0.02
#: With a target, a load is too much when fewer of its requests keep it; without one, when a
#: request takes so many times as long as at the lowest load.
ENOUGH_GOOD, TOO_SLOW = 0.9, 2.0


@dataclass(frozen=True)
class Times:
    """The times of one request that was answered, in seconds. tpot: None for one token."""

    ttft: float
    tpot: float | None
    e2e: float
    gaps: list[float]
    tokens: int

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Times:
        arrivals, start = record["arrivals"], record["start"]
        # A server that does not count: a chunk is a token for most of them.
        tokens = record["tokens"] or len(arrivals)
        tpot = (arrivals[-1] - arrivals[0]) / (tokens - 1) if tokens > 1 else None
        gaps = [b - a for a, b in pairwise(arrivals)]
        return cls(arrivals[0] - start, tpot, record["end"] - start, gaps, tokens)

    def keeps(self, slo: Mapping[str, float]) -> bool:
        """Whether each of these times is at most its target."""
        return all((getattr(self, name) or 0.0) <= most for name, most in slo.items())


def summarize(
    records: Sequence[Mapping[str, Any]], slo: Mapping[str, float], num_planned: int
) -> dict[str, Any]:
    """The numbers of one load. Raises ValueError without a record.

    Rates are per second from the first request to the last answer. Tokens are those of requests
    that were answered to their end.
    """
    if not records:
        raise ValueError("nothing was sent")
    good = [record for record in records if record["status"] == "ok"]
    times = [Times.of(record) for record in good]
    begin = min(record["start"] for record in records)
    seconds = max(record["end"] for record in records) - begin
    chunks = sum(len(record["arrivals"]) for record in good)
    output = sum(found.tokens for found in times)
    cached = [record["cached"] for record in good if record["cached"] is not None]
    prompt = sum(record["prompt_tokens"] for record in good)
    summary: dict[str, Any] = {
        "planned": num_planned,
        "sent": len(records),
        "completed": len(good),
        "errors": _errors(records),
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": output / seconds,
        "prompt_tokens_per_second": prompt / seconds,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "cached_prompt_tokens": sum(cached) if cached else None,
        "uncounted": sum(record["tokens"] is None for record in good),
        "tokens_per_chunk": output / chunks if chunks else None,
        "ttft": _percentiles([found.ttft for found in times]),
        "tpot": _percentiles([found.tpot for found in times if found.tpot is not None]),
        "gap": _percentiles([gap for found in times for gap in found.gaps]),
        "end_to_end": _percentiles([found.e2e for found in times]),
        "sent_late": _percentiles([record["late"] for record in records]),
    }
    if slo:
        kept = sum(found.keeps(slo) for found in times)
        summary["goodput"] = {
            "kept": kept,
            "share": kept / len(records),
            "requests_per_second": kept / seconds,
        }
    summary["over_time"] = _over_time(good, begin, seconds)
    summary["requests"] = [_row(record, begin) for record in records]
    return summary


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    return percentiles(values) if values else None


def _errors(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """status -> how many requests ended so, and what the first of them said."""
    failed = [record for record in records if record["status"] != "ok"]
    first = {record["status"]: record["why"] for record in reversed(failed)}
    counts = Counter(record["status"] for record in failed)
    return {name: {"count": counts[name], "first": first[name]} for name in sorted(counts)}


def _over_time(
    good: Sequence[Mapping[str, Any]], begin: float, seconds: float, most: int = 60
) -> dict[str, Any]:
    """Output tokens per second, in slices of the time."""
    slices = max(1, min(most, len(good)))
    width = seconds / slices
    counts = [0.0] * slices
    for record in good:
        arrivals = record["arrivals"]
        each = (record["tokens"] or len(arrivals)) / len(arrivals)
        for moment in arrivals:
            counts[min(slices - 1, int((moment - begin) / width))] += each
    return {
        "slice_seconds": width,
        "output_tokens_per_second": [round(count / width, 3) for count in counts],
    }


def _row(record: Mapping[str, Any], begin: float) -> dict[str, Any]:
    """One request in the JSON: its times from the start of the load."""
    row = {
        "number": record["number"],
        "status": record["status"],
        "start": round(record["start"] - begin, 6),
        "seconds": round(record["end"] - record["start"], 6),
        "prompt_tokens": record["prompt_tokens"],
    }
    if record["status"] == "ok":
        found = Times.of(record)
        row |= {"output_tokens": found.tokens, "chunks": len(record["arrivals"])}
        row |= {"ttft": round(found.ttft, 6), "tpot": found.tpot and round(found.tpot, 7)}
    return row


def knee(points: Sequence[Mapping[str, Any]]) -> float | None:
    """The highest rate that the server holds: it and all lower ones are within bounds.

    With targets, the bound is that `ENOUGH_GOOD` of the requests keep them; without, that the
    median request takes at most `TOO_SLOW` times as long as at the lowest rate. None where not
    even the lowest rate holds.
    """
    ordered = sorted((p for p in points if "rate" in p), key=lambda point: point["rate"])
    held, base = None, None
    for point in ordered:
        if point["end_to_end"] is None:
            break
        if "goodput" in point:
            holds = point["goodput"]["share"] >= ENOUGH_GOOD
        else:
            base = base or point["end_to_end"]["median"]
            holds = point["end_to_end"]["median"] <= TOO_SLOW * base
        if not holds:
            break
        held = point["rate"]
    return held


def load_name(point: Mapping[str, Any]) -> str:
    """ "8 clients", "2.5 requests/s" """
    if "rate" in point:
        return f"{point['rate']:g} requests/s"
    return f"{point['clients']} client{'s' * (point['clients'] != 1)}"


def remarks(report: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """What a reader must know beside the numbers: (sentence, whether it is a warning)."""
    found = [(text, True) for point in report["points"] for text in _warnings(point)]
    chunks = [p["tokens_per_chunk"] for p in report["points"] if p["tokens_per_chunk"]]
    if chunks:
        least, most = (f"{choose(chunks):.2f}" for choose in (min, max))
        held = least if least == most else f"{least} to {most}"
        text = f"A chunk held {held} tokens on average; TPOT is per token, a gap is between chunks."
        found.append((text, False))
    if "knee" in report:
        held = report["knee"]
        rates = [point["rate"] for point in report["points"] if "rate" in point]
        bound = (
            f"{ENOUGH_GOOD:.0%} of the requests keep the targets"
            if report["settings"]["slo"]
            else f"the median request takes at most {TOO_SLOW:g} × as long as at {min(rates):g}/s"
        )
        text = "no rate" if held is None else f"up to {held:g} requests/s"
        text += ", the highest one measured" * (held == max(rates))
        found.append((f"The server holds {text}: {bound}.", False))
    if report["problem"]:
        found.append((report["problem"], True))
    return found


def _warnings(point: Mapping[str, Any]) -> list[str]:
    name, found = load_name(point), []
    for status, error in point["errors"].items():
        times = f"{error['count']} request{'s' * (error['count'] != 1)}"
        found.append(f"{name}: {times} failed, {status}: {error['first']}")
    if (busiest := max(point["busy"], default=0.0)) > BUSY:
        found.append(
            f"{name}: a client process was busy {busiest:.0%} of the time, so the clients may be"
            " what is slow; give more --processes."
        )
    late, ttft = point["sent_late"], point["ttft"]
    if "rate" in point and late and ttft and late["p99"] > 0.1 * ttft["median"]:
        text = f"{name}: the clients sent late (p99 {1e3 * late['p99']:.1f} ms)"
        found.append(f"{text}, which is part of TTFT.")
    known = (point["cached_prompt_tokens"] or 0) / max(1, point["prompt_tokens"])
    if known > KNOWN:
        found.append(
            f"{name}: the server knew {known:.0%} of the prompt tokens from before, so TTFT is too"
            " good; use another --seed."
        )
    if point["uncounted"]:
        found.append(
            f"{name}: {point['uncounted']} answers had no usage, so a chunk was counted as a token."
        )
    return found
