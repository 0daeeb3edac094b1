// Which compilation of the loops this CPU runs, and how they are spread over torch's threads.
#include <torch/csrc/stable/c/shim.h>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "../check.h"
#include "kernels.h"

namespace rf::cpu {
namespace {

// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrainElements = 32768;

// Slowest first; only what this CPU can run.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> tables = {&kernels_default()};
#ifdef RF_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) tables.push_back(&kernels_avx2());
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) tables.push_back(&kernels_avx512());
#endif
  return tables;
}

const Kernels& choose() {
  const std::vector<const Kernels*> tables = runnable();
  const char* wanted = std::getenv("RESUNET_FAST_ISA");
  if (wanted == nullptr || *wanted == '\0') return *tables.back();
  std::string names;
  for (const Kernels* table : tables) {
    if (std::string(wanted) == table->name) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  fail(
      "RESUNET_FAST_ISA must name an instruction set that this CPU and build have (", names,
      "), got '", wanted, "'");
}

struct Call {
  int64_t scratch_bytes;
  ParallelBody body;
  const void* context;
};

void run_range(int64_t begin, int64_t end, void* context) {
  const Call& call = *static_cast<const Call*>(context);
  // 64 bytes: a cache line, and the widest register.
  // Uninitialised: make_unique would clear megabytes.
  const std::unique_ptr<char[]> scratch(new char[call.scratch_bytes + 64]);
  void* aligned = scratch.get();
  size_t space = call.scratch_bytes + 64;
  std::align(64, call.scratch_bytes, aligned, space);
  call.body(begin, end, static_cast<char*>(aligned), call.context);
}

std::string cpu_isa() { return kernels().name; }

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

void run_parallel(
    int64_t items, int64_t elements_per_item, int64_t scratch_bytes, ParallelBody body,
    const void* context) {
  if (items == 0) return;
  Call call = {scratch_bytes, body, context};
  const int64_t per_item = elements_per_item > 0 ? elements_per_item : 1;
  const int64_t grain = per_item < kGrainElements ? kGrainElements / per_item : 1;
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, items, grain, &run_range, &call));
}

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", RF_BOX(&cpu_isa));
}

}  // namespace rf::cpu
