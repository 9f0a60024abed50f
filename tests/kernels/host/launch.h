// Runs the blocks of a launch one after another, and turns what goes wrong into a message.
#pragma once

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#include <csetjmp>
#include <csignal>
#include <type_traits>
#include <utility>

#include "fibers.h"

namespace tcw_host {

struct Launch {  // as module.py fills it
    Index blocks, threads;
    unsigned shared;        // bytes of dynamic shared memory
    unsigned order;         // FORWARD, REVERSE, or SHUFFLED by `seed`
    unsigned milliseconds;  // of processor time, after which it counts as an endless loop
    unsigned padding;
    uint64_t seed;
    char* stacks;  // of tcw_stacks()
};

static sigjmp_buf failed;
static pthread_t owner;

// Nobody but this file may touch what is around `shared` bytes of dynamic shared memory.
static void fence(unsigned shared, bool up) {
    static bool pages = false;
    if (!pages) {
        mprotect(tcw_arena, FENCE, PROT_NONE);
        mprotect(tcw_arena + FENCE + ROOM, FENCE, PROT_NONE);
        pages = true;
    }
    (void)shared, (void)up;
#ifdef TCW_ASAN
    const auto set = up ? __asan_poison_memory_region : __asan_unpoison_memory_region;
    set(dynamic - MARGIN, MARGIN);
    set(dynamic + shared, ROOM - MARGIN - shared);
#endif
}

static void start_threads(const Launch& launch) {
    const Index n = launch.threads;
    for (unsigned i = 0; i < count; ++i) {
        Thread& t = threads[i];
        t.number = i;
        t.index = {i % n.x, i / n.x % n.y, i / n.x / n.y};
        t.state = State::READY;
        t.barriers = t.groups = 0;
        t.copies.clear();
        prepare(t.fiber, launch.stacks + i * STACK, STACK, begin);
    }
    for (unsigned w = 0; w < (count + 31) / 32; ++w) ready[w] = warp_mask(w), at_warp[w] = 0;
}

static void run_block(const Launch& launch) {
    for (const TcwVariable& v : tcw_variables) memset(tcw_arena + v.offset, POISON, v.size);
    memset(dynamic - MARGIN, POISON, MARGIN + launch.shared + MARGIN);
    start_threads(launch);
    fence(launch.shared, true);
    release(block_begins);
    unsigned warp = 0;
    do {
        for (int next = pick_warp(warp); next >= 0 && !message[0]; next = pick_warp(warp)) {
            warp = static_cast<unsigned>(next);
            run_warp(warp);
        }
    } while (!message[0] && open_barrier());
    fence(launch.shared, false);
    acquire(block_ends);
    for (unsigned i = 1; i <= MARGIN; ++i) {
        if (dynamic[-static_cast<int>(i)] != POISON) say(nullptr, "writes before its dynamic shared memory");
        if (dynamic[launch.shared + i - 1] != POISON)
            say(nullptr, "writes past its %u bytes of dynamic shared memory", launch.shared);
    }
}

static void run_blocks(const Launch& launch) {
    const Index n = launch.blocks;
    const uint64_t blocks = uint64_t(n.x) * n.y * n.z;
    const uint64_t skip = launch.order == SHUFFLED ? launch.seed % blocks : 0;
    for (uint64_t b = 0; b < blocks && !message[0]; ++b) {
        const uint64_t i = order == REVERSE ? blocks - 1 - b : (b + skip) % blocks;
        here.block = {unsigned(i % n.x), unsigned(i / n.x % n.y), unsigned(i / n.x / n.y)};
        run_block(launch);
    }
}

// A thread of the kernel did what the processor or the clock does not allow: leave it where it is.
static void on_signal(int number, siginfo_t* info, void*) {
    if (number == SIGVTALRM && !pthread_equal(pthread_self(), owner)) {
        pthread_kill(owner, SIGVTALRM);
    } else if (!message[0]) {
        if (number == SIGVTALRM) {
            say(current, "is still running: an endless loop?");
        } else if (number == SIGFPE) {
            say(current, "divides by zero");
        } else {
            say(current, "reads or writes at %p, where there is nothing", info->si_addr);
        }
        siglongjmp(failed, 1);
    }
}

// Catches signals as long as it lives. Sanitizers have their own way with all but the clock.
class Guard {
  public:
    explicit Guard(unsigned milliseconds) {
        stack_t mine = {};
        mine.ss_sp = stack_;
        mine.ss_size = sizeof stack_;
        sigaltstack(&mine, &stack_before_);
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (unsigned i = 0; i < SIGNALS; ++i) sigaction(NUMBERS[i], &action, &before_[i]);
        clock(milliseconds);
    }
    ~Guard() {
        clock(0);
        for (unsigned i = 0; i < SIGNALS; ++i) sigaction(NUMBERS[i], &before_[i], nullptr);
        if (!(stack_before_.ss_flags & SS_ONSTACK)) sigaltstack(&stack_before_, nullptr);
    }

