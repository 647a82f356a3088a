"""The PTX every primitive becomes: opcode and order of operands. Runs where nvcc is found."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
R, F = r"%r\d+", r"%f\d+|%r\d+"

# name, call in the kernel, pattern; p: global u32*, f: global float*, d/a/r: fragments; s: shared pointer
GOLDEN = [
    ("named_sync", "named_sync(p[0], p[1])", rf"bar\.sync \s*{R}, {R};"),
    ("named_arrive", "named_arrive(p[0], p[1])", rf"bar\.arrive \s*{R}, {R};"),
    ("cp_async16", "cp_async16(s, f, p[0])", rf"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16, {R};"),
    ("cp_async8", "cp_async8(s, f, p[0])", rf"cp\.async\.ca\.shared\.global \[%r\d+\], \[%rd\d+\], 8, {R};"),
    ("cp_async4", "cp_async4(s, f, p[0])", rf"cp\.async\.ca\.shared\.global \[%r\d+\], \[%rd\d+\], 4, {R};"),
    ("cp_async_commit", "cp_async_commit()", r"cp\.async\.commit_group;"),
    ("cp_async_wait", "cp_async_wait<3>()", r"cp\.async\.wait_group 3;"),
    ("ex2", "f[0] = ex2(f[1])", rf"ex2\.approx\.ftz\.f32 (?:{F}), (?:{F});"),
    ("rcp", "f[0] = rcp(f[1])", rf"rcp\.approx\.ftz\.f32 (?:{F}), (?:{F});"),
    ("tanh_approx", "f[0] = tanh_approx(f[1])", rf"tanh\.approx\.f32 (?:{F}), (?:{F});"),
    ("to_tf32", "p[0] = to_tf32(f[1])", rf"cvt\.rna\.tf32\.f32 {R}, (?:{F});"),
    ("byte_perm", "p[0] = byte_perm(p[1], p[2], p[3])", rf"prmt\.b32 {R}, {R}, {R}, {R};"),
    ("add_f16x2", "p[0] = add_f16x2(p[1], p[2])", rf"add\.rn\.f16x2 {R}, {R}, {R};"),
    ("add_bf16x2", "p[0] = add_bf16x2(p[1], p[2])",
     rf"(?s)mov\.[bu]32 \s*(?P<one>%r\d+), 1065369472;.*fma\.rn\.bf16x2 {R}, {R}, (?P=one), {R};"),
    ("movmatrix_trans", "p[0] = movmatrix_trans(p[1])", rf"movmatrix\.sync\.aligned\.m8n8\.trans\.b16 {R}, {R};"),
    ("load_if", "f[0] = load_if(f + 1, p[0] == 3)",
     rf"setp\.ne\.u32 p, {R}, 0;\s*mov\.f32 (?P<to>%f\d+|%r\d+), 0f00000000;\s*@p ld\.global\.f32 (?P=to), \[%rd\d+\];"),
    ("store16", "u32 own[4] = {p[3], p[2], p[1], p[0]}; store16(s, own)",
     rf"st\.global\.v4\.u32 \[%rd\d+\], \{{{R}, {R}, {R}, {R}\}};"),
    ("ld_acquire", "p[0] = ld_acquire(p + 1)", rf"ld\.acquire\.gpu\.global\.u32 {R}, \[%rd\d+\];"),
    ("st_release", "st_release(p, p[1])", rf"st\.release\.gpu\.global\.u32 \[%rd\d+\], {R};"),
    ("red_release_add", "red_release_add(p, p[1])", rf"red\.release\.gpu\.global\.add\.u32 \[%rd\d+\], {R};"),
]
GOLDEN += [
    (f"stmatrix_x4{_trans}", f"for (int i = 0; i < 4; ++i) r4[i] = p[i]; stmatrix_x4{_trans}(s, r4)",
     rf"stmatrix\.sync\.aligned\.m8n8\.x4{_dot}\.shared\.b16 \[%r\d+\], \{{{R}, {R}, {R}, {R}\}};")
    for _trans, _dot in (("", ""), ("_trans", r"\.trans"))
]
GOLDEN += [
    ("cluster_rank", "p[0] = cluster_rank()", rf"mov\.u32 {R}, %cluster_ctarank;"),
    ("cluster_size", "p[0] = cluster_size()", rf"mov\.u32 {R}, %cluster_nctarank;"),
    ("cluster_sync", "cluster_sync()", r"barrier\.cluster\.arrive\.release;[^;]*barrier\.cluster\.wait\.acquire;"),
    ("remote_store", "remote_store((u32*)s, p[0], p[1])",
     r"mapa\.shared::cluster\.u32 (%r\d+), %r\d+, %r\d+;[^;]*st\.shared::cluster\.u32 \[%r\d+\], %r\d+;"),
    ("remote_load", "p[2] = remote_load((u32*)s, p[0])",
     r"mapa\.shared::cluster\.u32 (%r\d+), %r\d+, %r\d+;[^;]*ld\.shared::cluster\.u32 %r\d+, \[\1\];"),
]
for _count in (1, 2, 4):
    for _trans in ("", "_trans"):
        _list = ", ".join([R] * _count)
        GOLDEN.append((
            f"ldmatrix_x{_count}{_trans}",
            f"ldmatrix_x{_count}{_trans}(r{_count}, s); for (int i = 0; i < {_count}; ++i) p[i] = r{_count}[i]",
            rf"ldmatrix\.sync\.aligned\.m8n8\.x{_count}{_trans.replace('_', chr(92) + '.')}\.shared\.b16 "
            rf"\{{{_list}\}}, \[%r\d+\];",
        ))
# Operands by the order in which the kernel loads them: distinct addresses, so that a swap is seen.
MMA = {"mma_bf16": ("m16n8k16", "bf16"), "mma_f16": ("m16n8k16", "f16"), "mma_tf32": ("m16n8k8", "tf32")}
PACK = {"pack_bf16x2": "bf16x2", "pack_f16x2": "f16x2"}


def source():
    kernels = [(name, call) for name, call, _ in GOLDEN]
    kernels += [
        (name, f"for (int i = 0; i < 4; ++i) d[i] = vf[i]; for (int i = 0; i < 4; ++i) a[i] = vp[4 + i]; "
               f"u32 b0 = vp[8], b1 = vp[9]; {name}(d, a, b0, b1); for (int i = 0; i < 4; ++i) vf[i] = d[i]")
        for name in MMA
    ]
    kernels += [(name, f"float low = vf[0], high = vf[1]; p[2] = {name}(low, high)") for name in PACK]
    body = "\n".join(
        f'extern "C" __global__ void k_{name}(u32* p, float* f) {{ unsigned char* s = dynamic_shared(); '
        f"volatile u32* vp = p; volatile float* vf = f; u32 r1[1], r2[2], r4[4], a[4]; float d[4]; "
        f"(void)s; (void)vp; (void)vf; (void)r1; (void)r2; (void)r4; (void)a; (void)d; {call}; }}"
        for name, call in kernels
    )
    return f'#include "cuda/prim/store16.h"\nusing namespace prim;\n{body}\n'


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    if NVCC is None:
        pytest.skip("nvcc not found")
    folder = tmp_path_factory.mktemp("ptx")
    (folder / "golden.cu").write_text(source())
    subprocess.run(
        [NVCC, "-std=c++17", "-arch=compute_90", "-ptx", f"-I{ROOT}", "-o", folder / "golden.ptx", folder / "golden.cu"],
        check=True, timeout=120,
    )
    text = (folder / "golden.ptx").read_text()
    kernels = re.findall(r"\.entry k_(\w+)\((.*?)\n\}", text, re.S)
    assert len(kernels) == len(GOLDEN) + len(MMA) + len(PACK)
    return dict(kernels)


@pytest.mark.parametrize(("name", "pattern"), [(name, pattern) for name, _, pattern in GOLDEN])
def test_instruction(ptx, name, pattern):
    assert len(re.findall(pattern, ptx[name])) == 1, ptx[name]


def loaded_from(text):
    """Register -> byte offset of its load."""
    return {reg: int(offset or 0) for reg, offset in re.findall(
        r"ld\.volatile\.global\.\w+\s+(%\w+), \[%rd\d+(?:\+(\d+))?\];", text)}


@pytest.mark.parametrize("name", MMA)
def test_product(ptx, name):
    shape, kind = MMA[name]
    found = re.findall(
        rf"mma\.sync\.aligned\.{shape}\.row\.col\.f32\.{kind}\.{kind}\.f32 "
        r"\{(.*?)\}, \{(.*?)\}, \{(.*?)\}, \{(.*?)\};", ptx[name])
    assert len(found) == 1, ptx[name]
    d, a, b, c = (group.split(", ") for group in found[0])
    place = loaded_from(ptx[name])
    assert len(d) == 4 and [place[reg] for reg in a + b] == [16, 20, 24, 28, 32, 36]
    moved = dict(re.findall(r"mov\.[bf]32\s+(%\w+), (%\w+);", ptx[name]))
    assert [place[moved.get(reg, reg)] for reg in c] == [0, 4, 8, 12]


@pytest.mark.parametrize("name", PACK)
def test_pack(ptx, name):
    found = re.findall(rf"cvt\.rn\.{PACK[name]}\.f32 %r\d+, (%\w+), (%\w+);", ptx[name])
    place = loaded_from(ptx[name])
    assert [[place[reg] for reg in pair] for pair in found] == [[4, 0]], ptx[name]  # upper half first
