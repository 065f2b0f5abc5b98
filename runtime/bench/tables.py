"""Results of benchmarks as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Result = Mapping[str, Any]


def show_generate(result: Result, console: Console | None = None) -> None:
    """Plain and forked side by side, then steps by number of rows."""
    console = console or Console(highlight=False)
    console.print(escape(result["engine"]["detail"]))
    for key, title in (("all", "all replies"), ("forked", "replies that forked")):
        if result[key] is None:
            console.print(f"{title}: none")
        else:
            console.print(_comparison(result[key], title))
            if result["drafts"]:
                console.print(_drafted(result, key, title))
    flow = result["throughput"]
    plain, forked = (f"{flow[mode]['tokens_per_second']:.1f}" for mode in ("plain", "forked"))
    console.print(
        f"throughput with {result['settings']['concurrency']} in flight: {plain} tokens/s plain, "
        f"{forked} with branches ({flow['gain']:.2f}x)"
    )
    show_steps(result, console)
    console.print(machine_line(result["machine"]))


def show_steps(result: Result, console: Console) -> None:
    """Decode steps by number of rows, and the bandwidth that they are held against."""
    table = new_table("decode steps by live rows")
    for name in ("rows", "steps", "ms (median)", "tokens/s", "% of bandwidth bound"):
        table.add_column(name, justify="right")
    for step in result["step"]:
        bound, rate = step["percent_of_bandwidth_bound"], step["tokens_per_second"]
        table.add_row(str(step["rows"]), str(step["steps"]), f"{step['ms']:.3f}", f"{rate:.1f}", f"{bound:.1f}")
    console.print(table)
    limit = result["bandwidth"]
    console.print(
        f"bound: {limit['weight_bytes_per_step'] / 1e6:.1f} MB of weights a step at "
        f"{limit['read_bytes_per_second'] / 1e9:.1f} GB/s, read by {limit['threads']} threads in this run"
    )


def show_drafts(result: Result, console: Console | None = None) -> None:
    """Rules by requests in flight."""
    console = console or Console(highlight=False)
    table = new_table(
        f"{result['method']} drafts, {result['prompts']} prompts, steps bound by memory up to "
        f"{result['memory_bound_tokens']} tokens"
    )
    for name in ("in flight", "drafts", "steps", "tokens a step", "tokens a pass", "accepted", "seconds"):
        table.add_column(name, justify="left" if name == "drafts" else "right")
    for run in result["runs"]:
        table.add_row(
            str(run["concurrency"]),
            run["rule"],
            f"{run['steps']:,d}",
            f"{run['tokens_per_step']:.2f}",
            f"{run['tokens_per_pass']:.2f}",
            f"{run['accepted_share']:.0%}",
            f"{run['seconds']:.2f}",
        )
    console.print(table)
    console.print("all texts are the same" if result["same_texts"] else "the texts differ")
    console.print(machine_line(result["machine"]))


def show_host(result: Result, console: Console | None = None) -> None:
    """Parts of a step's host cost."""
    console = console or Console(highlight=False)
    table = new_table(f"host cost of a step, {result['rows']} rows, median of {result['steps']} steps")
    table.add_column()
    table.add_column("microseconds", justify="right")
    for name, key in (
        ("schedule + commit", "host_us_per_step"),
        ("  schedule", "schedule_us"),
        ("  commit", "commit_us"),
        ("  10th percentile of both", "host_us_p10"),
        ("  99th percentile of both", "host_us_p99"),
        ("  both where branches are born", "fork_step_us"),
        ("both in a busy server", "busy_us_per_step"),
        ("  its tokens noted for texts", "note_us_per_step"),
        ("  its texts as messages, in another thread", "message_us_per_step"),
        (f"sample ({result['vocab_size']} logits a row)", "sample_us"),
        ("replay, in place of the model", "replay_us"),
    ):
        value = result[key]
        table.add_row(name, "-" if value is None else f"{value:.1f}")
    console.print(table)
    console.print(machine_line(result["machine"]))


