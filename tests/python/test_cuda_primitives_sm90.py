"""The PTX of the sm_90a primitives, with every register replaced by what it was made from. Runs where nvcc is found."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")

# In the kernels: s shared memory, dst = s + 1024, src = s + 2048, bar = s + 8; m the tensor map, 64 bytes into the
# parameter h; v the volatile u32 of the parameter p (v[i] is "pi" below), w its u64 (w[i] is "p.u64:i"); f floats.
LOAD = "cp.async.bulk.tensor.{}d.shared::cluster.global.mbarrier::complete_tx::bytes"
BULK = "cp.async.bulk.shared::cluster.{}.mbarrier::complete_tx::bytes"

GOLDEN = {
    "mbar_init(bar, v[0])": "mbarrier.init.shared::cta.b64 [s+8], p0;",
    "mbar_inval(bar)": "mbarrier.inval.shared::cta.b64 [s+8];",
    "fence_mbar_init()": "fence.mbarrier_init.release.cluster;",
    "mbar_arrive(bar)": "mbarrier.arrive.shared::cta.b64 _, [s+8];",
    "mbar_arrive_expect_tx(bar, v[0])": "mbarrier.arrive.expect_tx.shared::cta.b64 _, [s+8], p0;",
    "mbar_expect_tx(bar, v[0])": "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [s+8], p0;",
    "p[9] = mbar_test(bar, v[0])": "mbarrier.test_wait.parity.shared::cta.b64 p, [s+8], p0;",
    "mbar_wait(bar, v[0])": "mbarrier.try_wait.parity.shared::cta.b64 p, [s+8], p0;",
    "mbar_wait_cluster(bar, v[0])": "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [s+8], p0;",
    "mbar_arrive_remote(bar, v[0])": "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [far(s+8,p0)];",
    "cp_async_mbar_arrive(bar)": "cp.async.mbarrier.arrive.shared::cta.b64 [s+8];",
    "cp_async_mbar_arrive_noinc(bar)": "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [s+8];",
    "fence_proxy_async()": "fence.proxy.async.shared::cta;",
    "fence_proxy_async_all()": "fence.proxy.async;",
    "tma_store_commit()": "cp.async.bulk.commit_group;",
    "tma_store_wait_read<2>()": "cp.async.bulk.wait_group.read 2;",
    "tma_store_wait<1>()": "cp.async.bulk.wait_group 1;",
    "tma_prefetch(m)": "prefetch.tensormap [h+64];",
    "bulk_load(dst, f, v[4], bar)": BULK.format("global") + " [s+1024], [f], p4, [s+8];",
    "u32 rank = v[0]; bulk_copy_remote(dst, rank, src, v[4], bar)":
        BULK.format("shared::cta") + " [far(s+1024,p0)], [s+2048], p4, [far(s+8,p0)];",
    "u32 rank = v[0]; st_async((u32*)dst, rank, v[4], bar)":
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [far(s+1024,p0)], p4, [far(s+8,p0)];",
    "u32 rank = v[0]; u32 x[4] = {v[1], v[2], v[3], v[4]}; st_async_x4((u32*)dst, rank, x, bar)":
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 "
        "[far(s+1024,p0)], {p1, p2, p3, p4}, [far(s+8,p0)];",
    "u32 rank = v[0]; u32 x[4] = {v[1], v[2], v[3], v[4]}; remote_store_x4((u32*)dst, rank, x)":
        "st.shared::cluster.v4.u32 [far(s+1024,p0)], {p1, p2, p3, p4};",
    "p[9] = elect_one()": "elect.sync _|p, 0xffffffff;",
    "wgmma_fence()": "wgmma.fence.sync.aligned;",
    "wgmma_commit()": "wgmma.commit_group.sync.aligned;",
    "wgmma_wait<3>()": "wgmma.wait_group.sync.aligned 3;",
    "set_max_registers_up<240>()": "setmaxnreg.inc.sync.aligned.u32 240;",
    "set_max_registers_down<24>()": "setmaxnreg.dec.sync.aligned.u32 24;",
}
for _n in (2, 3, 4):
    _load = "; ".join(f"int c{i} = v[{i}]" for i in range(_n))
    _c = ", ".join(f"c{i}" for i in range(_n))
    _p = ", ".join(f"p{i}" for i in range(_n))
    GOLDEN[f"{_load}; tma_load_{_n}d(dst, m, {_c}, bar)"] = f"{LOAD.format(_n)} [s+1024], [h+64, {{{_p}}}], [s+8];"
    GOLDEN[f"{_load}; tma_load_{_n}d_multicast(dst, m, {_c}, bar, (u16)v[7])"] = (
        f"{LOAD.format(_n)}.multicast::cluster [s+1024], [h+64, {{{_p}}}], [s+8], p7;")
    GOLDEN[f"{_load}; tma_store_{_n}d(m, src, {_c})"] = (
        f"cp.async.bulk.tensor.{_n}d.global.shared::cta.bulk_group [h+64, {{{_p}}}], [s+2048];")
for _n in (8, 16, 32, 64, 128, 192, 256):
    for _kind in ("bf16", "f16"):
        _start = (f"float d[{_n // 2}]; for (int i = 0; i < {_n // 2}; ++i) d[i] = vf[i]; u64 wa = w[40]; u64 wb = w[41]; "
                  "u32 a[4] = {v[1], v[2], v[3], v[4]}; u32 more = v[7]; ")
        _end = f"; for (int i = 0; i < {_n // 2}; ++i) vf[i] = d[i]; (void)wa; (void)a"
        _opcode = f"wgmma.mma_async.sync.aligned.m64n{_n}k16.f32.{_kind}.{_kind}"
        _d = ", ".join(f"f{i}" for i in range(_n // 2))
        for _a in (0, 1):
            for _b in (0, 1):
                GOLDEN[f"{_start}wgmma_{_kind}<{_n}, {_a}, {_b}>(d, wa, wb, more != 0){_end}"] = (
                    f"{_opcode} {{{_d}}}, p.u64:40, p.u64:41, p7, 1, 1, {_a}, {_b};")
            GOLDEN[f"{_start}wgmma_{_kind}_rs<{_n}, {_a}>(d, a, wb, more != 0){_end}"] = (
                f"{_opcode} {{{_d}}}, {{p1, p2, p3, p4}}, p.u64:41, p7, 1, 1, {_a};")
CALLS = list(GOLDEN)


def source():
    body = "\n".join(
        f'extern "C" __global__ void __launch_bounds__(128, 1) k_{i}(const GRID_CONSTANT Holder h, u32* p, float* f) {{ '
        "unsigned char* s = dynamic_shared(); volatile u32* v = p; volatile u64* w = (volatile u64*)p; "
        "volatile float* vf = f; u64* bar = (u64*)(s + 8); auto* dst = s + 1024; auto* src = s + 2048; "
        "const TensorMap& m = h.m; (void)s; (void)v; (void)w; (void)vf; (void)bar; (void)dst; (void)src; (void)m; "
        f"{call}; }}"
        for i, call in enumerate(CALLS)
    )
    return f'#include "cuda/prim/prim.h"\nusing namespace prim;\nstruct Holder {{ u64 pad[8]; TensorMap m; }};\n{body}\n'


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    if NVCC is None:
        pytest.skip("nvcc not found")
    folder = tmp_path_factory.mktemp("ptx90")
    (folder / "golden.cu").write_text(source())
    subprocess.run(
        [NVCC, "-std=c++17", "-arch=compute_90a", "-ptx", f"-I{ROOT}", "-o", folder / "golden.ptx", folder / "golden.cu"],
        check=True, timeout=240,
    )
    kernels = re.split(r"\.entry k_\d+\(", (folder / "golden.ptx").read_text())[1:]
    assert len(kernels) == len(CALLS)
    return kernels


SIZES = {"u32": 4, "f32": 4, "u64": 8}


def origin(line, known):
    """(register, what it holds) for an instruction that moves or addresses, else None."""
    text = re.sub(r"%\w+|\bp\b", lambda r: known.get(r[0], r[0]), line)
    target = re.match(r"[\w.:]+\s+(%\w+|p),", line)
    if target is None:
        return None
    rules = [
        (r"ld\.param\.u64\s.*\[k_\d+_param_(\d)\];", lambda r: " pf"[int(r[1])]),
        (r"mov\.[bu]64\s.*, k_\d+_param_0;", lambda r: "h"),
        (r"mov\.u32\s.*prim_dynamic_shared\w*;", lambda r: "s"),
        (r"ld\.volatile\.global\.(\w+)\s.*\[(\w+)(?:\+(\d+))?\];",
         lambda r: r[2] + (".u64:" if r[1] == "u64" else "") + str(int(r[3] or 0) // SIZES[r[1]])),
        (r"add\.s(?:32|64)\s[^,]*, ([^,]+), (\d+);", lambda r: f"{r[1]}+{r[2]}"),
        (r"mapa\.shared::cluster\.u32\s[^,]*, ([^,]+), ([^,]+);", lambda r: f"far({r[1]},{r[2]})"),
        (r"(?:mov|cvta?)\.\S+\s+[^,]*, ([^,;]+);", lambda r: r[1]),
        (r"setp\.ne\.[bs]32\s[^,]*, ([^,]+), 0;", lambda r: r[1]),
        (r"selp\.u32\s[^,]*, 1, 0, ([^,;]+);", lambda r: r[1]),
    ]
    for pattern, value in rules:
        found = re.match(pattern, text)
        if found:
            return target[1], value(found)
    return None


def resolved(text):
    """The instructions of a kernel, registers replaced."""
    known, lines = {}, []
    for line in (line.strip() for line in text.split("\n")):
        lines.append(re.sub(r"%\w+", lambda r: known.get(r[0], r[0]), re.sub(r" p(?=, 1, 1)", lambda r: " " + known.get("p", "p"), line)))
        moved = origin(line, known)
        if moved:
            known[moved[0]] = moved[1]
    return lines


@pytest.mark.parametrize("index", range(len(CALLS)), ids=[re.sub(r"^.*; (?=\w+[<(])|; for.*$", "", c) for c in CALLS])
def test_instruction(ptx, index):
    lines = resolved(ptx[index])
    want = GOLDEN[CALLS[index]]
    opcode = want.split()[0].rstrip(";")
    assert [line for line in lines if line.split(" ")[0].rstrip(";") == opcode] == [want]


@pytest.mark.parametrize("call", ["p[9] = mbar_test(bar, v[0])", "p[9] = elect_one()"])
def test_answer(ptx, call):
    """The predicate becomes 1 or 0."""
    assert re.search(r"selp\.u32 %r\d+, 1, 0, p;", ptx[CALLS.index(call)])


@pytest.mark.parametrize("call", ["mbar_wait(bar, v[0])", "mbar_wait_cluster(bar, v[0])"])
def test_wait_loops(ptx, call):
    text = ptx[CALLS.index(call)]
    loop = re.search(r"(\$\w+):(.*)selp\.u32 (%r\d+), 1, 0, p;(.*)bra\s+\1;", text, re.S)
    assert loop and "try_wait" in loop[2]
    assert re.search(rf"setp\.eq\.s32\s+(%p\d+), {loop[3]}, 0;\s*@\1\s*$", loop[4])  # again while it is not done
