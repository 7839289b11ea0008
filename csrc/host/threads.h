// Threads that live from one call to the next.
#pragma once

namespace pckernels {

// Runs work(context, rank) for rank = 0 .. threads - 1 at the same time, rank 0 in the calling thread, and returns when all are done.
// Calls from several threads at once take turns. Safe after a fork.
void run_threads(int threads, void (*work)(void* context, int rank), void* context);

}  // namespace pckernels
