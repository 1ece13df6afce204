#include "majority_vote_cuda.cu"

extern "C" int majority_vote(const livrec::MajorityVoteCuda* job, int limit, unsigned order) {
  emulated::shared_limit = limit, emulated::order = order;
  return livrec::majority_vote_cuda(*job, nullptr);
}

extern "C" void* guarded(int64_t bytes) { return emulated::guarded(bytes); }
