"""What the TPU compiler expects one guided SD1.5 UNet step to cost on a v5e, found without a TPU.

    pip install --target /tmp/tpu --no-deps 'libtpu==0.0.42.*'
    TPU_LIBRARY_PATH=/tmp/tpu/libtpu/libtpu.so python benchmarks/tpu_estimate.py

Four images with guidance: batch 8, bfloat16, 64x64 latents, the text's keys and values computed
before. XLA writes the cycles that it expects beside every kernel of the optimised program; they
are added up, loops times their trip count. Kernels without an estimate (Pallas) are listed, so that
nothing is counted as free unseen. (libtpu installed beside jax makes every jax program look for a
TPU, hence the separate folder.)
"""

import argparse
import collections
import os
import re
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

CLOCK = 1.5e9  # v5e: 197 TFLOP/s = 4 MXUs * 128 * 128 * 2 * 1.5 GHz
PEAK = 197e12
KINDS = ("attn1", "attn2", "/ff/", "norm", "conv", "proj")

SD15 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def step(batch: int, dtype: str):
    """Return the UNet's function and its abstract arguments."""
    from sdjax.models.unet import UNet

    unet = UNet.from_config(SD15)
    x = jax.ShapeDtypeStruct((batch, 64, 64, 4), dtype)
    text = jax.ShapeDtypeStruct((batch, 77, 768), dtype)
    t = jax.ShapeDtypeStruct((), jnp.float32)
    params = jax.eval_shape(unet.init, jax.random.key(0), x, t, text)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), params)
    context = jax.eval_shape(lambda p, c: unet.apply(p, c, method="project_context"), params, text)

    return lambda p, x, t, c: unet.apply(p, x, t, c), (params, x, t, context)


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(body|condition|to_apply|calls)=%?([\w.\-]+)")


def parse(hlo: str):
    """Split HLO text in computations of (name, opcode, line); return them and the entry's name."""
    computations, entry, current = {}, None, None
    for line in hlo.splitlines():
        head = _HEAD.match(line)
        if head and not line.startswith(" "):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            opcode = _OPCODE.search(found[2])
            current.append((found[1], opcode[1] if opcode else "?", line))
    return computations, entry


def trips(condition: list) -> int | None:
    """Return how often a loop runs that counts from 0 up to a constant."""
    constants = {
        name: int(found[1])
        for name, opcode, line in condition
        if opcode == "constant" and (found := re.search(r"constant\((\d+)\)", line))
    }
    for _, opcode, line in condition:
        if opcode == "compare" and "direction=LT" in line and len(constants) == 1:
            return next(iter(constants.values()))
    return None


def cycles(hlo: str):
    """Return (cycles, times, opcode, name, line) of the kernels that run, and those without."""
    computations, entry = parse(hlo)
    rows, unknown = [], []

    def walk(name, times):
        for instruction, opcode, line in computations.get(name, []):
            found = re.search(r'"estimated_cycles":"?(\d+)', line)
            called = dict(_CALLED.findall(line))
            if opcode == "while":
                count = trips(computations[called["condition"]])
                if count is None:
                    unknown.append((times, opcode, instruction, line))
                walk(called["body"], times * (count or 1))
            elif opcode in ("call", "async-start") and not found:
                for kind in ("to_apply", "calls"):
                    if kind in called:
                        walk(called[kind], times)
            elif found:
                rows.append((int(found[1]), times, opcode, instruction, line))
            elif opcode == "custom-call" and re.search("AllocateBuffer|ConcatBitcast", line):
                continue
            elif opcode in ("fusion", "custom-call", "convolution", "dot", "conditional"):
                unknown.append((times, opcode, instruction, line))

    walk(entry, 1)
    return rows, unknown


def source(line: str) -> str:
    """Return the operation's name in the program, without its jit prefix."""
    found = re.search(r'op_name="([^"]*)"', line)
    return found[1][-70:] if found else ""


def report(hlo: str, flops: float, top: int) -> float:
    """Print the sum and the dearest kernels; return milliseconds."""
    rows, unknown = cycles(hlo)
    total = sum(c * n for c, n, *_ in rows)
    kinds = collections.Counter()
    for c, n, opcode, _, line in rows:
        path = source(line)
        kind = next((k for k in KINDS if k in path), "other")
        kinds[opcode, kind] += c * n
    for key, c in kinds.most_common(14):
        print(f"  {c / CLOCK * 1e3:8.2f} ms  {key[0]:12} {key[1]}")
    print("dearest kernels:")
    for c, n, _, name, line in sorted(rows, key=lambda r: -r[0] * r[1])[:top]:
        shape = re.search(r"= (\(?\w+\[[\d,]*\](?:\{[^}]*\})?)", line)
        kind = shape[1][:44] if shape else ""
        print(f"  {c * n / CLOCK * 1e3:7.3f} ms x{n:<4} {name[:34]:34} {kind:44} {source(line)}")
    print(f"kernels with an estimate: {len(rows)}; without: {len(unknown)}")
    for times, opcode, name, line in unknown[:20]:
        print(f"  no estimate: x{times} {opcode} {name} {source(line)}")
    milliseconds = total / CLOCK * 1e3
    limit = flops / PEAK * 1e3
    print(f"estimate {milliseconds:.1f} ms a step; {limit:.1f} ms at {PEAK / 1e12:.0f} TFLOP/s")
    return milliseconds


def main() -> None:
    """Compile, add up, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--top", type=int, default=25)
    parser.add_argument("--hlo", help="write the optimised program here")
    args = parser.parse_args()
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    f, arguments = step(args.batch, args.dtype)
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), arguments
    )
    start = time.perf_counter()
    compiled = jax.jit(f, out_shardings=device).lower(*arguments).compile()
    print(f"compiled in {time.perf_counter() - start:.0f} s")
    hlo = compiled.as_text()
    if args.hlo:
        with open(args.hlo, "w") as file:
            file.write(hlo)
    report(hlo, 803e9 * args.batch, args.top)


if __name__ == "__main__":
    main()
