"""Reports as tables on the screen."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.table import Table
from rich.text import Text

from minivllm.bench.report import machine
from minivllm.bench.served import load_name, remarks
from minivllm.viz.terminal import SafeConsole


def show(report: dict[str, Any]) -> None:
    """Print a report's tables, and where it was measured."""
    if "results" in report:
        _show_batch(report)
        return
    # For a file or a pipe, the tables are as wide as they need to be.
    console = SafeConsole(width=None if sys.stdout.isatty() else 160)
    for table in _TABLES[report["benchmark"]](report):
        console.print(table)
    console.print(machine(report))


def _show_batch(report: dict[str, Any]) -> None:
    """One batch of `minivllm bench throughput`, beside transformers if it ran too."""
    console = SafeConsole(highlight=True)
    title = f"{report['model']}, {report['dtype']}: {report['workload']['num_requests']} requests, "
    table = Table(
        title=title + f"{report['prompt_tokens']} prompt + {report['output_tokens']} output tokens"
    )
    for column in ("", "seconds (min…max)", "output tokens/s", "minivllm is faster by"):
        table.add_column(column, justify="left" if not column else "right")
    for name, result in report["results"].items():
        seconds, rate = result["seconds"], result["output_tokens_per_second"]["median"]
        times = f"{seconds['median']:.3f} ({seconds['min']:.3f}…{seconds['max']:.3f})"
        ratio = result.get("minivllm_is_faster_by")
        ratio_text = (
            ""
            if ratio is None
            else f"{ratio['median']:.2f} × ({ratio['min']:.2f}…{ratio['max']:.2f})"
        )
        table.add_row(name, times, f"{rate:,.0f}", ratio_text)
    console.print(table)
    if "floor" in report:
        floor, ours = report["floor"], report["results"]["minivllm"]["seconds"]["median"]
        console.print(
            f"Floor: {floor['flops'] / 1e9:.1f} GFLOP of matrix products in {floor['steps']} steps"
            f" take {floor['seconds']:.3f} s here by themselves"
            f" ({floor['flops'] / floor['seconds'] / 1e9:.0f} GFLOP/s); minivllm takes"
            f" {ours / floor['seconds']:.2f} × that."
        )
    if "speculation" in report:
        console.print(acceptance_line(report["speculation"]))
    if "step_parts" in report:
        parts = ", ".join(
            f"{name} {share:.0%}" for name, share in report["step_parts"].items() if share >= 0.005
        )
        console.print(f"Where the time goes: {parts}.")
    console.print(f"{machine(report)}.")


def acceptance_line(found: dict[str, Any]) -> str:
    """What became of the proposals of speculative decoding."""
    shares = ", ".join(f"{share:.0%}" for share in found["accepted_per_position"])
    return (
        f"Speculation: {found['accepted']:,} of {found['proposed']:,} proposed tokens accepted in"
        f" {found['drafts']:,} verifications (per position: {shares or 'none'})."
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}"


def _range(spread: dict[str, Any], digits: int = 3) -> str:
    return (
        f"{spread['median']:,.{digits}f} ({spread['min']:,.{digits}f}…{spread['max']:,.{digits}f})"
    )


def _failed(table: Table, name: str, row: dict[str, Any]) -> bool:
    if "failed" in row:
        table.add_row(name, Text(row["failed"][:100], style="red"))
    return "failed" in row


def _rates(rates: dict[str, float]) -> str:
    read, matmul = rates["read_bytes_per_second"] / 1e12, rates["matmul_flops_per_second"] / 1e12
    return f"reads {read:.3g} TB/s, multiplies {matmul:.3g} TFLOP/s"


def _kernels(report: dict[str, Any]) -> Iterable[Table]:
    table = _table(
        f"Kernels, {report['shape']}, {report['dtype']}; the machine {_rates(report['rates'])}",
        "kernel",
        "case",
        "variant",
        "µs (min…max)",
        "TB/s",
        "TFLOP/s",
        "of the floor",
        "differs by",
    )
    last = None
    for row in report["rows"]:
        head = (row["kernel"], row["case"])
        if head != last:
            table.add_section()
        names = head if head != last else ("", "")
        last = head
        if "failed" in row:
            table.add_row(*names, row["variant"], Text(row["failed"][:80], style="red"))
            continue
        times = f"{row['median_us']:,.1f} ({row['min_us']:,.1f}…{row['max_us']:,.1f})"
        table.add_row(
            *names,
            row["variant"],
            times,
            f"{row['tb_per_s']:.3f}" if "tb_per_s" in row else "",
            f"{row['tflops']:.3g}" if "tflops" in row else "",
            f"{row['share_of_floor']:.0%}",
            f"{row['differs_from_ours']:.1e}" if "differs_from_ours" in row else "",
        )
    yield table


