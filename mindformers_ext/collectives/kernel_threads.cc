// How many threads MindSpore's own CPU kernels use in a rank. Extends MindSpore 2.9.0: its pool has one thread beside
// the one that runs the graph, whatever it is told, and a kernel waits for both. With more ranks than cores the second
// is seldom on a core, so that small kernels took the time of a scheduler's slice.
#include <algorithm>
#include <cstdlib>

#include "collectives.h"
#include "mindspore/core/mindrt/include/actor/actormgr.h"

namespace cpu_parallel {

void LimitKernelThreads() {
  const char* asked = std::getenv("OMP_NUM_THREADS");
  mindspore::ActorThreadPool* pool = mindspore::ActorMgr::GetActorMgrRef()->GetActorThreadPool();
  if (asked == nullptr || pool == nullptr) return;
  const size_t helpers = pool->GetKernelThreadNum() - pool->GetActorThreadNum();
  const size_t wanted = static_cast<size_t>(std::max(std::atoi(asked), 1) - 1);
  pool->SetKernelThreadNum(std::min(helpers, wanted));
}

}  // namespace cpu_parallel
