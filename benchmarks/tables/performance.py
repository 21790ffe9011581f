"""The tables of docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .columns import Column, Row, Rows, cell, label, one, rows_of, table

PEAK_TFLOPS = {"FP8": 1979, "BF16": 989}  # of an H100 SXM
LINEARS = {"qkv": (11520, 3840), "out": (3840, 3840), "w1": (10240, 3840), "w2": (3840, 10240)}

FORWARD = ("image", "images", "caption_tokens")


def image_label(rows: Rows) -> str:
    row = rows[0]
    text = f"{row['image']}x{row['image']}"
    if row["images"] > 1:
        text += f", batch of {row['images']}"
    return (
        text if row["caption_tokens"] == 128 else f"{text}, {row['caption_tokens']} caption tokens"
    )


def forwards(results: str, modes: Sequence[str]) -> str:
    """Compare forwards in some modes with the peer's: time, speed-up, memory."""

    def speedup(mode: str) -> Callable[[Rows], str]:
        def show(rows: Rows) -> str:
            ours, peer = one(rows, mode=mode), one(rows, mode="diffusers")
            assert ours is not None and peer is not None
            return f"{ours.get('speedup', peer['ms'] / ours['ms']):.2f}"

        return show

    columns = [
        Column("image", image_label, right=False),
        Column("peer", cell("{ms:.1f}", mode="diffusers")),
    ]
    for mode in modes:
        columns.append(Column(f"`{mode}`", cell("{ms:.1f}", mode=mode)))
        columns.append(Column("", speedup(mode)))
    columns.append(Column("peer GB", cell("{peak_gb:.1f}", mode="diffusers")))
    columns += [Column(f"`{mode}`", cell("{peak_gb:.1f}", mode=mode)) for mode in modes]
    return table(rows_of(results, part="forward"), FORWARD, columns)


def transformer() -> str:
    return forwards("transformer", ("fp8", "weight-only"))


def int8_forwards() -> str:
    return forwards("transformer-h200", ("fp8", "int8", "weight-only"))


def goals() -> str:
    rows = rows_of("transformer")

    def value(column: str, **where: Any) -> float:
        (row,) = (row for row in rows if column in row and where.items() <= row.items())
        return float(row[column])

    def seconds(found: float, goal: float) -> str:
        return f"{found:.1f} s" if found <= goal else f"**{found:.1f} s**"

    load = value("seconds", part="load")
    host = value("host_mib", part="load")
    starts = [value("seconds", part="start", mode=mode) for mode in ("fp8", "weight-only")]
    png = value("seconds", part="generate", mode="all parts kept", stage="PNG")
    kept = value("peak_gb", part="generate", mode="all parts kept")
    offload = value("peak_gb", part="generate", mode="--offload")
    return f"""\
| | goal | measured |
| --- | ---: | ---: |
| loading 6.2 GiB to the GPU, file in the page cache (1.6 s on another machine) | 4 s | {seconds(load, 4)} |
| host memory above the process's own while loading | 1024 MiB | {host:.0f} MiB |
| start of the process to the end of 8 steps at 1024x1024, transformer alone: `fp8`, `weight-only` | 10 s | {", ".join(seconds(s, 10) for s in starts)} |
| the same by `generate`, to the PNG written | 10 s | {seconds(png, 10)} |
| peak device memory of `generate`, all parts kept (text encoder of 2 layers) | | {kept:.1f} GB |
| the same with `--offload` | 8 GB and the largest part | {offload:.1f} GB |
"""  # noqa: E501


def builds(part: str) -> list[Row]:
    """Compare a build without kernels and one with them."""
    return [
        {**row, "build": build}
        for build in ("torch", "kernels")
        for row in rows_of(f"transformer-by-{build}", part=part)
    ]


def without_kernels() -> str:
    def ratio(mode: str) -> Callable[[Rows], str]:
        def show(rows: Rows) -> str:
            slow, fast = (one(rows, build=build, mode=mode) for build in ("torch", "kernels"))
            return f"{slow['ms'] / fast['ms']:.2f}" if slow and fast else "-"

        return show

    columns = [Column("image", image_label, right=False)]
    for mode in ("fp8", "weight-only"):
        columns.append(Column(f"`{mode}` by torch", cell("{ms:.1f}", mode=mode, build="torch")))
        columns.append(Column("by the kernels", cell("{ms:.1f}", mode=mode, build="kernels")))
        columns.append(Column("", ratio(mode)))
    return table(builds("forward"), FORWARD, columns)


def without_kernels_generate() -> str:
    columns = [Column("`generate`", label("by {build}"), right=False)]
    for mode, title in (("all parts kept", "all parts kept"), ("--offload", "`--offload`")):
        columns.append(Column(f"{title}, s", cell("{seconds:.1f}", mode=mode)))
        columns.append(Column("GB", cell("{peak_gb:.1f}", mode=mode)))
    return table(builds("generate"), ["build"], columns)


