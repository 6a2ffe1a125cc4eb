#include "models/decode_graph.h"
#include "runtime/error.h"

namespace lighter::models {

std::string why_no_decode_graph(const DecodeGraphShape&, bool, DType) {
  return "this build has no CUDA";
}

uint64_t decode_graph_device_bytes(const DecodeGraphShape&) {
  return 0;
}

uint64_t decode_graph_host_bytes(const DecodeGraphShape&) {
  return 0;
}

std::unique_ptr<DecodeGraph> make_decode_graph(const DecodeGraphShape&, const LoadedWeights&, KvCache&,
                                               ExpertExecutor*, const RoutingSchedule&, const MissSharing&, Device&) {
  throw ConfigError("this build has no CUDA; build with LIGHTER_CUDA=ON or set decode: eager");
}

}  // namespace lighter::models