def show_replay(result: Result, console: Console | None = None) -> None:
    """What a replayed workload took, in virtual time."""
    console = console or Console(highlight=False)
    chosen, model = result["settings"], result["settings"]["cost_model"]
    rate = chosen["requests_per_second"]
    load = f"{chosen['concurrency']} in flight" if rate is None else f"{rate:g} a second"
    title = f"{result['requests']} replies of {chosen['workload']}, {load}, fork policy {chosen['fork_policy']}"
    table = new_table(escape(title))
    table.add_column()
    for name in ("mean", "p50", "p90", "p99"):
        table.add_column(name, justify="right")
    for name, key in (("latency, s", "latency"), ("time to first token, s", "time_to_first_token")):
        table.add_row(name, *(f"{result[key][part]:.3f}" for part in ("mean", "p50", "p90", "p99")))
    console.print(table)
    rate_of, good, saved, level = (
        result["throughput"],
        result["goodput"],
        result["blocks_saved"],
        chosen["service_level"],
    )
    table = new_table("in all")
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    forked = result["step_reduction_forked"]
    denied = result["forks_denied"]
    for row in (
        ("text tokens", f"{result['tokens']:,d}", f"in {result['steps']:,d} steps of {result['mean_rows']:.1f} rows"),
        ("text tokens / steps of a request", f"{result['step_reduction']:.3f}", f"{result['request_steps']:,d} steps"),
        ("  of answers with details", "-" if forked is None else f"{forked:.3f}", ""),
        ("tokens a second", f"{rate_of['tokens_per_second']:,.0f}", f"in {result['duration']:.1f} s"),
        ("requests a second", f"{rate_of['requests_per_second']:.2f}", ""),
        (
            "  within the service level",
            f"{good['requests_per_second']:.2f}",
            f"{good['share']:.1%}; first token in {level['first_token_seconds']:g} s, "
            f"end in {level['latency_factor']:g}x of alone and unforked",
        ),
        ("KV blocks, mean", f"{result['mean_blocks']:,.0f}", f"of {chosen['kv_blocks']:,d}"),
        ("KV blocks, peak", f"{result['peak_blocks']:,d}", ""),
        ("  saved by sharing, mean", f"{saved['mean']:,.0f}", f"at most {saved['peak']:,d}"),
        ("tokens attended", f"{result['tokens_attended']:,d}", ""),
        ("K/V tokens read", f"{result['kv_tokens_read']:,d}", f"{result['kv_tokens_of_rows']:,d} row by row"),
        ("forks", f"{result['forks']:,d}", ""),
        ("forks denied", f"{sum(denied.values()):,d}", ", ".join(f"{name} {n:,d}" for name, n in denied.items())),
        ("pauses", f"{result['pauses']:,d}", "steps that branches sat out"),
        ("preemptions", f"{result['preemptions']:,d}", ""),
    ):
        table.add_row(*row)
    if chosen["same_prompts"]:
        table.add_row("prompt tokens found in the cache", f"{result['tokens_cached']:,d}", "")
    if chosen["host_blocks"]:
        swapped = f"{result['blocks_swapped_in']:,d} back, over {chosen['host_blocks']:,d} host blocks"
        table.add_row("blocks swapped out", f"{result['blocks_swapped_out']:,d}", swapped)
        table.add_row("tokens computed again", f"{result['tokens_recomputed']:,d}", "")
    console.print(table)
    console.print(escape(f"times are those of the cost model {model['name']}, not of a device"))


def show_foresight(result: Result, console: Console | None = None) -> None:
    """Fork policies beside schedules that know more, and the bound."""
    console = console or Console(highlight=False)
    chosen, bound = result["settings"], result["bound"]
    rate = chosen["requests_per_second"]
    load = f"{chosen['concurrency']} in flight" if rate is None else f"{rate:g} a second"
    table = new_table(escape(f"{result['requests']} replies of {chosen['workload']}, {load}, in virtual time"))
    table.add_column()
    for name in ("turned away", "goodput", "in time", "requests/s", "of always"):
        table.add_column(name, justify="right")
    always = result["always"]["goodput"]
    lines = [("always", result["always"]), ("adaptive", result["adaptive"])]
    lines += [("adaptive, told who has most work", entry) for entry in result["adaptive_told_the_heaviest"]]
    lines += [("all answers known", entry) for entry in result["all_known"]]
    for name, entry in lines:
        table.add_row(
            name,
            f"{entry['given_up']:.0%}" if "given_up" in entry else "",
            f"{entry['goodput']:.2f}",
            f"{entry['share']:.1%}",
            f"{entry['requests_per_second']:.2f}",
            f"{entry['goodput'] / always:.2f}x" if always else "-",
        )
    console.print(table)
    console.print(
        f"no schedule with these forks exceeds {bound['requests_per_second']:.2f} requests/s: "
        f"{bound['seconds']:.2f} s at least, by {bound['due_to']}"
    )