def profile() -> str:
    def emphasised(pattern: str) -> Callable[[Rows], str]:
        def show(rows: Rows) -> str:
            text = pattern.format_map(rows[0])
            return f"**{text}**" if rows[0]["kernel"] == "kernels" else text

        return show

    columns = [
        Column("work", emphasised("{kernel}"), right=False),
        Column("ms", emphasised("{ms:.2f}")),
        Column("launches", emphasised("{launches}")),
    ]
    return table(rows_of("transformer", part="profile"), ["kernel"], columns)


def fused_gemm(results: str = "fused_gemm") -> str:
    names = {11520: "qkv, `rotate_heads`", 20480: "w1 and w3, `silu_multiply`"}

    def way(*names: str) -> Callable[[Rows], str]:
        return lambda rows: next(
            f"{row['us']:.1f}" for name in names if (row := one(rows, way=name))
        )

    columns = [
        Column("tokens", label("{tokens}")),
        Column("", lambda rows: names[rows[0]["rows"]], right=False),
        Column("cuBLASLt's GEMM alone", way("cuBLASLt alone")),
        Column("and the kernel after it", way("cuBLASLt, rotate_heads", "cuBLASLt, silu_multiply")),
        Column("GEMM with fused epilogue", way("gemm_rotate_heads", "gemm_silu_multiply alone")),
        Column(
            "and `quantize_rows`", way("gemm_rotate_heads", "gemm_silu_multiply, quantize_rows")
        ),
    ]
    return table(rows_of(results), ["tokens", "rows"], columns)


def fused_gemm_h200() -> str:
    return fused_gemm("fused_gemm-h200")


def fused_gemm_halves() -> str:
    return fused_gemm("fused_gemm-halves-h200")


def errors(results: str = "transformer") -> str:
    columns = [
        Column("", label("{mode}"), right=False),
        Column("output", label("{output_error:.4f}")),
        Column("final latents", label("{latents_error:.4f}")),
    ]
    return table(rows_of(results, part="errors"), ["mode"], columns)


def int8_errors() -> str:
    return errors("transformer-h200")


TIME_AND_SHARE = "{us:.1f} us, {percent} %"


def with_percent(rows: Iterable[Row]) -> list[Row]:
    return [{**row, "percent": round(100 * row["share"])} for row in rows if "share" in row]


def fused_kernel(rows: Rows) -> str:
    name = rows[0]["operation"]
    return "encoding the result of attention" if " " in name else f"`{name}`"


def int8_fused() -> str:
    formats = ("row-scaled", "int8")
    columns = [Column("kernel", fused_kernel, right=False)]
    columns += [Column(each, cell(TIME_AND_SHARE, format=each)) for each in formats]
    rows = [row for row in with_percent(rows_of("fused-h200")) if row.get("format") in formats]
    return table(rows, ["operation"], columns)


def fused() -> str:
    columns = [
        Column("kernel", fused_kernel, right=False),
        Column("result in", label("{format}"), right=False),
        Column("ours", cell(TIME_AND_SHARE, by="ours")),
        Column("torch.compile", cell(TIME_AND_SHARE, by="torch compile")),
    ]
    return table(with_percent(rows_of("fused")), ["operation", "format"], columns)


def codec() -> str:
    columns = [
        Column("matrix of", label("{dtype}"), right=False),
        Column("shape", label("{shape}"), right=False),
    ]
    for operation in ("quantize", "dequantize"):
        for by, title in (("ours", operation), ("comfy-kitchen", "comfy-kitchen")):
            columns.append(Column(title, cell(TIME_AND_SHARE, operation=operation, by=by)))
    return table(with_percent(rows_of("codec")), ["dtype", "shape"], columns)


def microseconds(name: str, digits: int = 2) -> Callable[[Rows], str]:
    return cell(f"{{us:.1f}} ({{ratio:.{digits}f}})", way=name)


def of_peak(name: str, peak: str) -> Callable[[Rows], str]:
    """Show the share of the chip's specified rate."""

    def show(rows: Rows) -> str:
        row = one(rows, way=name)
        assert row is not None
        n, k = LINEARS[row["linear"]]
        return f"{2 * row['m'] * n * k / row['us'] / 1e6 / PEAK_TFLOPS[peak]:.0%}".replace(
            "%", " %"
        )

    return show


