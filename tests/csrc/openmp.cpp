// Of libgomp what the kernels call, on std::thread. ThreadSanitizer sees how these threads are started and joined; of
// libgomp's own it sees nothing, and would take every result for a race.
#include <thread>
#include <vector>

namespace {
thread_local int number = 0, team = 1;
}

extern "C" int omp_get_thread_num() { return number; }
extern "C" int omp_get_num_threads() { return team; }

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  const auto run = [=](int i) {
    number = i;
    team = static_cast<int>(threads);
    body(data);
    number = 0;
    team = 1;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < static_cast<int>(threads); ++i) others.emplace_back(run, i);
  run(0);
  for (std::thread& other : others) other.join();
}
