"""What every kernel may take and must contain, and what a multiprocessor holds."""

from collections.abc import Callable
from dataclasses import dataclass

# The portable build: machine code for these two, PTX compute_80 for the others (the driver assembles it).
PORTABLE = ("sm_80", "sm_90a")

MMA = {"HMMA", "LDGSTS", "LDSM"}
VECTOR = {"LDG.128", "STG.128"}
WGMMA = {"HGMMA", "UTMALDG", "USETMAXREG", "SYNCS"}

FORBIDDEN = {"local", "float atomics"}


@dataclass(frozen=True)
class Budget:
    """Of one block on sm_80 or sm_90a; on the other targets only what the compiler must never do is checked."""

    kernel: str  # pattern of the whole name without template arguments
    threads: int | Callable  # template arguments -> their number
    registers: int
    shared_kib: float  # dynamic + static
    blocks: int = 1  # per multiprocessor, at least
    must: frozenset = frozenset()
    forbidden: frozenset = frozenset()
    only: tuple = PORTABLE  # elsewhere the kernel has no body
    products: Callable | None = None  # template arguments -> (kind, fewest, most) of the matrix instructions
    fewer: bool = False  # launches may have fewer threads than their bounds allow


def budget(kernel, threads, registers, shared_kib, blocks=1, must=(), forbidden=(), only=PORTABLE, products=None,
           fewer=False):
    forbidden = FORBIDDEN | frozenset(forbidden)
    return Budget(kernel, threads, registers, shared_kib, blocks, frozenset(must), forbidden, only, products, fewer)


def sweep_products(use, contraction, columns, planes):
    """Of one warp in eight and one chunk of 64 tokens: A S and the update of S, A B^T, P X. Two planes per number take
    three products. The normaliser and the halves of the causal mask may add a quarter."""
    a, x = int(contraction), int(columns)
    fewest = (2 * a * x + 64 * a + 64 * x) * 64 // (16 * 8 * 16) // 8 * (1 if planes == "1" else 3)
    return "HMMA", fewest, fewest * 5 // 4


def int8_products(number, tiles):
    """Of the steps of 64 columns that are on their way at once, four products each with every tile of x; a float32 number is
    three planes and half as many steps are on their way."""
    count = 4 * int(tiles) * (3 * 4 if number == "float" else 8)
    return "HMMA", count, count


def fixed_products(by_planes):
    """By the last template argument, the planes per number."""
    return lambda *arguments: ("HMMA", by_planes[arguments[-1]], by_planes[arguments[-1]])