def of_copy(name: str) -> Callable[[Rows], str]:
    """Show the share of a device copy's bandwidth: codes and scales of the weights, A and D."""
    (copy,) = rows_of("gemm", way="device copy")

    def show(rows: Rows) -> str:
        row = one(rows, way=name)
        assert row is not None
        n, k = LINEARS[row["linear"]]
        moved = n * k * 33 / 32 + 2 * row["m"] * (n + k)
        return f"{moved / row['us'] / 1e6 / copy['bandwidth']:.0%}".replace("%", " %")

    return show


MIXED, DEQUANTIZE = "mixed_sm90, BF16 x MXFP8", "dequantize, BF16 x MXFP8"
BF16 = Column("cuBLAS BF16", cell("{us:.1f}", way="cuBLAS BF16"))
SCALED_MM = Column("`_scaled_mm` FP8", microseconds("torch._scaled_mm"))
FP8_ROWWISE = Column("`fp8_rowwise`", microseconds("fp8_rowwise"))
ENCODING = Column("`fp8_rowwise`, and encoding A", microseconds("fp8_rowwise + quantize_rows"))
LINEAR = Column("linear", label("{linear}"), right=False)
TOKENS = Column("M", label("{m}"))


def gemm_large() -> str:
    columns = [
        *(LINEAR, BF16, SCALED_MM, FP8_ROWWISE),
        Column("of peak", of_peak("fp8_rowwise", "FP8")),
        ENCODING,
        Column("`mixed_sm90`, BF16 x MXFP8", microseconds(MIXED, 3)),
        Column("of peak", of_peak(MIXED, "BF16")),
        Column("`dequantize`, BF16 x MXFP8", microseconds(DEQUANTIZE, 3)),
        Column("`dequantize`, MXFP8 x MXFP8", microseconds("dequantize, MXFP8 x MXFP8")),
    ]
    return table(rows_of("gemm", m=4224), ["linear"], columns)


def gemm_of(tokens: Sequence[int], columns: Sequence[Column]) -> str:
    rows = [row for row in rows_of("gemm") if row.get("m") in tokens]
    return table(rows, ["m", "linear"], [TOKENS, LINEAR, BF16, SCALED_MM, *columns])


def gemm_few() -> str:
    columns = [
        *(FP8_ROWWISE, ENCODING, Column("`mixed_sm90`, BF16 x MXFP8", microseconds(MIXED))),
        Column("of copy", of_copy(MIXED)),
        Column("`dequantize`, BF16 x MXFP8", microseconds(DEQUANTIZE)),
    ]
    return gemm_of((128, 32), columns)


def gemm_between() -> str:
    columns = [
        *(FP8_ROWWISE, Column("`mixed_sm90`, BF16 x MXFP8", microseconds(MIXED))),
        Column("`dequantize`, BF16 x MXFP8", microseconds(DEQUANTIZE)),
    ]
    return gemm_of((2048, 1024), columns)


def int8_gemms() -> str:
    ways = {
        "cuBLAS BF16": "cuBLAS BF16",
        "`_scaled_mm` FP8": "torch._scaled_mm",
        "`_int_mm` INT8, sums alone": "torch._int_mm",
        "`fp8_rowwise`": "fp8_rowwise",
        "`int8_sm90`": "int8_sm90",
        "`int8_sm80`": "int8_sm80",
    }
    columns = [TOKENS, LINEAR]
    columns += [Column(title, microseconds(way)) for title, way in ways.items()]
    return table(rows_of("gemm-h200"), ["m", "linear"], columns)


def int8_adapters() -> str:
    columns = [
        Column("addition", label("{with}"), right=False),
        Column("mode", label("{mode}"), right=False),
        Column("ms", label("{ms:.1f}")),
        Column("of the forward without", label("{ratio:.2f}")),
    ]
    rows = [row for row in rows_of("additions-h200") if "ratio" in row]
    return table(rows, ["with", "mode"], columns)


def comfyui() -> str:
    ways = {
        "ComfyUI": "ComfyUI",
        "with the backend": "ComfyUI with the backend",
        "with the node": "the node",
        "without ComfyUI": "own",
    }
    columns = [Column("image", label("{image}x{image}"), right=False)]
    columns.append(Column("LoRAs", label("{loras}")))
    columns += [Column(title, cell("{ms:.1f}", by=by)) for title, by in ways.items()]
    columns.append(Column("node / without ComfyUI", cell("{to_own:.2f}", by="the node")))
    return table(rows_of("comfyui-h200"), ["image", "loras"], columns)


def ranks() -> str:
    columns = [
        Column("image", label("{image}x{image}"), right=False),
        Column("items", label("{items}")),
        Column("mode", label("`{mode}`"), right=False),
        Column("one GPU (ms)", cell("{ms:.1f}", devices=1)),
        Column("two GPUs (ms)", cell("{ms:.1f}", devices=2)),
        Column("speed-up", cell("{speedup:.2f}", devices=2)),
        Column("one GPU (GB)", cell("{peak_gb:.1f}", devices=1)),
        Column("first of two (GB)", cell("{peak_gb:.1f}", devices=2)),
    ]
    rows = rows_of("ranks-h200", exchange="keys and values, in memory of peers")
    rows.sort(key=lambda row: (row["image"], row["items"]))
    return table(rows, ["items", "image", "mode"], columns)