def show_serve(result: Result, console: Console | None = None) -> None:
    """A service under load, and beside it the runtime alone where it was measured."""
    console = console or Console(highlight=False)
    chosen = result["settings"]
    title = f"{result['target']}: {chosen['requests']} requests a line, {chosen['max_tokens']} tokens each at most"
    table = new_table(escape(title))
    table.add_column("in flight", no_wrap=True)
    for name in ("tokens/s", "first token", "next piece", "answer", "more/token"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in result["records"]:
        for way in ("service", "runtime"):
            if way in record:
                part, more = record[way], record.get("overhead_us_per_token")
                name = f"{record['streams']}, {'no forks' if record['mode'] == 'plain' else 'forks'}"
                times = [
                    f"{part[k]['p50']:.1f} / {part[k]['p99']:.1f}" for k in ("first_token_ms", "between_pieces_ms")
                ]
                table.add_row(
                    name if way == "service" else "  runtime alone",
                    f"{part['tokens_per_second']:,.0f}",
                    *times,
                    f"{part['answer_ms']['p50']:.0f}",
                    "" if way == "runtime" or more is None else f"{more:.0f} us",
                )
    console.print(table)
    console.print("milliseconds, p50 / p99; a piece may hold several tokens, where they come faster than they are sent")
    console.print(machine_line(result["machine"]))


def machine_line(machine: Result) -> str:
    """What it was measured on, on one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    isa = machine["isa"] or "no native kernels"
    load = "" if machine["load_average"] is None else f", load {machine['load_average']}"
    return escape(f"{machine['cpu']}, {machine['usable_cores']} cores, {isa}{load}; {versions}")


def _comparison(part: Result, title: str) -> Table:
    table = new_table(f"{title} ({part['replies']})")
    for name in ("", "no forks", "forks", "same reply, plain", "gain"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    plain, forked, same = part["plain"], part["forked"], part["same_reply_plain"]

    def row(name: str, key: str, form: str, *more: str) -> None:
        table.add_row(name, format(plain[key], form), format(forked[key], form), *more)

    row("tokens", "tokens", ",d", f"{forked['tokens']:,d}")
    row("steps", "steps", ",d", f"{same['steps']:,d}", f"{part['step_gain']:.2f}x")
    row("seconds", "seconds", ".3f", f"{same['seconds']:.3f}", f"{part['wall_gain']:.2f}x")
    table.add_row("gain in time / in steps", "", "", "", f"{part['wall_gain_per_step_gain']:.2f}")
    row("tokens a step", "tokens_per_step", ".2f", "1.00")
    row("ms a token", "ms_per_token", ".3f")
    row("ms a decode step", "ms_per_decode_step", ".3f")
    row("branches a reply", "branches_per_reply", ".1f")
    row("peak KV blocks, mean", "mean_peak_kv_blocks", ".1f")
    row("peak KV blocks, largest", "max_peak_kv_blocks", "d")
    return table


def _drafted(result: Result, key: str, title: str) -> Table:
    """Modes with drafts beside those without, over some replies."""
    part, modes = result[key], list(result["drafts"])
    table = new_table(f"{title}, with drafts")
    for name in ("", "plain", "fork", *(mode.replace("forked+", "fork +\n").replace(" m", "\nm") for mode in modes)):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)

    def row(name: str, key: str, form: str, *first: str) -> None:
        table.add_row(name, *first, *(format(part[mode][key], form) for mode in modes))

    for name, key, form in (
        ("steps", "steps", ",d"),
        ("tokens a step", "tokens_per_step", ".2f"),
        ("seconds", "seconds", ".3f"),
        ("ms a step after the first", "ms_per_decode_step", ".3f"),
    ):
        row(name, key, form, *(format(part[mode][key], form) for mode in ("plain", "forked")))
    row("gain in time", "wall_gain", ".2f", "1.00", f"{part['wall_gain']:.2f}")
    for name, key in (("draft tokens a draft", "tokens_per_draft"), ("tokens a branch and step", "acceptance_length")):
        table.add_row(name, "", "", *(f"{result['drafts'][mode][key]:.2f}" for mode in modes))
    return table


def new_table(title: str) -> Table:
    """A table as all measurements print them."""
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False)
