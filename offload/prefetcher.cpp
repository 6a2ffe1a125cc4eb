#include "offload/prefetcher.h"

#include <spdlog/spdlog.h>
#include <tbb/flow_graph.h>
#include <tbb/task_arena.h>

#include <utility>

namespace lighter::offload {

namespace flow = tbb::flow;

struct Prefetcher::Graph {
  struct Request {
    uint64_t step;
    int layer;
    std::vector<int> experts;
  };
  struct Guess {
    uint64_t step;
    SliceId slice;
  };
  using Expand = flow::multifunction_node<Request, std::tuple<Guess>>;
  using Copy = flow::async_node<Guess, flow::continue_msg>;

  Graph(const ExpertGrid& grid_, int max_in_flight, StartPrefetch start_)
      : grid(grid_),
        start(std::move(start_)),
        expand(graph, flow::serial,
               [this](const Request& request, Expand::output_ports_type& ports) {
                 for (const int expert : request.experts) {
                   for (int i = 0; i < grid.slices; ++i) {
                     std::get<0>(ports).try_put({request.step, {request.layer, expert, i}});
                   }
                 }
               }),
        queue(graph),
        limiter(graph, max_in_flight),
        copy(graph, flow::serial,
             [this](const Guess& guess, Copy::gateway_type& gateway) {
               gateway.reserve_wait();
               const auto ended = [&gateway] {
                 gateway.try_put(flow::continue_msg());
                 gateway.release_wait();
               };
               if (!start(guess.step, guess.slice, ended)) ended();
             }),
        ended(graph, flow::serial, [](flow::continue_msg) { return flow::continue_msg(); }) {
    flow::make_edge(flow::output_port<0>(expand), queue);
    flow::make_edge(queue, limiter);
    flow::make_edge(limiter, copy);
    flow::make_edge(copy, ended);
    flow::make_edge(ended, limiter.decrementer());
  }

  const ExpertGrid grid;
  StartPrefetch start;
  flow::graph graph;
  Expand expand;
  flow::queue_node<Guess> queue;
  flow::limiter_node<Guess> limiter;
  Copy copy;
  flow::function_node<flow::continue_msg, flow::continue_msg> ended;
};

Prefetcher::Prefetcher(const ExpertGrid& grid, int max_in_flight, StartPrefetch start) {
  // The graph runs where it was made.
  tbb::task_arena arena(1, 0);
  arena.execute([&] { graph_ = std::make_unique<Graph>(grid, max_in_flight, std::move(start)); });
}

Prefetcher::~Prefetcher() {
  try {
    drain();
  } catch (const std::exception& failure) {
    spdlog::error("prefetcher: {}", failure.what());
  }
}

void Prefetcher::request(uint64_t step, int layer, std::vector<int> experts) {
  graph_->expand.try_put({step, layer, std::move(experts)});
}

void Prefetcher::drain() { graph_->graph.wait_for_all(); }

}  // namespace lighter::offload
