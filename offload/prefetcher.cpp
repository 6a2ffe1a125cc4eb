#include "offload/prefetcher.h"

#include <spdlog/spdlog.h>
#include <tbb/flow_graph.h>
#include <tbb/task_arena.h>

#include <atomic>
#include <thread>
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
        graph(arena.execute([] { return std::make_unique<flow::graph>(); })),
        expand(*graph, flow::serial,
               [this](const Request& request, Expand::output_ports_type& ports) {
                 for (const int expert : request.experts) {
                   for (int i = 0; i < grid.slices; ++i) {
                     std::get<0>(ports).try_put({request.step, {request.layer, expert, i}});
                   }
                 }
               }),
        queue(*graph),
        limiter(*graph, max_in_flight),
        copy(*graph, flow::serial,
             [this](const Guess& guess, Copy::gateway_type& gateway) {
               gateway.reserve_wait();
               const auto ended = [this, &gateway] {
                 entering.fetch_add(1, std::memory_order_relaxed);
                 arena.enqueue([&gateway] {
                   gateway.try_put(flow::continue_msg());
                   gateway.release_wait();
                 });
                 entering.fetch_sub(1, std::memory_order_release);
               };
               try {
                 if (!start(guess.step, guess.slice, ended)) ended();
               } catch (...) {
                 gateway.release_wait();
                 throw;
               }
             }),
        ended(*graph, flow::serial, [](flow::continue_msg) { return flow::continue_msg(); }) {
    flow::make_edge(flow::output_port<0>(expand), queue);
    flow::make_edge(queue, limiter);
    flow::make_edge(limiter, copy);
    flow::make_edge(copy, ended);
    flow::make_edge(ended, limiter.decrementer());
  }

  // What was enqueued may be over, and so the graph, before enqueue() has returned and needs the arena no
  // more.
  ~Graph() {
    while (entering.load(std::memory_order_acquire) > 0) std::this_thread::yield();
  }

  // From outside, work comes in by enqueue(): for that alone oneTBB gives the arena a worker when its limit
  // is one thread.
  void put(Request request) {
    graph->reserve_wait();
    arena.enqueue([this, request = std::move(request)] {
      expand.try_put(request);
      graph->release_wait();
    });
  }

  const ExpertGrid grid;
  StartPrefetch start;
  std::atomic<int> entering = 0;  // threads that hand the end of a copy to the arena
  tbb::task_arena arena{1, 0};
  std::unique_ptr<flow::graph> graph;  // runs in the arena, because it was made there
  Expand expand;
  flow::queue_node<Guess> queue;
  flow::limiter_node<Guess> limiter;
  Copy copy;
  flow::function_node<flow::continue_msg, flow::continue_msg> ended;
};

Prefetcher::Prefetcher(const ExpertGrid& grid, int max_in_flight, StartPrefetch start)
    : graph_(std::make_unique<Graph>(grid, max_in_flight, std::move(start))) {}

Prefetcher::~Prefetcher() {
  try {
    drain();
  } catch (const std::exception& failure) {
    spdlog::error("prefetcher: {}", failure.what());
  }
}

void Prefetcher::request(uint64_t step, int layer, std::vector<int> experts) {
  graph_->put({step, layer, std::move(experts)});
}

void Prefetcher::drain() {
  graph_->graph->wait_for_all();
}

}  // namespace lighter::offload