def sweep_sm90_products(use, contraction, columns):
    """Of both consumers and one chunk of 128 tokens, 16 columns or tokens at a time: A S and A B^T of the own half by each
    and A B^T of the other half by one; P X of three halves; the update of S by its owners, that of n by its owners, and
    with h the product with n by each."""
    steps, tokens = int(contraction) // 16, 8
    owners = {"h": int(contraction) // 64, "dv": 0}.get(use, int(columns) // 64)
    count = 5 * steps + 12 + tokens * int(contraction) // 64 + tokens * owners + (2 * steps if use == "h" else 0)
    return "HGMMA", count, count


def slstm_products(channels, block=False):
    """One more than the k16 steps with weights in registers: forward two A tiles per group of units, backward one; a
    block that has a whole head of up to 64 units has no others. Two planes per number take three products. See
    slstm_resident in slstm_params.h."""
    def count(cell_or_states, *rest):
        groups, planes = [1, *map(int, rest)][-2:]
        if block and groups == 1:
            steps = 4 if channels == 1 else 8
        elif channels == 1:
            steps = 16 // groups // planes - (groups - 1) + 1
        else:
            steps = (28 if groups == 1 else 20) // planes + 1
        products = steps * (2 * groups if channels == 1 else 1) * (1 if planes == 1 else 3)
        return "HMMA", products, products
    return count


def chunk_threads(warps):
    """A thread per token of a chunk, of 256 where the kernel does not say."""
    return 32 * int(warps or 8)


def step_inputs_threads(number, size, taps):
    """Half as many where a window and a matrix take many registers."""
    return 512 if int(size) * (int(taps) + int(size)) * (4 if number == "float" else 2) < 192 else 256


BUDGETS = [
    # 168 for blocks of 8 by 8, whose 64 weights stay in registers; 255 where the sums of their gradients do, too
    budget(r"block_linear_rows", 128, 168, 16, blocks=3, must=VECTOR),
    budget(r"block_linear_gradients", 128, 255, 20, blocks=2, must=VECTOR),
    # 32 numbers of the state and three orders of the recurrence
    budget(r"gated_recurrence_columns", 128, 128, 48, blocks=4, must={"LDGSTS"}),
    budget(r"gated_decay_gradient_rows", 256, 64, 16, blocks=4),
    # Half of the registers hold integers on their way.
    budget(r"linear_int8_rows", 256, 128, 9, blocks=2, must={"HMMA", "LDG.128"}, products=int8_products, fewer=True),
    # Threads and shared memory are those of the widest rows; those of 16-bit numbers are stored 8 bytes at a time.
    budget(r"headwise_norm_rows", 512, 96, 16, must={"LDG.128"}, fewer=True),
    budget(r"headwise_norm_gradients", 512, 128, 73, must={"LDG.128"}, fewer=True),
    budget(r"headwise_norm_unaligned_rows", 512, 96, 16, fewer=True),
    budget(r"headwise_norm_unaligned_gradients", 512, 128, 73, fewer=True),
    budget(r"headwise_norm_wide_rows", 512, 128, 16, must={"LDG.128"}),
    budget(r"headwise_norm_wide_gradients", 512, 128, 16, must={"LDG.128"}),
    budget(r"softmax_cross_entropy", 256, 64, 16, blocks=4, must=VECTOR),
    # Of one consumer and 64 tokens, 256 columns or 64 tokens at a time: A S, A B^T, four row tiles of S; n; P X.
    budget(r"mlstm_sweep_sm90_wide", 384, 168, 227, must=WGMMA, forbidden={"HMMA"}, only=("sm_90a",),
           products=lambda *arguments: ("HGMMA", 56, 56)),
    budget(r"mlstm_sweep_sm90", 384, 168, 227, must=WGMMA, forbidden={"HMMA"}, only=("sm_90a",), products=sweep_sm90_products),
    # Of one consumer: two times 64 tokens, two row tiles, four steps; n by HMMA, wherever a block is fetched.
    budget(r"mlstm_state_sm90", 384, 168, 227, must=WGMMA | {"HMMA"}, only=("sm_90a",),
           products=lambda *arguments: ("HGMMA", 16, 16)),
    # Of one consumer, four steps each: a slice of A S, a slice of A B^T, 64 keys of P X.
    budget(r"mlstm_out_sm90", 384, 168, 227, must=WGMMA, forbidden={"HMMA"}, only=("sm_90a",),
           products=lambda *arguments: ("HGMMA", 12, 12)),
    budget(r"mlstm_\w+_sm90", 384, 168, 227, must=WGMMA, forbidden={"HMMA"}, only=("sm_90a",)),
    budget(r"mlstm_sweep", 256, 255, 227, must=MMA, forbidden={"HGMMA"}, products=sweep_products),
    budget(r"mlstm_state", 256, 128, 113, must=MMA, forbidden={"HGMMA"}, products=fixed_products({"1": 64, "2": 96})),
    budget(r"mlstm_out", 256, 128, 113, must=MMA, forbidden={"HGMMA"}, products=fixed_products({"1": 96, "2": 144})),
    budget(r"mlstm_gates", chunk_threads, 64, 16, blocks=4, must={"STG.128"}),
    budget(r"mlstm_gate_ends", chunk_threads, 64, 16, blocks=4),
    budget(r"mlstm_gate_gradients", 512, 64, 16, blocks=2),
    budget(r"mlstm_gate_gradients_short", 256, 64, 16, blocks=4),
    budget(r"mlstm_anchors", 256, 64, 16, blocks=4),
    budget(r"mlstm_prep", 256, 80, 32, blocks=3, must=VECTOR),
    budget(r"mlstm_segment_scan", 256, 64, 16, blocks=4),
    budget(r"mlstm_step_columns", 256, 96, 32, blocks=2, must=VECTOR),
    budget(r"mlstm_step_normaliser", 256, 64, 16, blocks=4),
    # 128 registers hold recurrent weights; all of them where the compiler keeps to one block per multiprocessor
    budget(r"slstm_forward_block", 256, 255, 227, must={"HMMA", "LDSM"}, products=slstm_products(1, block=True)),
    budget(r"slstm_forward_grid", 256, 255, 227, must=MMA, products=slstm_products(1)),
    budget(r"slstm_forward_sm90", 256, 255, 227, must={"HMMA", "LDSM", "SYNCS"}, only=("sm_90a",),
           products=slstm_products(1)),
    budget(r"slstm_backward_block", 256, 255, 227, must={"HMMA", "LDSM"}, products=slstm_products(4, block=True)),
    budget(r"slstm_backward_grid", 256, 255, 227, must=MMA, products=slstm_products(4)),
    budget(r"slstm_backward_sm90", 256, 255, 227, must={"HMMA", "LDSM", "SYNCS"}, only=("sm_90a",),
           products=slstm_products(4)),
    budget(r"slstm_pointwise_\w+", 256, 64, 16, blocks=4),
    budget(r"slstm_clear", 256, 32, 16, blocks=8),
    budget(r"slstm_slopes", 256, 80, 16, blocks=3),
    # All registers of a multiprocessor: gate weights are on their way beside a thread's block of channels.
    budget(r"mlstm_step_inputs_rows", step_inputs_threads, 255, 97, must={"LDG.128"}),
    budget(r"mlstm_step_lazy_columns", 256, 128, 40, blocks=2, must=VECTOR),
    budget(r"causal_conv1d_rows", 128, 64, 32, blocks=4, must={"LDGSTS", "STG.128"}),
    budget(r"causal_conv1d_gradients", 128, 80, 32, blocks=4, must={"LDGSTS", "STG.128"}),
    budget(r"causal_conv1d_token", 128, 64, 16, blocks=4),
    budget(r"causal_conv1d_(first|last)", 256, 64, 16, blocks=4),
    budget(r"column_sums", 512, 64, 16, blocks=2),
]


@dataclass
class Multiprocessor:
    shared_kib: int  # of a block, at most
    total_kib: int  # of all blocks, 1 KiB of each kept by the system
    threads: int = 2048
    blocks: int = 32


# Compute capability of a launch -> what its multiprocessors hold.
DEVICES = {80: Multiprocessor(163, 164), 86: Multiprocessor(99, 100, threads=1536, blocks=16), 90: Multiprocessor(227, 228)}
TARGET_OF_DEVICE = {80: "sm_80", 86: "sm_86", 90: "sm_90a"}