def _throughput(report: dict[str, Any]) -> Iterable[Table]:
    start = report["start"]
    table = _table(
        f"Throughput, {report['model']}, {report['dtype']}; engine ready in"
        f" {start['engine_seconds']:.1f} s, first token after {start['first_token_seconds']:.1f} s;"
        f" the machine {_rates(report['rates'])}",
        "case",
        "seconds (min…max)",
        "output tokens/s",
        "prompt tokens/s",
        "floor, s",
        "of the floor",
    )
    for name, row in report["cases"].items():
        if not _failed(table, name, row):
            rates = [row[f"{kind}_tokens_per_second"]["median"] for kind in ("output", "prompt")]
            floor = f"{row['floor']['seconds']:.3f}"
            table.add_row(
                name,
                _range(row["seconds"]),
                *(f"{r:,.0f}" for r in rates),
                floor,
                f"{row['share_of_floor']:.0%}",
            )
    yield table


def _latency(report: dict[str, Any]) -> Iterable[Table]:
    table = _table(
        f"Latency, {report['model']}: milliseconds, median / p90 / p99",
        "requests at once",
        "first token (TTFT)",
        "between tokens (TPOT)",
        "output tokens/s",
    )
    for row in report["serving"]:
        if not _failed(table, str(row["batch"]), row):
            times = [
                " / ".join(_ms(row[kind][q]) for q in ("median", "p90", "p99"))
                for kind in ("ttft", "tpot")
            ]
            table.add_row(str(row["batch"]), *times, _range(row["output_tokens_per_second"], 0))
    yield table
    table = _table(
        "How a decode step grows", "running", "context", "step, ms: median / p90", "tokens/s"
    )
    for row in [*report["growth_with_requests"], *report["growth_with_context"]]:
        if not _failed(table, str(row["running"]), row):
            step = " / ".join(_ms(row["step_seconds"][q]) for q in ("median", "p90"))
            table.add_row(
                str(row["running"]), f"{row['context']:,}", step, f"{row['tokens_per_second']:,.0f}"
            )
    yield table
    row = report["shared_prefix"]
    table = _table(
        "First tokens of requests that share a prefix",
        "requests",
        "distinct, s",
        "shared, s",
        "faster by",
    )
    if not _failed(table, "", row):
        name = f"{row['requests']} × ({row['prefix_tokens']} + {row['own_tokens']})"
        distinct, shared, ratio = (
            _range(row[k]) for k in ("distinct_seconds", "shared_seconds", "faster_by")
        )
        table.add_row(name, distinct, shared, ratio)
    yield table


def _breakdown(report: dict[str, Any]) -> Iterable[Table]:
    table = _table(
        f"A decode step, {report['model']}: milliseconds",
        "running",
        "overlap",
        "graphs",
        "step",
        "kernels",
        "gaps",
        "exposed CPU",
        "GPU idle",
        "the CPU's parts",
    )
    for row in report["rows"]:
        name = str(row["running"])
        how = ["on" if row[key] else "off" for key in ("overlap", "graphs")]
        if "median_step_ms" not in row:
            table.add_row(name, *how, Text(row["failed"][:80], style="red"))
            continue
        parts = ", ".join(f"{part} {ms:.2f}" for part, ms in row["cpu_ms"].items() if ms >= 0.005)
        gpu = [
            f"{row[k]:.3f}" if k in row else "" for k in ("kernels_ms", "gaps_ms", "exposed_cpu_ms")
        ]
        idle = f"{row['gpu_idle_share']:.0%}" if "gpu_idle_share" in row else ""
        table.add_row(name, *how, f"{row['median_step_ms']:.3f}", *gpu, idle, parts)
    yield table
    for row in report["rows"]:
        if named := row.get("kernels") or row.get("operations"):
            overlap, graphs = ("on" if row[key] else "off" for key in ("overlap", "graphs"))
            title = f"{row['running']} running, overlap {overlap}, graphs {graphs}: by name"
            table = _table(title, "name", "calls a step", "µs a step", "share")
            for entry in named[:15]:
                values = (
                    f"{entry['calls_per_step']:.1f}",
                    f"{entry['us_per_step']:,.1f}",
                    f"{entry['share']:.1%}",
                )
                table.add_row(entry["name"], *values)
            yield table


