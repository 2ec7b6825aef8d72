# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""What Triton makes of the kernels of pairs for a GPU of compute capability 9.0, which need not be there."""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict

import pytest
import torch


pytest.importorskip("triton", reason="needs Triton")

KERNELS = ("pairs", "query_backward", "key_backward")
# Planes in R^r beside values of a size: 32, 64, 64 + 32, 64 + 64, and for projections 128 + 32 coordinates.
SIZES = [
    ("binet_cauchy", 8, 32),
    ("binet_cauchy", 8, 64),
    ("binet_cauchy", 8, 128),
    ("binet_cauchy", 10, 64),
    ("binet_cauchy", 12, 32),
    ("binet_cauchy", 12, 64),
    ("binet_cauchy", 16, 64),
    ("projection", 16, 32),
]


def compile_for_hopper(kernel: str, r: int, dv: int, name: str, segments: bool) -> str:
    """PTX of the kernel `name` of pairs with bfloat16 values."""
    import triton
    from triton.backends.compiler import GPUTarget

    from modeling_grassmann import grassmann_memory_triton as kernels

    query = torch.empty(1, 4096, 3, 2, r, device="meta")
    values = torch.empty(1, 4096, 3, dv, device="meta", dtype=torch.bfloat16)
    segment = torch.empty(1, 4096, device="meta", dtype=torch.int32) if segments else None
    function = getattr(kernels, f"{name}_kernel")
    constants = {**kernels.pairs_options(query, values, segment, kernel, num_blocks=64), "num_chunks": 1}
    # As Triton specialises what a contiguous row of segments has, or none.
    constants |= {"segment_token": 1} if segments else {"segment": None}
    coordinates = "*fp16" if kernels.coordinate_dtype(kernel, values.dtype) == torch.float16 else "*bf16"
    types = defaultdict(lambda: "i32", segment="*i32")
    types |= dict.fromkeys(("query", "key", "decayed_query", "decayed_key"), coordinates)
    types |= dict.fromkeys(("values", "output", "grad", "rounded_query", "rounded_key"), "*bf16")
    types |= dict.fromkeys(("grad_query", "grad_key", "grad_values"), "*bf16")
    types |= dict.fromkeys(("decays", "sums", "block_sums"), "*fp32")
    names = function.arg_names
    signature = {x: "constexpr" if x in constants else types[x] for x in names}
    aligned = [x for x in names if x not in constants and x != "num_heads"]
    source = triton.compiler.ASTSource(
        function,
        signature=signature,
        constexprs={x: value for x, value in constants.items() if x in names},
        attrs={(names.index(x),): [["tt.divisibility", 16]] for x in aligned},
    )
    options = kernels.launch_options(query, values, kernel, name)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def layouts_of_addresses(ptx: str) -> dict[str, int]:
    """
    Registers with an address of shared memory, and how many layouts products read it under: the upper two bits of a
    matrix descriptor.
    """
    layouts = defaultdict(set)
    for address, constant in re.findall(r"(?:or\.b64|add\.s64)\s+%rd\d+, (%rd\d+), (-?\d{16,});", ptx):
        layouts[address].add(int(constant) % 2**64 >> 62)
    return {address: len(found) for address, found in layouts.items()}


@pytest.fixture(scope="module")
def layouts():
    """[`layouts_of_addresses`] by size and kernel, from a process whose Triton compiles."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(map(str, size)))
def test_no_address_has_two_layouts(size, layouts):
    """The assembler of CUDA 12.8 takes the address under the second one from a register that nothing has written."""
    found = layouts[str(size)]
    assert len(found) == 2 * len(KERNELS)
    for counts in found.values():
        # Queries or keys, values and what is read of them in the loop, and once more.
        assert len(counts) >= 4
        assert set(counts.values()) == {1}, found


def test_two_layouts_are_found():
    ptx = """
        or.b64   %rd164, %rd207, 4611686293305294848;
        add.s64  %rd169, %rd207, -9223371899415822272;
        or.b64   %rd170, %rd208, 4611686293305294848;
    """
    assert layouts_of_addresses(ptx) == {"%rd207": 2, "%rd208": 1}


if __name__ == "__main__":
    found = defaultdict(dict)
    for size in SIZES:
        for name in KERNELS:
            for segments in (False, True):
                ptx = compile_for_hopper(*size, name, segments)
                found[str(size)][f"{name} {segments=}"] = layouts_of_addresses(ptx)
    print(json.dumps(found))
