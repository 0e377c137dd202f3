// What a forked process inherits, made usable.
//
// fork() copies the thread that calls it and no other. GCC's OpenMP runtime would still wait for the threads that it had started
// for this one, in its next parallel loop and for ever. So they end before a fork, and both processes start new ones when they need
// them. The pool of memory is not in the middle of a change: another thread may be at it while this one forks.
#pragma once

#include <omp.h>
#include <pthread.h>

#include "memory.h"

// GCC has it since version 9. LLVM's runtime starts its threads anew by itself, and for it a soft pause means nothing.
#pragma weak omp_pause_resource_all

namespace sora {

inline void survive_forks() {
  const auto before = [] {
    if (omp_pause_resource_all != nullptr) omp_pause_resource_all(omp_pause_soft);  // within a parallel loop it does nothing
    Pool::instance().hold();
  };
  const auto after = [] { Pool::instance().release(); };
  // Once, though a module can be loaded twice: the pool's lock is not recursive.
  static const int registered = pthread_atfork(before, after, after);
  if (registered != 0) throw std::bad_alloc();
}

}  // namespace sora