  private:
    static void clock(unsigned milliseconds) {
        const itimerval time = {{0, 0}, {time_t(milliseconds / 1000), suseconds_t(milliseconds % 1000 * 1000)}};
        setitimer(ITIMER_VIRTUAL, &time, nullptr);
    }
    static constexpr int NUMBERS[] = {SIGVTALRM, SIGSEGV, SIGBUS, SIGFPE};
#if defined(TCW_ASAN) || defined(TCW_TSAN)
    static constexpr unsigned SIGNALS = 1;
#else
    static constexpr unsigned SIGNALS = 4;
#endif
    static inline char stack_[64 << 10];
    stack_t stack_before_ = {};
    struct sigaction before_[4];
};

// Each thread of a block is a thread to ThreadSanitizer, for the time of a launch.
static void make_threads(bool make) {
    (void)make;
#ifdef TCW_TSAN
    for (unsigned i = 0; i < count; ++i) {
        void*& thread = threads[i].fiber.thread;
        if (make) {
            const Index n = here.threads;
            char name[64];
            snprintf(name, sizeof name, "(%u, %u, %u)", i % n.x, i / n.x % n.y, i / n.x / n.y);
            thread = __tsan_create_fiber(0);
            __tsan_set_fiber_name(thread, name);
        } else {
            __tsan_destroy_fiber(thread);
        }
    }
    scheduler.thread = __tsan_get_current_fiber();
#endif
}

#if defined(TCW_ASAN) || defined(TCW_TSAN)
// The sanitizer's report says which line; this says which thread.
static void on_death() {
    char text[512] = "";
    message = text;
    message_size = sizeof text;
    say(current, "stopped by the sanitizer\n");
    if (write(STDERR_FILENO, text, strlen(text)) < 0) _exit(1);
}
#endif

static int run(const char* name, const Launch& launch, void (*thunk)(void**), void** values, char* error, size_t size) {
    kernel = name;
    body = thunk;
    arguments = values;
    message = error;
    message_size = size;
    message[0] = 0;
    count = launch.threads.x * launch.threads.y * launch.threads.z;
    order = launch.order;
    random_state = launch.seed;
    owner = pthread_self();
    here.threads = launch.threads;
    here.blocks = launch.blocks;
#if defined(TCW_ASAN) || defined(TCW_TSAN)
    __sanitizer_set_death_callback(on_death);
    if (void* other = dlopen("libubsan.so.1", RTLD_LAZY | RTLD_NOLOAD)) {  // of GCC, which has two
        if (void* set = dlsym(other, "__sanitizer_set_death_callback"))
            reinterpret_cast<void (*)(void (*)())>(set)(on_death);
    }
#endif
    const Guard guard(launch.milliseconds);
    const Unwatched unwatched;
    make_threads(true);
    if (!sigsetjmp(failed, 1)) run_blocks(launch);
    if (!message[0]) make_threads(false);
    current = nullptr;
    return message[0] != 0;
}

// ---- What an entry point takes, for Python to check: 'p' pointer (with its alignment), 'i' integer, 'f' float. ----

struct Parameter {
    char kind;
    uint8_t size;
    uint8_t alignment;
};
template <class T>
struct Kind {
    static_assert(std::is_arithmetic<T>::value, "a kernel takes pointers and numbers");
    static constexpr Parameter value = {std::is_integral<T>::value ? 'i' : 'f', sizeof(T), alignof(T)};
};
template <class T>
struct Kind<T*> {
    static constexpr Parameter value = {'p', sizeof(T*), alignof(T)};
};

template <class... A, size_t... I>
void apply(void (*entry)(A...), void** values, std::index_sequence<I...>) {
    (void)values;
    entry(*static_cast<A*>(values[I])...);
}
template <class... A>
void apply(void (*entry)(A...), void** values) {
    apply(entry, values, std::index_sequence_for<A...>());
}
template <class... A>
const Parameter* parameters(void (*)(A...)) {
    static constexpr Parameter list[] = {Kind<A>::value..., {0, 0, 0}};
    return list;
}

}  // namespace tcw_host

// Memory for the stacks of a block, each with a page below it that nobody may touch; null where there is none.
extern "C" __attribute__((visibility("default"))) char* tcw_stacks() {
    using tcw_host::MOST_THREADS;
    using tcw_host::STACK;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* map = mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (map == MAP_FAILED) return nullptr;
    auto* stacks = static_cast<char*>(map);
    for (unsigned i = 0; i < MOST_THREADS; ++i) mprotect(stacks + i * STACK, sysconf(_SC_PAGESIZE), PROT_NONE);
    return stacks;
}

// What Python calls for the kernel NAME.
#define TCW_HOST_ENTRY(NAME)                                                                                         \
    extern "C" __attribute__((visibility("default"))) const tcw_host::Parameter* tcw_parameters_##NAME() {           \
        return tcw_host::parameters(NAME);                                                                           \
    }                                                                                                                \
    extern "C" __attribute__((visibility("default"))) int tcw_run_##NAME(const tcw_host::Launch* launch,             \
                                                                         void** values, char* error, size_t size) {  \
        return tcw_host::run(#NAME, *launch, [](void** v) { tcw_host::apply(NAME, v); }, values, error, size);       \
    }
