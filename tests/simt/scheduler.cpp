// Fibers, the scheduler, launches.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

#include "tests/simt/agent.h"
#include "tests/simt/emulator.h"
#include "tests/simt/sanitizer.h"

// SIMT_UCONTEXT: switches threads by the C library, as on processors without the code below.
#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

Counters counters;
Fiber* current = nullptr;

namespace {

const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));  // up to 64 KiB on arm64
#if defined(SIMT_TSAN) || defined(SIMT_ASAN)
constexpr std::size_t kStack = 256 << 10;
#else
constexpr std::size_t kStack = 64 << 10;
#endif

char
    end_edge;  // every thread's end -> the host after the launch; once per launch, or races across blocks hide
std::vector<char*> stack_pool, used_stacks;
#if defined(SIMT_TSAN)
constexpr std::size_t kStacksKept = 2048;
#endif
#if defined(SIMT_ASAN)
const void* main_stack = nullptr;
std::size_t main_stack_bytes = 0;
#endif

}  // namespace

#if !defined(SIMT_UCONTEXT)
extern "C" void simt_switch(void** save, void* to);
asm(R"(.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp,(%rdi); movq %rsi,%rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 ret
.size simt_switch,.-simt_switch
)");
static void prepare_stack(Fiber* f, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(f->stack + kStack);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(entry);
  sp -= 6;
  std::memset(sp, 0, 48);
  f->sp = sp;
}
static void release_context(Fiber*) {}
#else
// Elsewhere by ucontext: slower by a system call per switch.
static void simt_switch(void** save, void* to) {
  if (*save == nullptr) *save = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(to));
}
static void prepare_stack(Fiber* f, void (*entry)()) {
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = f->stack;
  context->uc_stack.ss_size = kStack;
  makecontext(context, entry, 0);
  f->sp = context;
}
static void release_context(Fiber* f) { delete static_cast<ucontext_t*>(f->sp); }
#endif

static void switch_to(Fiber* to) {
  Fiber* from = current;
  if (to == from) return;
  ++counters.switches;
  current = to;
  SIMT_TSAN_ONLY(__tsan_switch_to_fiber(to->tsan, 1);)
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(from->done ? nullptr : &from->fake_stack,
                                 to->stack ? to->stack : main_stack,
                                 to->stack ? kStack : main_stack_bytes);
#endif
  simt_switch(&from->sp, to->sp);
#if defined(SIMT_ASAN)
  const void* bottom;
  std::size_t size;
  __sanitizer_finish_switch_fiber(from->fake_stack, &bottom, &size);
#endif
}

static std::string name(const Fiber* f) {
  const Dim3& b = f->block->index;
  return "block(" + std::to_string(b.x) + "," + std::to_string(b.y) + "," + std::to_string(b.z) +
         ") thread " + std::to_string(f->linear);
}

std::string describe(const Where& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column();
}

void fail(const std::string& message) {
  Gang* gang = current->gang;
  if (current == &gang->main) throw Error(message);
  gang->error = message + " [" + name(current) + "]";
  current->done = false;  // an exiting thread that finds an error does not end in order
  switch_to(&gang->main);
  std::abort();
}

static std::string deadlock_report(const Gang& gang) {
  std::map<std::string, std::pair<int, std::string>> places;
  for (const auto& f : gang.fibers) {
    if (f->done) continue;
    auto& entry = places[std::string(f->what) + " at " + describe(f->where)];
    if (entry.first++ == 0) entry.second = name(f.get());
  }
  std::string report = "deadlock:";
  for (const auto& [place, entry] : places) {
    report += " {" + std::to_string(entry.first) + " threads in " + place + ", first " +
              entry.second + "}";
  }
  return report;
}

static Fiber* next_ready(Gang* gang) {
  const std::size_t count = gang->ready.size() - gang->head;
  if (count > 0 && gang->shape.seed != 0) {
    std::swap(gang->ready[gang->head + gang->random() % count], gang->ready.back());
    Fiber* f = gang->ready.back();
    gang->ready.pop_back();
    return f;
  }
  if (count > 0) {
    Fiber* f = gang->ready[gang->head++];
    if (gang->head == gang->ready.size()) gang->ready.clear(), gang->head = 0;
    return f;
  }
  if (gang->left == 0) return &gang->main;
  if (land_one(gang)) return next_ready(gang);
  gang->error = deadlock_report(*gang);
  return &gang->main;
}