def _streams(report: dict[str, Any]) -> Iterable[Table]:
    table = _table(
        f"A step of streams with text, {report['model']}, without the model: CPU milliseconds",
        "running",
        "step",
        "p99",
        "p99 / median",
        "µs a request",
        "collector runs",
        "parts",
    )
    for row in report["rows"]:
        name = str(row["running"])
        if "step_seconds" not in row:
            table.add_row(name, Text(row["failed"][:80], style="red"))
            continue
        step = row["step_seconds"]
        parts = ", ".join(f"{part} {ms:.2f}" for part, ms in row["cpu_ms"].items() if ms >= 0.005)
        table.add_row(
            name,
            f"{1e3 * step['median']:.2f}",
            f"{1e3 * step['p99']:.2f}",
            f"{row['p99_by_median']:.2f}",
            f"{row['us_per_request']:.1f}",
            str(row["collector_runs"]),
            parts,
        )
    yield table


def _roofline(report: dict[str, Any]) -> Iterable[Table]:
    table = _table(
        f"Floor of {report['model']}, {report['dtype']}, where the machine"
        f" {_rates(report['rates'])}: seconds",
        "case",
        "steps",
        "layers",
        "head",
        "decode attention",
        "prefill attention",
        "floor",
        "measured",
        "reached",
    )
    for name, row in report["cases"].items():
        floor = row["floor"]
        parts = [f"{part['seconds']:.3f}" for part in floor["parts"].values()]
        measured = f"{row['measured_seconds']:.3f}" if "measured_seconds" in row else ""
        share = f"{row['share_of_floor']:.0%}" if "share_of_floor" in row else ""
        table.add_row(name, str(floor["steps"]), *parts, f"{floor['seconds']:.3f}", measured, share)
    yield table


def _serve(report: dict[str, Any]) -> Iterable[Table | Text]:
    settings = report["settings"]
    lengths = " + ".join("…".join(map(str, settings[kind])) for kind in ("input", "output"))
    has_slo = bool(settings["slo"])
    is_compared = any("offline" in point for point in report["points"])
    targets = ", ".join(f"{name} ≤ {1e3 * most:g} ms" for name, most in settings["slo"].items())
    table = _table(
        f"A server under load, {report['model']}: {lengths} tokens",
        "load",
        "answered",
        "requests/s",
        "output tokens/s",
        "prompt tokens/s",
        *([f"{targets}", "good requests/s"] if has_slo else []),
        *(["LLM.generate: tokens/s", "the server's share"] if is_compared else []),
        "busiest client",
    )
    times = _table(
        "Latency: milliseconds, median / p90 / p99",
        "load",
        "first token (TTFT)",
        "per token (TPOT)",
        "gap between chunks",
        "end to end",
    )
    for point in report["points"]:
        name = load_name(point)
        good = point.get("goodput")
        kept = [f"{good['share']:.0%}", f"{good['requests_per_second']:,.2f}"] if good else []
        if is_compared:
            own = point.get("offline")
            rate = _range(own["output_tokens_per_second"], 0) if own else ""
            kept += [rate, f"{own['share']:.0%}" if own else ""]
        table.add_row(
            name,
            f"{point['completed']:,} of {point['planned']:,}",
            f"{point['requests_per_second']:,.2f}",
            f"{point['output_tokens_per_second']:,.0f}",
            f"{point['prompt_tokens_per_second']:,.0f}",
            *kept,
            f"{max(point['busy']):.0%}",
        )
        found = [point[kind] for kind in ("ttft", "tpot", "gap", "end_to_end")]
        times.add_row(
            name,
            *(
                " / ".join(_ms(spread[q]) for q in ("median", "p90", "p99")) if spread else ""
                for spread in found
            ),
        )
    yield table
    yield times
    for text, is_warning in remarks(report):
        yield Text(text, style="red" if is_warning else "")


