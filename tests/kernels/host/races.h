// Tells ThreadSanitizer what orders the memory of threads: only barriers do. A shuffle or a vote orders nothing.
//
// Each thread of a block is a thread to the sanitizer. Two that touch the same bytes, one of them to write, without a
// barrier between them are a race, whatever the order in which they happened to run.
#pragma once

#if defined(__SANITIZE_THREAD__)
#define TCW_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TCW_TSAN 1
#endif
#endif

#ifdef TCW_TSAN
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/tsan_interface.h>

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace tcw_host {

// Where one thread says that it has come, and another that it has seen that.
struct Mark {
    char place[8];
};

static inline void release(Mark& mark) {
    (void)mark;
#ifdef TCW_TSAN
    __tsan_release(&mark);
#endif
}

static inline void acquire(Mark& mark) {
    (void)mark;
#ifdef TCW_TSAN
    __tsan_acquire(&mark);
#endif
}

// As long as it lives, what this thread reads and writes is not watched: it is the business of this folder.
struct Unwatched {
#ifdef TCW_TSAN
    Unwatched() {
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~Unwatched() {
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    }
#else
    Unwatched() {}
#endif
};

}  // namespace tcw_host