void make_ready(Fiber* fiber) {
  fiber->gang->ready.push_back(fiber);
  fiber->gang->idle_yields = 0;
}

void park(const char* what, const Where& where) {
  current->what = what;
  current->where = where;
  switch_to(next_ready(current->gang));
}

void spin(const Where& where) {
  Gang* gang = current->gang;
  if (gang->idle_yields > 2 * gang->fibers.size()) land_one(gang);
  if (++gang->idle_yields > 2000 * gang->fibers.size()) {
    fail("livelock: all threads spin; " + deadlock_report(*gang));
  }
  gang->ready.push_back(current);
  park("spin", where);
}

static void check_exit(const Fiber* f) {
  for (const auto& group : f->copy_groups) {
    for (const CopyOp& copy : group) {
      if (copy.number >= f->copies_covered)
        fail("thread exits with cp.async groups never waited for");
    }
  }
  for (const CopyOp& copy : f->open_copies) {
    if (copy.number >= f->copies_covered) fail("thread exits with cp.async copies never committed");
  }
}

// An exception of the kernel ends the launch and leaves it.
static void run_body(Gang* gang) {
  try {
    gang->body(gang->argument);
  } catch (...) {
    gang->exception = std::current_exception();
  }
  if (!gang->exception) return;
  Quiet quiet;  // as every thread that stops for good
  switch_to(&gang->main);
}

static void fiber_entry() {
#if defined(SIMT_ASAN)
  const void* bottom;
  std::size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (main_stack == nullptr) main_stack = bottom, main_stack_bytes = size;
#endif
  current->started = true;
  run_body(current->gang);
  Fiber* next;
  {
    Quiet quiet;
    check_exit(current);
    --current->block->alive;
    --current->gang->left;
    current->gang->idle_yields = 0;
    barriers_after_exit(current);
    async_after_exit(current);
    current->done = true;
    release(&end_edge);
    next = next_ready(current->gang);
  }
  switch_to(next);
  std::abort();
}

static char* take_stack() {
  if (!stack_pool.empty()) {
    char* stack = stack_pool.back();
    stack_pool.pop_back();
    return stack;
  }
  void* p = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("no memory for a thread's stack");
  mprotect(p, page, PROT_NONE);
  return static_cast<char*>(p) + page;
}

static void give_stack(char* stack) {
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(stack, kStack);
#endif
#if defined(SIMT_TSAN)
  // The sanitizer would see one thread's stack used by another: not again in this launch.
  if (stack_pool.size() + used_stacks.size() < kStacksKept) {
    used_stacks.push_back(stack);
  } else {
    munmap(stack - page, kStack + page);
  }
#else
  stack_pool.push_back(stack);
#endif
}

/// At the end of a launch, when the host is ordered after all its threads.
struct Recycler {
  Recycler() = default;
  Recycler(const Recycler&) = delete;
  Recycler& operator=(const Recycler&) = delete;
  ~Recycler() {
    stack_pool.insert(stack_pool.end(), used_stacks.begin(), used_stacks.end());
    used_stacks.clear();
    recycle_agents();
  }
};

static std::size_t padded_bytes(const Launch& shape) {
  return (shape.shared_offset + shape.shared_bytes + 1023) / 1024 * 1024 + 1024;
}

static void start_block(Gang& gang, unsigned rank, Dim3 index) {
  Block& block = gang.blocks[rank];
  const Launch& shape = gang.shape;
  block.index = index;
  block.gang = &gang;
  block.rank = rank;
  block.threads = block.alive = shape.block.x * shape.block.y * shape.block.z;
  block.warps = std::vector<Warp>((block.threads + 31) / 32);
  block.shared_bytes = shape.shared_bytes;
  block.window = kWindow + shape.shared_offset;
  const std::size_t padded = padded_bytes(shape);
  char* memory = static_cast<char*>(std::aligned_alloc(1024, padded));
  std::memset(memory, 0xff, padded);
  block.shared = memory + shape.shared_offset;
#if defined(SIMT_ASAN)
  __asan_poison_memory_region(memory, padded);
  __asan_unpoison_memory_region(block.shared, shape.shared_bytes);
#endif
  block.async.proxy = create_agent();
  for (Warp& warp : block.warps)
    warp.registers = warp.wanted_registers = shape.registers_per_thread;
  for (unsigned t = 0; t < block.threads; ++t) {
    auto f = std::make_unique<Fiber>();
    f->block = &block;
    f->gang = &gang;
    f->linear = t;
    f->thread = {t % shape.block.x, t / shape.block.x % shape.block.y,
                 t / (shape.block.x * shape.block.y)};
    f->stack = take_stack();
    prepare_stack(f.get(), fiber_entry);
    f->tsan = create_agent();
    gang.ready.push_back(f.get());
    gang.fibers.push_back(std::move(f));
  }
}