def _speculate(report: dict[str, Any]) -> Iterable[Table]:
    table = _table(
        f"Speculation: {report['model']} with {report['draft']}, {report['context']} tokens of"
        f" context, {'with' if report['graphs'] else 'without'} CUDA graphs: milliseconds",
        "requests",
        "proposals",
        "plain step",
        "verifying",
        "the draft",
        "in plain steps",
        "pays from",
        "without a draft",
    )
    for row in report["costs"]:
        name, k = f"{row['requests']}", f"{row['num_speculative_tokens']}"
        if "failed" in row:
            table.add_row(name, k, Text(row["failed"][:80], style="red"))
            continue
        times = [
            _ms(row[part]["median"]) if (part := f"{kind}_seconds") in row else ""
            for kind in ("plain", "verify", "draft")
        ]
        shares = [
            "never" if row[key] is None else f"{row[key]:.0%} accepted"
            for key in ("pays_from", "pays_from_without_draft")
        ]
        table.add_row(name, k, *times, f"{row['cost']:.2f}", *shares)
    yield table
    if not report["texts"]:
        return
    table = _table(
        "Texts of the bundled model: tokens/s",
        "texts",
        "temperature",
        "requests",
        "method",
        "without",
        "with",
        "speed-up",
        "accepted",
        "tokens a step",
        "same tokens",
    )
    for row in report["texts"]:
        head = [row["texts"], f"{row['temperature']}", f"{row['requests']}", row["method"]]
        if "failed" in row:
            table.add_row(*head, Text(row["failed"][:80], style="red"))
            continue
        rates = [f"{row[key]['median']:,.0f}" for key in _RATES]
        accepted = ["" if row[key] is None else f"{row[key]:.2f}" for key in _ACCEPTED]
        same = "yes" if row["same_tokens"] else "NO"
        table.add_row(*head, *rates, _range(row["speed_up"], 2), *accepted, same)
    yield table


_RATES = ("plain_tokens_per_second", "tokens_per_second")
_ACCEPTED = ("share_accepted", "tokens_per_step")


def _quality(report: dict[str, Any]) -> Iterable[Table]:
    title = f"{report['model']}, {report['engine']['dtype']}: {report['positions']:,} tokens of "
    table = _table(
        title + report["text"],
        "",
        "perplexity",
        "same greedy token",
        "KL, nats",
        "weights of blocks, MB",
        "KV, bytes per token",
    )
    base = report["rows"][0]["perplexity"]
    for row in report["rows"]:
        name = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        table.add_row(
            name or "full numbers",
            f"{row['perplexity']:.4f} ({row['perplexity'] / base - 1:+.2%})",
            f"{row['agreement']:.2%}",
            f"{row['kl']:.2e}",
            f"{row['block_weight_bytes'] / 1e6:,.1f}",
            f"{row['kv_bytes_per_token']:,}",
        )
    yield table


def _replicas(report: dict[str, Any]) -> Iterable[Table]:
    trace = report["settings"]["trace"]
    columns = ("hit rate", "of at most", "TTFT ms", "90%", "later turns", "imbalance", "seconds")
    table = _table(
        f"{report['model']}: {trace['conversations']} conversations,"
        f" {report['settings']['replicas']} replicas, {report['environment']['cores']} cores",
        "router",
        *columns,
        "requests",
    )
    for name, found in report["routers"].items():
        if found.get("ttft") is None:
            table.add_row(name, Text(str(found["problem"])))
            continue
        later = found["ttft_later_turns"]
        table.add_row(
            name,
            f"{found['hit_rate']:.3f}",
            f"{found['best_hit_rate']:.3f}",
            f"{1e3 * found['ttft']['median']:.0f}",
            f"{1e3 * found['ttft']['p90']:.0f}",
            "" if later is None else f"{1e3 * later['median']:.0f}",
            f"{found['imbalance']:.2f}",
            f"{found['seconds']:.1f}",
            f"{found['completed']} of {found['requests']}",
        )
    yield table
    if not report["scale"]:
        return
    columns = ("output tokens/s", "of one", "TTFT ms", "TPOT ms")
    title = f"{report['settings']['clients']} clients in a closed loop"
    table = _table(title, "replicas", *columns)
    base = report["scale"][0]
    for found in report["scale"]:
        rate = found["output_tokens_per_second"]
        ratio = rate / base["output_tokens_per_second"] if base["output_tokens_per_second"] else 0.0
        times = [
            "" if found[name] is None else f"{1e3 * found[name]['median']:.1f}"
            for name in ("ttft", "tpot")
        ]
        table.add_row(str(found["replicas"]), f"{rate:,.0f}", f"{ratio:.2f} ×", *times)
    yield table


_TABLES = {
    "kernels": _kernels,
    "throughput": _throughput,
    "latency": _latency,
    "breakdown": _breakdown,
    "streams": _streams,
    "roofline": _roofline,
    "serve": _serve,
    "speculate": _speculate,
    "quality": _quality,
    "replicas": _replicas,
}
