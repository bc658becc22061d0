"""The record as text."""

from collections.abc import Iterator, Mapping
from typing import Any

GIB = 2**30
SHOWN = ("torch", "transformers", "peft", "bitsandbytes")


def good(record: Mapping[str, Any]) -> bool:
    """Whether every part was measured and every check of exactness held."""
    wanted = record["settings"]["parts"]
    parts = record["parts"]
    return all(
        part in parts and parts[part]["status"] == "measured" and parts[part].get("passed", True)
        for part in wanted
    )


def text(record: Mapping[str, Any]) -> str:
    """Return everything that is printed."""
    lines = list(_head(record))
    for part in record["settings"]["parts"]:
        lines += ["", *_part(part, record["parts"].get(part))]
    return "\n".join(lines)


def _head(record: Mapping[str, Any]) -> Iterator[str]:
    settings, machine = record["settings"], record["machine"] or {}
    versions = record["versions"]
    named = [machine.get("name") or "no device"]
    if "capability" in machine:
        named += [
            f"{machine['total_memory'] / GIB:.1f} GiB",
            f"capability {machine['capability']}",
            f"CUDA {machine['cuda']}",
            f"driver {machine['driver'] or 'unknown'}",
        ]
    yield ", ".join(named)
    if machine.get("native_bfloat16") is False:
        yield "this GPU has no bfloat16 of its own: figures in bfloat16 are those of an emulation"
    yield ", ".join(f"{name} {versions[name] or '(none)'}" for name in SHOWN) + (
        f"; commit {versions['git']}" if versions["git"] else ""
    )
    yield (
        f"{'a tiny shape: the figures mean nothing' if settings['tiny'] else 'ChatGLM2-6B shape'}, "
        f"random weights, seed {settings['seed']}; cap {settings['cap']:g} GiB; batch "
        f"{settings['batch']}, {settings['rounds']} rounds of at most {settings['steps']} steps; "
        f"{record['started']}"
    )


def _part(part: str, result: Mapping[str, Any] | None) -> Iterator[str]:
    if result is None:
        yield f"{part}: not run"
        return
    if result["status"] != "measured":
        yield f"{part}: {result['status']}: {result.get('reason', 'no reason is known')}"
    if "checks" in result:
        yield from _checks(result)
        return
    if "parameters" in result:
        count = result["parameters"]
        memory = result.get("memory_of_model")
        yield f"{part}: {count['total']:,} parameters, {count['trainable']:,} learn" + (
            f"; {memory / GIB:.2f} GiB before the first batch" if memory else ""
        )
    for corpus, measured in result.get("corpora", {}).items():
        for name in ("sides", "generate", "generate_wide", "score", "score_wide"):
            if name not in measured:
                continue
            one = measured if name == "sides" else measured[name]
            yield from _sides(
                f"{corpus}, {measured['rows']}" + ("" if name == "sides" else f", {name}"), one
            )
        if "same_tokens" in measured:
            same = measured["same_tokens"]
            yield "  generated tokens alike: " + (f"{same:.1%}" if same is not None else "unknown")
        losses = measured.get("first_losses", {})
        if "relative_difference" in losses:
            yield f"  first losses differ by {losses['relative_difference']:.1e}, relative"
        elif losses:
            yield f"  first losses: {losses['status']}: {losses['message']}"


def _checks(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"exact (float32, small model): {'passed' if result['passed'] else 'FAILED'}"
    for check in result["checks"]:
        value = "not finite" if check["value"] is None else f"{check['value']:.1e}"
        yield (
            f"  {check['check']:55}{value:>10}  bound {check['bound']:.0e}"
            + ("" if check["passed"] else "  FAILED")
        )


def _sides(title: str, measured: Mapping[str, Any]) -> Iterator[str]:
    title = f"{title}, {measured['batch']} rows"
    yield (
        f"  {title:50}{'examples/s':>11}{'min':>9}{'max':>9}{'tokens':>9}{'peak GiB':>10}"
        f"{'held GiB':>10}{'rows a pass':>13}"
    )
    for name, side in measured["sides"].items():
        if side["status"] != "measured":
            yield f"    {name:48}{side['status']}, one row a pass"
            continue
        rate, memory = side["examples_per_second"], side["peak_memory"] or {}
        shown = [
            f"{memory[key] / GIB:10.2f}" if key in memory else f"{'-':>10}"
            for key in ("allocated", "reserved")
        ]
        yield (
            f"    {name:48}{rate['median']:11.2f}{rate['min']:9.2f}{rate['max']:9.2f}"
            f"{side['tokens_per_step']:9.0f}{''.join(shown)}{side['micro_batch']:13}"
        )
    first = next(iter(measured["sides"]))
    for name, ratio in measured["ratios"].items():
        yield (
            f"    {first} / {name}: {ratio['median']:.2f}x ({ratio['min']:.2f} to "
            f"{ratio['max']:.2f})"
        )