def rank_exchanges() -> str:
    columns = [
        Column("exchange", label("{exchange}"), right=False),
        *(
            Column(f"{side}x{side}, `{mode}`", cell("{ms:.1f}", image=side, mode=mode))
            for mode in ("fp8", "weight-only", "int8")
            for side in (1024, 2048)
        ),
    ]
    return table(rows_of("ranks-h200", devices=2, items=1), ["exchange"], columns)


def _load_label(rows: Rows) -> str:
    load = rows[0]["load"]
    return load if isinstance(load, str) else f"{load:g} of the capacity"


def _requests_per_second(rows: Rows) -> str:
    return f"{rows[0].get('offered', rows[0].get('rate')):.2f}"


def serving() -> str:
    columns = [
        Column("replicas", label("{replicas}")),
        Column("load", _load_label, right=False),
        Column("requests/s", _requests_per_second),
        Column("per replica / of one", cell("{per_replica:.2f}", load="two clients per replica")),
        Column("median (s)", label("{p50:.2f}")),
        Column("99th percentile (s)", label("{p99:.1f}")),
        Column("refused", lambda rows: f"{100 * rows[0]['refused']:.0f} %"),
        Column("requests", label("{requests}")),
    ]
    return table(rows_of("serving-h200"), ["replicas", "load"], columns)


def convert() -> str:
    columns = [
        Column("program", label("{program}"), right=False),
        Column("wall, median (s)", label("{wall:.1f}")),
        Column("CPU (s)", label("{cpu:.1f}")),
        Column("peak memory (MiB)", label("{peak:.0f}")),
        Column("speed-up", label("{speedup:.1f}x")),
    ]
    return table(rows_of("convert"), ["program"], columns)


def analyses() -> str:
    def span(name: str) -> Callable[[Rows], str]:
        def show(rows: Rows) -> str:
            low, high = rows[0][name], rows[0].get(f"{name}_highest")
            return f"{low:g}" if high is None else f"{low:g} to {high:g}"

        return show

    columns = [
        Column("program", label("{program}"), right=False),
        Column("wall (s)", span("wall")),
        Column("CPU, user (s)", span("cpu")),
        Column("peak memory (MiB)", label("{peak}")),
    ]
    return table(rows_of("analyses"), ["program"], columns)


def lora() -> str:
    def share(name: str) -> Callable[[Rows], str]:
        def show(rows: Rows) -> str:
            return " / ".join(f"{row[name]:.2f}" for row in rows)

        return show

    return table(
        rows_of("lora"),
        ["way"],
        [
            Column("adapter", label("{way}"), right=False),
            Column("error of the change of the weights", share("weights")),
            Column("of the change of the output", share("change")),
            Column("of the output", share("output")),
        ],
    )


def additions() -> str:
    fused = [{"way": "added by the GEMM", **row} for row in rows_of("adapters-fused")]
    apart = [{**row, "way": "apart"} for row in rows_of("additions")]
    measured = [row for row in [*fused, *apart] if "ratio" in row]
    return table(
        measured,
        ["with", "mode", "way"],
        [
            Column("addition", label("{with}"), right=False),
            Column("mode", label("{mode}"), right=False),
            Column("branch", label("{way}"), right=False),
            Column("ms", label("{ms:.1f}")),
            Column("of the forward without", label("{ratio:.2f}")),
            Column(
                "peak (GB)",
                lambda rows: f"{rows[0]['peak_gb']:.2f}" if "peak_gb" in rows[0] else "-",
            ),
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    "transformer": transformer,
    "goals": goals,
    "without-kernels": without_kernels,
    "without-kernels-generate": without_kernels_generate,
    "profile": profile,
    "fused-gemm": fused_gemm,
    "fused-gemm-h200": fused_gemm_h200,
    "fused-gemm-halves": fused_gemm_halves,
    "errors": errors,
    "fused": fused,
    "codec": codec,
    "int8-forwards": int8_forwards,
    "int8-errors": int8_errors,
    "int8-gemms": int8_gemms,
    "int8-fused": int8_fused,
    "int8-adapters": int8_adapters,
    "gemm-large": gemm_large,
    "gemm-few": gemm_few,
    "gemm-between": gemm_between,
    "convert": convert,
    "analyses": analyses,
    "additions": additions,
    "comfyui": comfyui,
    "ranks": ranks,
    "rank-exchanges": rank_exchanges,
    "serving": serving,
    "lora": lora,
}