static void end_gang(Gang& gang) {
  for (auto& f : gang.fibers) {
    if (f->started && !f->done) {
      destroy_quiet_agent(f->tsan);
    } else {
      destroy_agent(f->tsan);
    }
    release_context(f.get());
    give_stack(f->stack);
  }
  release_context(&gang.main);
  for (Block& block : gang.blocks) {
    char* memory = block.shared - gang.shape.shared_offset;
#if defined(SIMT_ASAN)
    __asan_unpoison_memory_region(memory, padded_bytes(gang.shape));
#endif
    std::free(memory);
  }
}

static void run_gang(const Launch& shape, const std::vector<Dim3>& blocks, std::uint64_t salt,
                     void (*body)(void*), void* argument) {
  Gang gang;
  gang.shape = shape;
  gang.body = body;
  gang.argument = argument;
  gang.random.seed(shape.seed * 7919 + salt);
  gang.main.gang = &gang;
  gang.end_edge = &end_edge;
  gang.blocks = std::vector<Block>(blocks.size());
  SIMT_TSAN_ONLY(gang.main.tsan = __tsan_get_current_fiber();)
  for (unsigned i = 0; i < blocks.size(); ++i) start_block(gang, i, blocks[i]);
  gang.left = gang.fibers.size();
  current = &gang.main;
  switch_to(next_ready(&gang));
  current = nullptr;
  const bool complete = gang.error.empty() && !gang.exception;
  if (complete) {
    finish_stores(gang);
  } else {  // the threads stop where they are: the host goes on after them all the same
    for (const auto& f : gang.fibers) agent_release(f->tsan, &end_edge);
  }
  drop_async(gang);
  if (!complete) acquire(&end_edge);
  end_gang(gang);
  if (gang.exception) std::rethrow_exception(gang.exception);
  if (!gang.error.empty()) throw Error(gang.error);
}

Counters launch_raw(const Launch& shape, void (*body)(void*), void* argument) {
  Quiet quiet;
  const std::size_t total = std::size_t{shape.grid.x} * shape.grid.y * shape.grid.z;
  const std::size_t threads = std::size_t{shape.block.x} * shape.block.y * shape.block.z;
  const std::size_t per_gang = shape.cluster == 0 ? total : shape.cluster;
  if (threads == 0 || threads > 1024) throw Error("a block has 1 to 1024 threads");
  if (total == 0 || total % per_gang != 0) throw Error("the grid is not a multiple of the cluster");
  if (shape.cluster > 16) throw Error("a cluster has at most 16 blocks");
  if (shape.shared_offset % 128 != 0 || shape.shared_offset >= 1024)
    throw Error("the shared window begins at a multiple of 128 below 1024");
  if (shape.shared_bytes > 227 * 1024) throw Error("more than 227 KB of shared memory");
  std::vector<Dim3> all;
  for (unsigned z = 0; z < shape.grid.z; ++z)
    for (unsigned y = 0; y < shape.grid.y; ++y)
      for (unsigned x = 0; x < shape.grid.x; ++x) all.push_back({x, y, z});
  std::vector<std::size_t> order(total / per_gang);
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::mt19937_64 random(shape.seed);
  if (shape.seed != 0) std::shuffle(order.begin(), order.end(), random);
  counters = {};
  const Recycler recycler;
  for (std::size_t gang : order) {
    const auto first = all.begin() + static_cast<std::ptrdiff_t>(gang * per_gang);
    run_gang(shape, {first, first + static_cast<std::ptrdiff_t>(per_gang)}, gang, body, argument);
  }
  acquire(&end_edge);
  return counters;
}

}  // namespace simt
